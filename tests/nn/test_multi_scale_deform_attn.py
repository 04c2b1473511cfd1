"""MultiScaleDeformableAttention against its formula in plain PyTorch, and against mmcv's module where that is."""

import copy
import importlib
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from omniops.dropin._mmcv import mmcv as _mmcv
from omniops.nn import MultiScaleDeformableAttention
from omniops.nn import multi_scale_deform_attn as attention_module

SHAPES = [(5, 7), (3, 4), (1, 2)]
PIXELS = sum(height * width for height, width in SHAPES)
SIZES = {"embed_dims": 24, "num_heads": 3, "num_levels": 3, "num_points": 2}
BATCH, QUERIES = 2, 6


def made(dtype=torch.float64, **changes):
    """A module of which every parameter counts, in eval mode."""
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(**{**SIZES, "batch_first": True, **changes}).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def problem(dtype=torch.float64, last=2, batch_first=True, queries=QUERIES):
    """What the module is called with, by name."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query, value, identity, query_pos = (
        random(BATCH, queries, 24),
        random(BATCH, PIXELS, 24),
        *(random(BATCH, queries, 24) for _ in range(2)),
    )
    if not batch_first:
        query, value, identity, query_pos = (x.transpose(0, 1) for x in (query, value, identity, query_pos))
    reference_points = torch.rand(BATCH, queries, 3, last, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "query": query,
        "value": value,
        "identity": identity,
        "query_pos": query_pos,
        "reference_points": reference_points,
        "spatial_shapes": SHAPES,
    }


def attend(value, sampling_locations, attention_weights, shapes=SHAPES):
    """Level by level by grid_sample: (N, S, M, D), (N, Q, M, L, P, 2), (N, Q, M, L, P) -> (N, Q, M * D)."""
    n, _, m = attention_weights.shape[:3]
    result = 0
    for level, pixels in enumerate(value.split([height * width for height, width in shapes], 1)):
        maps = pixels.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shapes[level])
        grid = sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        samples = F.grid_sample(maps, grid, align_corners=False).unflatten(0, (n, m))
        result = result + torch.einsum("nmdqp,nqmp->nqmd", samples, attention_weights[:, :, :, level])
    return result.flatten(2)


def formula(module, query, value, identity, query_pos, reference_points, spatial_shapes=SHAPES, key_padding_mask=None):
    """The paper's, and mmcv's around it, with the batch first."""
    n, queries = query.shape[:2]
    m, levels, p = module.num_heads, module.num_levels, module.num_points
    query_with_pos = query + query_pos
    value = module.value_proj(value)
    if key_padding_mask is not None:
        value = value * ~key_padding_mask[..., None]
    offsets = module.sampling_offsets(query_with_pos).view(n, queries, m, levels, p, 2)
    weights = (
        module.attention_weights(query_with_pos)
        .view(n, queries, m, levels * p)
        .softmax(-1)
        .view(n, queries, m, levels, p)
    )
    references = reference_points[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        locations = references + offsets / torch.tensor([(width, height) for height, width in SHAPES])[:, None]
    else:
        locations = references[..., :2] + offsets / p * references[..., 2:] / 2
    return module.output_proj(attend(value.unflatten(2, (m, -1)), locations, weights)) + identity


def moved(inputs, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def with_gradients(function, module, inputs):
    """The result, and the gradients of the tensors given and of the parameters."""
    tensors = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    result = function(**{**inputs, **tensors})
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(result)
    wanted = [*tensors.values(), *module.parameters()]
    return [result, *torch.autograd.grad(result, wanted, weights)]


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        assert_close(one, other.to(one.dtype), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_values_and_gradients_are_the_formulas(last, masked, ratio):
    module, inputs = made(value_proj_ratio=ratio), problem(last=last)
    if masked:
        inputs["key_padding_mask"] = torch.rand(BATCH, PIXELS, generator=torch.Generator().manual_seed(3)) > 0.6
    expected = with_gradients(lambda **arguments: formula(module, **arguments), module, inputs)
    close(with_gradients(module, module, inputs), expected, 1e-12)
    shapes = torch.tensor(SHAPES)
    close(with_gradients(module, module, {**inputs, "spatial_shapes": shapes}), expected, 1e-12)


def test_float32():
    module, inputs = made(torch.float32), problem(torch.float32)
    expected = copy.deepcopy(module).double()
    doubles = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    wanted = with_gradients(lambda **arguments: formula(expected, **arguments), expected, doubles)
    close(with_gradients(module, module, inputs), wanted, 1e-5)


def test_without_batch_first_all_but_masks_and_points_are_transposed():
    first, second = made(), made(batch_first=False)
    inputs, transposed = problem(), problem(batch_first=False)
    mask = torch.zeros(BATCH, PIXELS, dtype=torch.bool)
    mask[0, 3:9] = True
    found = second(**transposed, key_padding_mask=mask)
    assert found.shape == (QUERIES, BATCH, 24)
    assert_close(found.transpose(0, 1), first(**inputs, key_padding_mask=mask), rtol=0, atol=1e-12)


def test_defaults():
    module, inputs = made(), problem()
    query = torch.randn(BATCH, PIXELS, 24, dtype=torch.float64)
    points = torch.rand(BATCH, PIXELS, 1, 2, dtype=torch.float64)  # for all levels
    found = module(query, reference_points=points, spatial_shapes=SHAPES)
    position = torch.zeros_like(query)
    expected = formula(module, query, query, query, position, points.expand(-1, -1, 3, -1))
    assert_close(found, expected, rtol=0, atol=1e-12)
    identity = inputs.pop("identity")
    assert module(**inputs, residual=identity).equal(module(**inputs, identity=identity))
    assert module(**inputs, identity=identity, key=query, key_pos=query, level_start_index=torch.zeros(3)).equal(
        module(**inputs, identity=identity)
    )
    # As Deformable DETR's own module has it.
    alone = module(**inputs, identity=identity.new_zeros(()))
    assert_close(alone + identity, module(**inputs, identity=identity), rtol=0, atol=1e-14)


def test_a_mask_hides_what_is_not_a_number():
    module, inputs = made(), problem()
    mask = torch.zeros(BATCH, PIXELS, dtype=torch.bool)
    mask[1, 20:] = True
    expected = module(**inputs, key_padding_mask=mask)
    inputs["value"] = inputs["value"].clone()
    inputs["value"][1, 20:] = math.nan
    assert module(**inputs, key_padding_mask=mask).equal(expected)
    assert module(**inputs, key_padding_mask=mask.byte()).equal(expected)


def test_dropout_is_of_the_result_and_not_of_the_identity():
    module, inputs = made(dropout=1.0), problem()
    assert module.train()(**inputs).equal(inputs["identity"])
    assert not module.eval()(**inputs).equal(inputs["identity"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_positions_and_weights_are_not_of_half_precision(dtype, tolerance, autocast, monkeypatch):
    """The projections are PyTorch's in half precision; what is between them is as exact as their results."""
    shapes = [(2, 2000), (1, 3000), (1, 1)]
    module = made(torch.float32 if autocast else dtype)
    inputs = problem(torch.float32 if autocast else dtype)
    inputs["spatial_shapes"] = shapes
    x = torch.linspace(0, 900, 7001, dtype=torch.float64).sin()[:, None] + torch.arange(24) / 10
    inputs["value"] = x.expand(BATCH, -1, -1).to(inputs["query"].dtype)
    inputs["reference_points"] = torch.rand(BATCH, QUERIES, 3, 2)  # of float32, as models have them
    calls, operator = [], attention_module.multi_scale_deform_attn
    monkeypatch.setattr(
        attention_module, "multi_scale_deform_attn", lambda *tensors: calls.append(tensors) or operator(*tensors)
    )
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = module(**inputs)
        value, _, locations, weights, _ = calls.pop()
        assert (value.dtype, locations.dtype, weights.dtype) == (dtype, torch.float32, torch.float32)
        assert (weights.flatten(3).sum(-1) - 1).abs().max() < 1e-6
        query = inputs["query"] + inputs["query_pos"]
        heads, sizes = (BATCH, QUERIES, 3), torch.tensor([(width, height) for height, width in shapes])
        offsets = module.sampling_offsets(query).double().view(*heads, 3, 2, 2)
        weights = module.attention_weights(query).double().view(*heads, 6).softmax(-1).view(*heads, 3, 2)
        locations = inputs["reference_points"].double()[:, :, None, :, None] + offsets / sizes[:, None]
        value = module.value_proj(inputs["value"]).double().unflatten(2, (3, -1))
    between = attend(value, locations, weights, shapes)
    with torch.autocast("cpu", dtype, enabled=autocast):
        expected = module.output_proj(between.to(dtype)) + inputs["identity"]
    assert found.dtype == expected.dtype
    close([found], [expected.double()], tolerance)


def test_initialisation_is_of_a_direction_a_head():
    module = MultiScaleDeformableAttention(32, 4, 2, 3)
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(3):
            expected = torch.tensor(direction) * (point + 1.0)
            assert_close(offsets[head, :, point], expected.expand(2, 2), rtol=0, atol=1e-6)
    zeros = (module.sampling_offsets.weight, *module.attention_weights.parameters())
    assert not any(bias.any() for bias in (*zeros, module.value_proj.bias, module.output_proj.bias))
    bound = math.sqrt(6 / (32 + 32))
    for projection in (module.value_proj, module.output_proj):
        assert bound * 0.9 < projection.weight.abs().max() <= bound
    before = copy.deepcopy(module.state_dict())
    module.init_weights()
    assert module.sampling_offsets.bias.equal(before["sampling_offsets.bias"])
    assert not module.value_proj.weight.equal(before["value_proj.weight"])


@pytest.mark.parametrize("shapes", ["list", "tuples of tuples"])
def test_compiled_without_graph_breaks(shapes):
    module, inputs = made(torch.float32), problem(torch.float32)
    inputs["spatial_shapes"] = SHAPES if shapes == "list" else tuple(SHAPES)
    expected = with_gradients(module, module, inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(with_gradients(compiled, module, inputs), expected, 1e-5)


def test_exported():
    module, inputs = made(torch.float32), problem(torch.float32)
    shapes = inputs.pop("spatial_shapes")

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, **tensors):
            return self.attention(**tensors, spatial_shapes=shapes)

    program = torch.export.export(Fixed(), (), inputs)
    assert "omniops.multi_scale_deform_attn" in program.graph_module.code
    assert_close(program.module()(**inputs), module(**inputs, spatial_shapes=shapes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shapes", [SHAPES, torch.tensor(SHAPES)], ids=["list", "tensor of the CPU"])
def test_shapes_may_be_the_cpus_beside_another_device(shapes):
    module, inputs = made(torch.float32).to("meta"), moved(problem(torch.float32), "meta")
    result = module(**{**inputs, "spatial_shapes": shapes})
    assert (result.shape, result.device.type) == (inputs["query"].shape, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("shapes", ["list", "tensor", "tensor of the CPU"])
def test_cuda_is_not_waited_for(shapes):
    """Given a list or a tensor of the CPU, never; given one of the GPU, once."""
    attention, inputs = made(torch.float32).cuda(), moved(problem(torch.float32), "cuda")
    expected = with_gradients(attention, attention, inputs)
    if shapes != "list":
        inputs["spatial_shapes"] = torch.tensor(SHAPES, device="cuda" if shapes == "tensor" else "cpu")
        attention(**inputs)
    grad = torch.ones_like(inputs["query"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(**inputs).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = attention(**inputs)
    graph.replay()
    close([found], expected[:1], 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_cuda_equals_the_cpu():
    attention, inputs = made(torch.float32), problem(torch.float32, last=4)
    expected = with_gradients(attention, attention, inputs)
    attention = copy.deepcopy(attention).cuda()
    found = with_gradients(attention, attention, moved(inputs, "cuda"))
    close([result.cpu() for result in found], expected, 1e-5)


def test_copies_and_pickles():
    module, inputs = made(), problem()
    expected = module(**inputs)
    assert copy.deepcopy(module)(**inputs).equal(expected)
    assert pickle.loads(pickle.dumps(module))(**inputs).equal(expected)
    assert module.half().float()(**problem(torch.float32)).isfinite().all()


@pytest.mark.parametrize("empty", ["queries", "batch"])
def test_empty(empty):
    module, inputs = made(), problem(queries=0 if empty == "queries" else QUERIES)
    if empty == "batch":
        inputs = {name: tensor[:0] if isinstance(tensor, torch.Tensor) else tensor for name, tensor in inputs.items()}
    found = with_gradients(module, module, inputs)
    assert found[0].shape == inputs["query"].shape
    assert all(not tensor.any() for tensor in found[1:])
    assert [tensor.shape for tensor in found[1:]] == [
        tensor.shape for tensor in (*(t for t in inputs.values() if isinstance(t, torch.Tensor)), *module.parameters())
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_heads": 5}, ValueError, "num_heads must divide embed_dims, 24, got 5"),
        (
            {"value_proj_ratio": 0.7},
            ValueError,
            "num_heads must divide the channels of the projected value, 16, got 3",
        ),
        ({"value_proj_ratio": 0}, ValueError, "num_heads must divide the channels of the projected value, 0, got 3"),
        ({"value_proj_ratio": "1"}, TypeError, "value_proj_ratio must be a number, got '1'"),
        ({"value_proj_ratio": math.inf}, ValueError, "value_proj_ratio must be finite, got inf"),
        ({"embed_dims": 0}, ValueError, "embed_dims must be at least 1, got 0"),
        ({"num_levels": 2.0}, TypeError, "num_levels must be an int, got float"),
        ({"num_points": -1}, ValueError, "num_points must be at least 1, got -1"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"batch_first": 1}, TypeError, "batch_first must be a bool, got 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        MultiScaleDeformableAttention(**{**SIZES, **arguments})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor, got list"),
        (
            {"query": torch.zeros(2, 6, 23)},
            ValueError,
            "query must have shape (N, Q, embed_dims) with embed_dims = 24, got (2, 6, 23)",
        ),
        (
            {"value": torch.zeros(49, 24)},
            ValueError,
            "value must have shape (N, S, embed_dims) with embed_dims = 24, got (49, 24)",
        ),
        ({"value": torch.zeros(3, PIXELS, 24)}, ValueError, "value must have the batch of query, N = 2, got 3"),
        ({"reference_points": None}, TypeError, "reference_points must be a torch.Tensor, got NoneType"),
        (
            {"reference_points": torch.zeros(2, 6, 3, 3)},
            ValueError,
            "reference_points must have shape (N, Q, L, 2 or 4) with N, Q, L = (2, 6, 3), got (2, 6, 3, 3)",
        ),
        (
            {"reference_points": torch.zeros(2, 6, 2, 2)},
            ValueError,
            "reference_points must have shape (N, Q, L, 2 or 4) with N, Q, L = (2, 6, 3), got (2, 6, 2, 2)",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 4) > 0},
            ValueError,
            f"key_padding_mask must have shape (N, S) = (2, {PIXELS}), got (2, 4)",
        ),
        (
            {"identity": torch.zeros(2, 5, 24)},
            ValueError,
            "identity must have the shape of query, (2, 6, 24), got (2, 5, 24)",
        ),
        (
            {"query_pos": torch.zeros(1, 2, 6, 24)},
            ValueError,
            "query_pos must have the shape of query, (2, 6, 24), got (1, 2, 6, 24)",
        ),
        ({"identity": 1.0}, TypeError, "identity must be a torch.Tensor, got float"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a torch.Tensor, got list"),
        *(
            (
                {name: problem()[name].to("meta")},
                ValueError,
                f"{name} must be on the device of query, cpu, got meta: move it there with {name}.to(query.device)",
            )
            for name in ("value", "identity", "query_pos", "reference_points")
        ),
        ({"spatial_shapes": SHAPES[:2]}, ValueError, "spatial_shapes must have num_levels = 3 rows, got 2"),
        ({"spatial_shapes": torch.tensor(SHAPES)[0]}, ValueError, "spatial_shapes must have shape (L, 2), got (2,)"),
    ],
)
def test_wrong_inputs_are_named(changes, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        made()(**{**problem(), **changes})


def test_wrong_sizes_are_named():
    module = made()
    with pytest.raises(TypeError, match=r"^spatial_shapes must be .* got None$"):
        module(**{**problem(), "spatial_shapes": None})
    with pytest.raises(ValueError, match=r"^value must have the 57 pixels of spatial_shapes .*, got"):
        module(**{**problem(), "spatial_shapes": [(5, 7), (3, 4), (5, 2)]})
    with pytest.raises(ValueError, match=r"^query must have shape \(Q, N, embed_dims\)"):
        made(batch_first=False)(**{**problem(), "query": torch.zeros(2, 6, 23)})


# The real mmcv-lite


@pytest.fixture
def theirs():
    """mmcv's module, on mmcv's own composition."""
    pytest.importorskip("mmcv", reason="mmcv-lite is not installed")
    was = _mmcv.enabled()
    _mmcv.enable(None)  # mmcv.ops cannot be imported without
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    _mmcv.disable()
    yield module.MultiScaleDeformableAttention
    if was:
        _mmcv.enable(None)


ARGUMENTS = [
    {},
    {"embed_dims": 48, "num_heads": 3, "num_levels": 2, "num_points": 3},
    {"embed_dims": 32, "num_heads": 2, "value_proj_ratio": 0.5, "batch_first": True, "dropout": 0.0},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_parameters_are_mmcvs(theirs, arguments):
    torch.manual_seed(5)
    expected = theirs(**arguments)
    torch.manual_seed(5)
    module = MultiScaleDeformableAttention(**arguments)
    assert list(module.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert module.state_dict()[name].equal(value), name
    assert [name for name, _ in module.named_modules()] == [name for name, _ in expected.named_modules()]
    for name in ("embed_dims", "num_heads", "num_levels", "num_points", "im2col_step", "batch_first", "norm_cfg"):
        assert getattr(module, name) == getattr(expected, name)


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_results_and_gradients_are_mmcvs(theirs, last, batch_first):
    module = made(batch_first=batch_first).train()
    expected = theirs(**SIZES, batch_first=batch_first, dropout=0.0).double()
    expected.load_state_dict(module.state_dict(), strict=True)
    module.dropout.p = 0.0
    inputs = problem(last=last, batch_first=batch_first)
    inputs["key_padding_mask"] = torch.rand(BATCH, PIXELS, generator=torch.Generator().manual_seed(3)) > 0.8
    inputs["spatial_shapes"] = torch.tensor(SHAPES)
    inputs["level_start_index"] = torch.tensor([0, 35, 47])
    close(with_gradients(module, module, inputs), with_gradients(expected, expected, inputs), 1e-12)
    inputs.pop("identity")
    inputs.pop("query_pos")
    close(with_gradients(module, module, inputs), with_gradients(expected, expected, inputs), 1e-12)
