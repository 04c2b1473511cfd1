"""The operator as PyTorch sees it, and the functions on it: schema, fake kernel, compile, export, errors, areas."""

import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

import omniops
from omniops.backends import cpu
from omniops.backends.reference import connected_components as reference
from omniops.ops import _checks

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)


def noise(*shape, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


@ON_DEVICES
def test_an_example(device):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], device=device)[None, None]
    labels, counts = omniops.connected_components(mask)
    assert labels.tolist() == [[[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [13, 0, 0, 16]]]]
    assert counts.tolist() == [[[[3, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0], [1, 0, 0, 1]]]]
    labels, counts = omniops.connected_components(mask, connectivity=4)
    assert labels.tolist() == [[[[1, 1, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0], [13, 0, 0, 16]]]]
    assert counts.tolist() == [[[[2, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]]]


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(device, dtype, layout):
    mask = noise(2, 1, 5, 7).to(device, dtype)
    if layout == "transposed":
        mask = mask.mT.contiguous().mT
    for connectivity in (4, 8):
        torch.library.opcheck(torch.ops.omniops.connected_components.default, (mask, connectivity))


@pytest.mark.slow
@ON_DEVICES
def test_compile_without_a_graph_break(device):
    def function(logits):
        labels, counts = omniops.connected_components(logits > 0)
        return omniops.fill_holes(logits, 4) * (counts > 2), labels

    compiled = torch.compile(function, fullgraph=True)
    for height in (6, 9):  # the second shape recompiles with dynamic sizes
        logits = torch.randn(2, 1, height, 8, device=device)
        for result, expected in zip(compiled(logits), function(logits), strict=True):
            assert torch.equal(result, expected)


class Areas(torch.nn.Module):
    def forward(self, mask):
        return omniops.connected_components(mask)[1]


def test_export_with_dynamic_sizes():
    n, h, w = (torch.export.Dim(name, min=2, max=4096) for name in "nhw")
    exported = torch.export.export(Areas(), (noise(3, 1, 6, 7),), dynamic_shapes={"mask": {0: n, 2: h, 3: w}})
    assert any(node.target is torch.ops.omniops.connected_components.default for node in exported.graph.nodes)
    other = noise(2, 1, 9, 33)
    assert torch.equal(exported.module()(other), Areas()(other))


@ON_DEVICES
def test_autocast_leaves_it_alone(device):
    mask = noise(1, 1, 6, 7).to(device)
    with torch.autocast(device, torch.bfloat16):
        labels, counts = omniops.connected_components(mask)
    assert labels.dtype == counts.dtype == torch.int32


def test_every_device_without_its_own_kernel_is_served_by_the_reference():
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("omniops::connected_components", "XPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("omniops::connected_components", "MPS")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("omniops::connected_components", "CPU") == cpu.AVAILABLE


@ON_DEVICES
@pytest.mark.parametrize("shape", [(0, 1, 4, 5), (2, 1, 0, 5), (2, 1, 4, 0)])
def test_empty_masks_give_empty_results(device, shape):
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for result in omniops.connected_components(mask):
        assert result.shape == shape
        assert result.dtype == torch.int32
        assert result.device.type == device
    assert omniops.fill_holes(mask.float(), 3).shape == shape
    assert omniops.remove_small_components(mask, 3).shape == shape


def test_more_than_two_to_the_31_pixels_have_a_shape():
    labels, counts = omniops.connected_components(torch.empty(3, 1, 32768, 32768, dtype=torch.bool, device="meta"))
    assert labels.shape == counts.shape == (3, 1, 32768, 32768)
    omniops.connected_components(torch.empty(1, 1, 1, 2**31 - 1, dtype=torch.bool, device="meta"))


M = torch.ones(2, 1, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((M.numpy(), 8), TypeError, "mask must be a torch.Tensor, got ndarray"),
        ((M.float(), 8), TypeError, "mask must be bool or of an integer dtype of 8 to 64 bits, got float32: compare"),
        ((M.cfloat(), 8), TypeError, "mask must be bool or of an integer dtype of 8 to 64 bits, got complex64"),
        ((M.byte().view(torch.bits8), 8), TypeError, "mask must be bool or of an integer dtype of 8 to 64 bits, got b"),
        ((M.byte().view(torch.uint4), 8), TypeError, "mask must be bool or of an integer dtype of 8 to 64 bits, got u"),
        ((M, 8.0), TypeError, "connectivity must be an int, got float"),
        ((M, True), TypeError, "connectivity must be an int, got bool"),
        ((M, 6), ValueError, "connectivity must be 4 or 8, got 6"),
        ((M, 0), ValueError, "connectivity must be 4 or 8, got 0"),
        ((M, -8), ValueError, "connectivity must be 4 or 8, got -8"),
        ((M, 2**64), ValueError, "connectivity must be 4 or 8, got 18446744073709551616"),
        ((M[0], 8), ValueError, "mask must have 4 dimensions (N, C, H, W), got shape (1, 3, 4)"),
        ((M.transpose(0, 1), 8), ValueError, "mask must have shape (N, 1, H, W), got (1, 2, 3, 4): make a batch of"),
        ((M.new_empty((1, 1, 65536, 32768), device="meta"), 8), ValueError, "mask must have H * W below 2**31"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error) as caught:
        omniops.connected_components(*arguments)
    assert message in str(caught.value)


def test_checks_come_before_any_kernel_of_the_raw_operator():
    with pytest.raises(ValueError, match="connectivity must be 4 or 8, got 5"):
        torch.ops.omniops.connected_components(M, 5)
    with pytest.raises(TypeError, match="mask must be bool or of an integer dtype of 8 to 64 bits, got float16"):
        torch.ops.omniops.connected_components(M.half(), 8)


def areas(foreground):
    """The area of each pixel's 8-connected component, by SciPy."""
    result = np.zeros(foreground.shape, np.int64)
    for index in np.ndindex(foreground.shape[:-2]):
        labels, _ = ndimage.label(foreground[index], np.ones((3, 3)))
        result[index] = np.bincount(labels.ravel())[labels] * foreground[index].numpy()
    return torch.from_numpy(result)


@ON_DEVICES
@pytest.mark.parametrize("shape", [(20, 30), (3, 20, 30), (2, 1, 20, 30), (2, 3, 20, 30), (1, 2, 3, 11, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_holes_are_filled(device, shape, dtype):
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.4).to(dtype)
    logits[..., 3:6, 4:8] = 0  # on the threshold is background
    for max_area in (1, 5, 10**6):
        background = logits <= 0
        expected = torch.where(background & (areas(background) <= max_area), torch.tensor(0.1, dtype=dtype), logits)
        result = omniops.fill_holes(logits.to(device), max_area)
        assert result.dtype == dtype
        assert torch.equal(result.cpu(), expected)


@ON_DEVICES
@pytest.mark.parametrize("shape", [(20, 30), (2, 3, 20, 30)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_specks_are_removed(device, shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 - 1
    mask = values.to(dtype) if dtype.is_floating_point else (values.clamp(min=0) * 2).to(dtype)
    foreground, removed = mask > 0, -0.1 if dtype.is_floating_point else 0
    for min_area in (1, 2, 9, 10**6):
        small = foreground & (areas(foreground) < min_area)
        result = omniops.remove_small_components(mask.to(device), min_area)
        assert result.dtype == dtype
        assert torch.equal(result.cpu(), torch.where(small, torch.tensor(removed, dtype=dtype), mask))


@pytest.mark.slow
@ON_DEVICES
def test_specks_of_every_dtype_are_removed_without_a_graph_break(device):
    mask = noise(2, 3, 8, 9).to(device)
    expected = omniops.remove_small_components(mask, 4)
    assert 0 < expected.sum() < mask.sum()
    for dtype in _checks.INTEGERS:
        torch._dynamo.reset()
        compiled = torch.compile(omniops.remove_small_components, fullgraph=True)
        result = compiled(mask.to(dtype), 4)
        assert result.dtype == dtype
        assert torch.equal(result, expected.to(dtype))


FUNCTIONS = pytest.mark.parametrize("function", [omniops.fill_holes, omniops.remove_small_components])
BEYOND_INT32 = (2**31 - 1, 2**31, 2**32 + 1, sys.maxsize)


@pytest.mark.slow
@ON_DEVICES
@FUNCTIONS
def test_areas_that_no_count_reaches(device, function):
    logits = torch.randn(2, 1, 9, 9, device=device)
    compiled = torch.compile(function, fullgraph=True)
    for area in BEYOND_INT32:
        expected = function(logits, 81 + 1)
        assert torch.equal(function(logits, area), expected)
        assert torch.equal(compiled(logits, area), expected)


def test_the_largest_area(monkeypatch):
    """That of a mask of 2**31 - 1 pixels, which takes too much memory to be made here."""
    module = import_module("omniops.ops.connected_components")
    counts = torch.full((1, 1, 3, 4), 2**31 - 1, dtype=torch.int32)
    monkeypatch.setattr(module, "connected_components", lambda mask: (None, counts))
    mask, holes = torch.ones(1, 1, 3, 4, dtype=torch.bool), -torch.ones(1, 1, 3, 4)
    for area in BEYOND_INT32:
        assert (omniops.fill_holes(holes, area) == 0.1).all()
        assert omniops.remove_small_components(mask, area).all() == (area == 2**31 - 1)
    assert torch.equal(omniops.fill_holes(holes, 2**31 - 2), holes)


@FUNCTIONS
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_an_area_that_depends_on_the_size(function, strict):
    class OfTheTenth(torch.nn.Module):
        def forward(self, logits):
            return function(logits, logits.shape[-2] * logits.shape[-1] // 10)

    dynamic = {"logits": {2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}}
    exported = torch.export.export(OfTheTenth(), (torch.randn(2, 1, 7, 9),), dynamic_shapes=dynamic, strict=strict)
    logits = torch.randn(2, 1, 20, 31)
    assert torch.equal(exported.module()(logits), OfTheTenth()(logits))


UNSIGNED = pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])


@ON_DEVICES
@UNSIGNED
def test_specks_of_the_unsigned_dtypes_that_pytorch_half_supports(device, dtype):
    mask = torch.tensor([[300, 0, 0], [0, 0, 9], [0, 0, 9]], dtype=dtype)
    try:
        mask = mask.to(device)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"PyTorch has no {dtype} on {device}: {error}")
    result = omniops.remove_small_components(mask, 2)
    assert result.dtype == dtype
    assert result.tolist() == [[0, 0, 0], [0, 0, 9], [0, 0, 9]]


@UNSIGNED
def test_operators_that_may_lack_the_unsigned_dtypes_never_see_them(dtype):
    class Operators(TorchDispatchMode):
        """Those that got or gave a tensor of the dtype."""

        def __init__(self):
            super().__init__()
            self.called = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if any(isinstance(value, torch.Tensor) and value.dtype == dtype for value in (*args, result)):
                self.called.add(function)
            return result

    mask = torch.tensor([[300, 0, 0], [0, 0, 9]], dtype=dtype)[None, None]
    with Operators() as operators:
        omniops.remove_small_components(mask, 2)
        reference.connected_components(mask, 8)
    assert operators.called <= {torch.ops.aten.view.dtype, torch.ops.aten.detach.default}


def test_negative_integers_are_foreground_and_not_a_number_is_neither():
    assert torch.equal(omniops.remove_small_components(torch.full((3, 3), -1), 9), torch.full((3, 3), -1))
    lonely = torch.full((3, 3), torch.nan)
    for result in (omniops.fill_holes(lonely, 9), omniops.remove_small_components(lonely, 10)):
        assert result.isnan().all()


def test_gradients_reach_what_was_left_alone():
    logits = torch.ones(1, 1, 5, 5).index_put((*torch.tensor([[0], [0], [2], [2]]),), torch.tensor(-1.0))
    for function, untouched in (
        (lambda x: omniops.fill_holes(x, 1), logits > 0),
        (lambda x: omniops.remove_small_components(-x, 2), logits > 0),
    ):
        leaf = logits.clone().requires_grad_()
        function(leaf).sum().backward()
        assert torch.equal(leaf.grad != 0, untouched)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: omniops.fill_holes(M, 3), TypeError, "mask_logits must be of a floating dtype, got bool: pass the lo"),
        (
            lambda: omniops.fill_holes(M.to(torch.float8_e5m2), 3),
            TypeError,
            "mask_logits must be float64, float32, float16 or bfloat16, got float8_e5m2",
        ),
        (lambda: omniops.fill_holes([1.0], 3), TypeError, "mask_logits must be a torch.Tensor, got list"),
        (lambda: omniops.fill_holes(M.float(), 0), ValueError, "max_area must be at least 1, got 0"),
        (lambda: omniops.fill_holes(M.float(), 2.0), TypeError, "max_area must be an int, got float"),
        (lambda: omniops.fill_holes(torch.ones(3), 3), ValueError, "mask_logits must have at least 2 dimensions"),
        (lambda: omniops.remove_small_components(M, 0), ValueError, "min_area must be at least 1, got 0"),
        (lambda: omniops.remove_small_components(M.cfloat(), 1), TypeError, "mask must be bool or of an integer dtype"),
        (
            lambda: omniops.remove_small_components(M.to(torch.float8_e4m3fn), 1),
            TypeError,
            "mask must be float64, float32, float16 or bfloat16, got float8_e4m3fn",
        ),
        (lambda: omniops.remove_small_components(torch.ones(3), 3), ValueError, "mask must have at least 2 dimensions"),
    ],
)
def test_errors_of_the_functions_on_it(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_what_the_error_for_a_mask_says_fills_its_holes():
    mask, max_area = noise(2, 1, 20, 30, density=0.7), 3
    expected = omniops.fill_holes(mask.float(), max_area) > 0
    assert torch.equal(~omniops.remove_small_components(mask == 0, max_area + 1), expected)
    assert not torch.equal(expected, mask)
