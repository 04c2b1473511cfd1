"""Multi-scale deformable attention after omniops.enable, called as Deformable DETR and GroundingDINO do."""

import importlib
import itertools

import pytest
import torch
from torch.testing import assert_close

import omniops

FUNCTION = """
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
{imports}

class MSDeformAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return {module}.ms_deform_attn_forward(value, shapes, starts, locations, weights, ctx.im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        by_value, by_locations, by_weights = {module}.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output, ctx.im2col_step
        )
        return by_value, None, None, by_locations, by_weights, None
"""
ALONE = FUNCTION.format(imports="import MultiScaleDeformableAttention as MSDA", module="MSDA")
IN_DETREX = FUNCTION.format(imports="from detrex import _C", module="_C")
# GroundingDINO goes on without its extension, and calls it on CUDA alone.
OPTIONAL = "import warnings\ntry:\n    from groundingdino import _C\nexcept:\n    warnings.warn('no _C')"
IN_GROUNDINGDINO = FUNCTION.format(imports=OPTIONAL, module="_C")
PROJECTS = {
    "MultiScaleDeformableAttention": ("models/ops/functions/ms_deform_attn_func", ALONE),
    "groundingdino": ("groundingdino/models/GroundingDINO/ms_deform_attn", IN_GROUNDINGDINO),
    "detrex": ("detrex/layers/multi_scale_deform_attn", IN_DETREX),
}
SHAPES = torch.tensor([[4, 5], [2, 3], [1, 1]])
STARTS = torch.tensor([0, 20, 26])
PIXELS, BATCH, QUERIES, HEADS, POINTS, DEPTH = 27, 3, 4, 2, 2, 3


@pytest.fixture(params=PROJECTS)
def attend(request, project):
    """The project's autograd function with the module enabled, whose import failed before where that goes through."""
    path, text = PROJECTS[request.param]
    project({f"{path}.py": text})
    name = path.replace("/", ".")
    if request.param == "groundingdino":
        with pytest.warns(UserWarning, match="no _C"):
            importlib.import_module(name)
    else:
        with pytest.raises(ImportError):
            importlib.import_module(name)
    omniops.enable(request.param)
    return importlib.import_module(name).MSDeformAttnFunction.apply


def problem(dtype=torch.float64):
    """value, locations, weights. Locations lie within the map and around it, up to two pixels away."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(BATCH, PIXELS, HEADS, DEPTH, generator=generator, dtype=torch.float64)
    shape = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]


def pixel(value, level, n, m, y, x):
    h, w = SHAPES[level].tolist()
    inside = 0 <= y < h and 0 <= x < w
    return value[n, STARTS[level] + y * w + x, m] if inside else torch.zeros(DEPTH, dtype=value.dtype)


def formula(value, locations, weights):
    """Sample by sample, as the paper has it: the four pixels around, weighted by their nearness."""
    rows = []
    for n, q, m in itertools.product(range(BATCH), range(QUERIES), range(HEADS)):
        row = torch.zeros(DEPTH, dtype=value.dtype)
        for level, point in itertools.product(range(len(SHAPES)), range(POINTS)):
            x, y = locations[n, q, m, level, point] * SHAPES[level].flip(0) - 0.5
            left, top = int(torch.floor(x)), int(torch.floor(y))
            for v, u in itertools.product((top, top + 1), (left, left + 1)):
                near = (1 - (y - v).abs()) * (1 - (x - u).abs())
                row = row + weights[n, q, m, level, point] * near * pixel(value, level, n, m, v, u)
        rows.append(row)
    return torch.stack(rows).view(BATCH, QUERIES, HEADS * DEPTH)


def result_and_gradients(attend, tensors):
    value, locations, weights = tensors
    result = attend(value, SHAPES, STARTS, locations, weights, 64)
    return [result.detach(), *torch.autograd.grad(result, tensors, gradient(result.dtype))]


def gradient(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, QUERIES, HEADS * DEPTH, generator=generator, dtype=torch.float64).to(dtype)


def expected(tensors):
    """In float64, of what was rounded to the tensors' dtype."""
    grad = gradient(tensors[0].dtype).double()
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    result = formula(*tensors)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad)]


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.double(), other, rtol=0, atol=tolerance * float(other.abs().max()))


def test_value_and_gradients_are_the_formulas(attend):
    close(result_and_gradients(attend, problem()), expected(problem()), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_dtypes(attend, dtype, tolerance):
    tensors = problem(dtype)
    found = result_and_gradients(attend, tensors)
    assert [tensor.dtype for tensor in found] == [dtype] * 4
    close(found, expected(tensors), tolerance)


@pytest.fixture
def MSDA():  # noqa: N802
    omniops.enable("MultiScaleDeformableAttention")
    yield importlib.import_module("MultiScaleDeformableAttention")
    omniops.disable()


def test_dtypes_that_autocast_mixes(MSDA):
    """A value of half precision meets locations and weights of float32."""
    value, locations, weights = (tensor.detach() for tensor in problem(torch.float32))
    tensors = [value.bfloat16(), locations, weights]
    with torch.autocast("cpu", torch.bfloat16):
        result = MSDA.ms_deform_attn_forward(tensors[0], SHAPES, STARTS, locations, weights, 64)
        gradients = MSDA.ms_deform_attn_backward(
            tensors[0], SHAPES, STARTS, locations, weights, gradient(torch.bfloat16), 64
        )
    assert [tensor.dtype for tensor in (result, *gradients)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    close([result, *gradients], expected(tensors), 2e-2)
    close(gradients[1:], expected(tensors)[2:], 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, s, p, w: (v[0], s, p, w), r"value must have shape \(N, pixels of all levels, M, D\), got \("),
        (lambda v, s, p, w: (v, s[0], p, w), r"spatial_shapes must have shape \(L, 2\), got \(2,\)"),
        (
            lambda v, s, p, w: (v[:, 1:], s, p, w),
            r"value must have the 27 pixels .*, got shape \(3, 26",
        ),
        (lambda v, s, p, w: (v, s[:2], p, w), "sampling_loc must have shape .* L = 2, got"),
        (lambda v, s, p, w: (v, s, p[..., :1], w), "sampling_loc must have shape"),
        (lambda v, s, p, w: (v, s, p, w[0]), r"attn_weight must have shape \(N, Q, M, L, P\) = \(3, 4, 2, 3, 2\), got"),
    ],
)
def test_wrong_shapes_are_named(MSDA, change, words):
    value, locations, weights = (tensor.detach() for tensor in problem())
    value, shapes, *others = change(value, SHAPES, locations, weights)
    with pytest.raises(ValueError, match=words):
        MSDA.ms_deform_attn_forward(value, shapes, STARTS, *others, 64)
    with pytest.raises(ValueError, match=words):
        MSDA.ms_deform_attn_backward(value, shapes, STARTS, *others, gradient(), 64)


@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float64, torch.float32, torch.bfloat16])))
def test_any_dtypes_may_meet(MSDA, dtypes):
    tensors = [tensor.detach().to(dtype) for tensor, dtype in zip(problem(), dtypes, strict=True)]
    value, locations, weights = tensors
    result = MSDA.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, 64)
    gradients = MSDA.ms_deform_attn_backward(value, SHAPES, STARTS, locations, weights, gradient(value.dtype), 64)
    assert [tensor.dtype for tensor in (result, *gradients)] == [value.dtype, *dtypes]
    for found, wanted in zip((result, *gradients), expected(tensors), strict=True):
        close([found], [wanted], {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[found.dtype])


def test_sizes_on_the_device_are_read_once(MSDA, monkeypatch):
    """For all layers of a model, which share their tensor."""
    reads, theirs = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or theirs(tensor))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    value, locations, weights = (tensor.detach() for tensor in problem())
    shapes = SHAPES.clone()
    for _ in range(3):
        MSDA.ms_deform_attn_forward(value, shapes, STARTS, locations, weights, 64)
        MSDA.ms_deform_attn_backward(value, shapes, STARTS, locations, weights, gradient(), 64)
    assert len(reads) == 1


def test_a_wrong_gradient_is_named(MSDA):
    value, locations, weights = (tensor.detach() for tensor in problem())
    with pytest.raises(ValueError, match=r"grad_output must have shape .* = \(3, 4, 6\), got \(3, 4\)"):
        MSDA.ms_deform_attn_backward(value, SHAPES, STARTS, locations, weights, gradient()[..., 0], 64)
