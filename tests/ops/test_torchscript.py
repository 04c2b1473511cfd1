"""Every public function compiled and traced by torch.jit: results and gradients as Python's, at other sizes too."""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor
from torchscripts import IGNORED, assert_as_eager

import omniops

pytestmark = pytest.mark.filterwarnings(*IGNORED)

SIZES = ((2, 6, 4), (1, 5, 7), (3, 4, 9))
"""N, H and W of the calls."""


def tensors(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def upsampling(dtype, n, h, w):
    return *tensors(dtype, (n, 4, h, w), (n, 18, 2 * h, 2 * w)), 3, 2, 2


def downsampling(dtype, n, h, w):
    return *tensors(dtype, (n, 4, h, w), (n, 18, (h + 1) // 2, (w + 1) // 2)), 3, 2, 2


def convolution(dtype, n, h, w):
    x, offset, weight, bias, mask = tensors(dtype, (n, 4, h, w), (n, 18, h, w), (6, 2, 3, 3), (6,), (n, 9, h, w))
    return x, offset, weight, bias, 1, (1, 1), 1, mask


def modulated(dtype, n, h, w):
    x, offset, weight, bias, _, padding, _, mask = convolution(dtype, n, h, w)
    return x, offset, mask, weight, bias, 1, padding, 1, 2, 1


def attention(dtype, n, h, w):
    value, locations, weights = tensors(dtype, (n, h * w + 2, 2, 4), (n, 5, 2, 2, 3, 2), (n, 5, 2, 2, 3))
    return value, torch.tensor([[h, w], [1, 2]]), locations, weights, None, "default"


def uneven_attention(dtype, n, h, w):
    value, locations, weights = tensors(dtype, (n, h * w + 2, 2, 4), (n, 5, 2, 4, 2), (n, 5, 2, 4))
    return value, torch.tensor([[h, w], [1, 2]], dtype=torch.int32), locations, weights, [3, 1], "discrete"


def pixels(dtype, n, h, w):
    (random,) = tensors(torch.float32, (n, 1, h, w))
    return (random > 0.4).to(dtype), 4


def pixels_and_area(dtype, n, h, w):
    return pixels(dtype, n, h, w)[0], 3


def logits_and_area(dtype, n, h, w):
    (random,) = tensors(torch.float32, (n, 2, h, w))
    return (random.detach() - 0.5).to(dtype).requires_grad_(), 3


FLOATING = (torch.float32, torch.float16)
CASES = {
    "carafe": [(upsampling, FLOATING)],
    "carafe_downsample": [(downsampling, FLOATING)],
    "carafe_naive": [(upsampling, FLOATING)],
    "connected_components": [(pixels, (torch.bool, torch.uint8, torch.int64))],
    "deform_conv2d": [(convolution, FLOATING)],
    "fill_holes": [(logits_and_area, FLOATING)],
    "modulated_deform_conv2d": [(modulated, FLOATING)],
    "multi_scale_deform_attn": [(attention, FLOATING), (uneven_attention, FLOATING)],
    "remove_small_components": [
        (logits_and_area, FLOATING), (pixels_and_area, (torch.bool, torch.int32, torch.uint16, torch.uint64)),
    ],
}  # fmt: skip
"""The arguments of each function, all of them, as the file of a function has no defaults, and of which dtypes."""
NOT_OF_TENSORS = {"decompositions", "disable", "enable"}
EACH = [
    pytest.param(getattr(omniops, name), partial(arguments, dtype), id=f"{name}-{arguments.__name__}-{dtype}")
    for name, cases in CASES.items()
    for arguments, dtypes in cases
    for dtype in dtypes
]


def test_every_function_is_among_them():
    functions = {name for name in omniops.__all__ if inspect.isfunction(getattr(omniops, name))}
    assert functions - NOT_OF_TENSORS == set(CASES)


@pytest.mark.parametrize(("function", "arguments"), EACH)
def test_script(function, arguments):
    assert_as_eager(torch.jit.script(function), function, [arguments(*size) for size in SIZES])


@pytest.mark.parametrize(("function", "arguments"), EACH)
def test_trace(function, arguments):
    example = arguments(*SIZES[0])

    def of_tensors(*tensors):
        given = iter(tensors)
        return function(*[next(given) if isinstance(arg, Tensor) else arg for arg in example])

    calls = [[arg for arg in arguments(*size) if isinstance(arg, Tensor)] for size in SIZES]
    traced = torch.jit.trace(of_tensors, tuple(calls[0]))
    assert "omniops::" in str(traced.inlined_graph)
    assert_as_eager(traced, of_tensors, calls)


def one_number(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return omniops.deform_conv2d(x, offset, weight, padding=1)


def pairs(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return omniops.deform_conv2d(x, offset, weight, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1))


def named(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return omniops.deform_conv2d(x, offset, weight, padding="same")


def none(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return omniops.deform_conv2d(x, offset[:, :, 2:, 2:], weight, padding="valid")


def uneven(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Padding of which one side has a zero more."""
    return omniops.deform_conv2d(x, offset[:, :8], weight[:, :, :2, 1:], padding="same")


def masked(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    mask = offset[:, ::2].sigmoid()
    return omniops.modulated_deform_conv2d(x, offset, mask, weight, padding="same", groups=2)


@pytest.mark.parametrize("function", [one_number, pairs, named, none, uneven, masked])
def test_numbers_and_names_in_a_function_of_the_users(function):
    calls = [convolution(torch.float32, *size)[:3] for size in SIZES]
    assert_as_eager(torch.jit.script(function), function, calls)
    assert_as_eager(torch.jit.trace(function, tuple(calls[0])), function, calls)


def pyramid(fine: Tensor, coarse: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    value = torch.cat([fine.flatten(2), coarse.flatten(2)], 2).transpose(1, 2).unflatten(2, (2, 4))
    sizes = [(fine.shape[2], fine.shape[3]), (coarse.shape[2], coarse.shape[3])]
    return omniops.multi_scale_deform_attn(value, sizes, locations, weights)


def test_attention_to_maps_of_any_size():
    calls = [
        tensors(torch.float32, (n, 8, h, w), (n, 8, h - 1, w + 1), (n, 5, 2, 2, 3, 2), (n, 5, 2, 2, 3))
        for n, h, w in SIZES
    ]
    assert_as_eager(torch.jit.script(pyramid), pyramid, calls)
    assert_as_eager(torch.jit.trace(pyramid, tuple(calls[0])), pyramid, calls)


def attention_to_list(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, method: str) -> Tensor:
    return omniops.multi_scale_deform_attn(
        value, [(2, 3), (1, 2)], sampling_locations, attention_weights, [3, 3], method=method
    )


X, OFFSET, WEIGHT, BIAS, *_, MASK = convolution(torch.float32, 1, 6, 4)
VALUE, SHAPES, LOCATIONS, WEIGHTS, *_ = attention(torch.float32, 1, 2, 3)
FEATURES, MASKS, *_ = upsampling(torch.float32, 1, 3, 3)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (omniops.carafe, (FEATURES, MASKS, 4, 2, 2), "kernel_size must be odd, got 4"),
        (omniops.carafe, (FEATURES, MASKS.double(), 3, 2, 2), "masks must have the dtype of features"),
        (omniops.carafe_downsample, (FEATURES, MASKS, 3, 2, 2), "masks must have shape"),
        (omniops.connected_components, (FEATURES[:, :1] > 0, 6), "connectivity must be 4 or 8, got 6"),
        (omniops.connected_components, (FEATURES[:, :1],), "mask must be bool or of an integer dtype"),
        (omniops.deform_conv2d, (X, OFFSET, WEIGHT, BIAS, 0), "stride must be at least 1"),
        (omniops.deform_conv2d, (X, OFFSET, WEIGHT, BIAS, 1, "full"), "padding must be 'valid', 'same', an int or two"),
        (omniops.deform_conv2d, (X, OFFSET, WEIGHT, BIAS, 2, "same"), "stride must be 1 with padding='same'"),
        (omniops.deform_conv2d, (X, OFFSET, WEIGHT[0], BIAS, 1, "same"), "weight must have 4 dimensions"),
        (omniops.modulated_deform_conv2d, (X, OFFSET, MASK, WEIGHT, BIAS, 1, 1), "weight must have shape"),
        (omniops.modulated_deform_conv2d, (X, OFFSET, MASK, WEIGHT, BIAS, 1, 1, 1, 2, 2), "offset must have deform_gr"),
        (omniops.multi_scale_deform_attn, (VALUE, SHAPES[0], LOCATIONS, WEIGHTS), "spatial_shapes must have shape"),
        (omniops.multi_scale_deform_attn, (VALUE, SHAPES / 1, LOCATIONS, WEIGHTS), "spatial_shapes must be of int"),
        (omniops.multi_scale_deform_attn, (VALUE, [(2, 3)], LOCATIONS, WEIGHTS), "attention_weights must have shape"),
        (omniops.multi_scale_deform_attn, (VALUE, [(2, 3)] * 2, LOCATIONS, WEIGHTS), "value must have the 12 pixels"),
        (attention_to_list, (VALUE, LOCATIONS, WEIGHTS, "nearest"), "method must be 'default' or 'discrete'"),
        (omniops.fill_holes, (X, 0), "max_area must be at least 1, got 0"),
        (omniops.fill_holes, (X > 0, 1), "mask_logits must be float64, float32"),
        (omniops.fill_holes, (BIAS, 1), "mask_logits must have at least 2 dimensions"),
        (omniops.remove_small_components, (X, 0), "min_area must be at least 1, got 0"),
        (omniops.remove_small_components, (X.detach().cfloat(), 1), "mask must be bool or of an integer dtype"),
    ],
)
def test_wrong_arguments(function, args, message):
    """Raised as TorchScript raises all errors, with the words of the check."""
    with pytest.raises((RuntimeError, torch.jit.Error), match=message):
        torch.jit.script(function)(*args)
