"""mmcv's MaskedConv2d: a convolution of the positions that a mask has, and its errors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import assert_near, random_tensor

from omniops.dropin import mmcv_ext
from omniops.dropin._mmcv import mmcv as _mmcv

_random = functools.partial(random_tensor, dtype=torch.float32)


def _by_hand(features, mask, weight, bias, padding):
    """What mmcv's Python does between the two functions of its extension."""
    y, x = (mask[0] > 0).nonzero(as_tuple=True)
    size = [side + 2 * padding - weight.shape[2] + 1 for side in features.shape[2:]]
    output = features.new_zeros(1, len(weight), *size)
    columns = features.new_zeros(weight[0].numel(), len(y))
    numbers = {"kernel_h": weight.shape[2], "kernel_w": weight.shape[3], "pad_h": padding, "pad_w": padding}
    mmcv_ext.masked_im2col_forward(features, y, x, columns, **numbers)
    product = torch.addmm(bias[:, None], weight.flatten(1), columns)
    mmcv_ext.masked_col2im_forward(product, y, x, output, height=size[0], width=size[1], channels=len(weight))
    return output


@pytest.mark.parametrize("padding", [(1, 2), (0, 0)])
def test_masked_convolution(padding):
    input, weight = random_tensor(1, 3, 6, 7), random_tensor(4, 3, 3, 5)
    expected = F.conv2d(input, weight, padding=padding)
    mask = torch.rand(expected.shape[2:], generator=torch.Generator().manual_seed(0)) > 0.5
    y, x = mask.nonzero(as_tuple=True)
    columns, output = torch.full((45, len(y)), torch.nan).double(), torch.zeros_like(expected)
    mmcv_ext.masked_im2col_forward(input, y, x, columns, 3, 5, *padding)
    mmcv_ext.masked_col2im_forward(weight.flatten(1) @ columns, y, x, output, *mask.shape, 4)
    assert_near(output, expected * mask)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_masked_convolution_under_autocast(padding, autocast):
    features, weight, bias = _random(1, 3, 6, 7), _random(4, 3, 3, 3, seed=1), _random(4, seed=2)
    mask = torch.zeros(1, 6, 7)
    mask[:, :4, :5] = (_random(1, 4, 5, seed=3) > 0).float()  # within the result, whatever the padding
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = _by_hand(features, mask, weight, bias, padding)
    assert found.dtype == torch.float32
    unmasked = F.conv2d(features.double(), weight.double(), bias.double(), padding=padding)
    kept = torch.zeros(unmasked.shape[2:])
    kept[:4, :5] = mask[0, :4, :5]
    tolerance = 1e-5 if autocast is None else {torch.bfloat16: 2e-2, torch.float16: 2e-3}[autocast]
    assert (found - unmasked * kept).abs().max() <= tolerance * unmasked.abs().max()


@pytest.mark.parametrize(("position", "said"), [((4, 0), "row 4"), ((0, 6), "column 6")])
def test_a_mask_beyond_the_result_is_refused(position, said):
    features, weight, mask = _random(1, 3, 6, 7), _random(4, 3, 3, 3, seed=1), torch.zeros(1, 6, 7)
    mask[(0, *position)] = 1
    message = f"^mask must be 0 outside of the result, which has 4 rows and 5 columns, got a positive number in {said}"
    with pytest.raises(ValueError, match=message):
        _by_hand(features, mask, weight, torch.zeros(4), 0)


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"^features must have the 2 channels of weight.shape\[1\], .* got 4$"):
        _by_hand(_random(1, 4, 6, 7), torch.ones(1, 6, 7), _random(4, 2, 3, 3), torch.zeros(4), 1)


# The real mmcv-lite


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mmcvs_module(mmcv, bias, autocast):
    layer = mmcv.MaskedConv2d(2, 3, 3, padding=1, bias=bias)
    x, mask = torch.randn(1, 2, 5, 6), torch.rand(1, 5, 6) > 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x, mask.float())
    assert found.dtype == torch.float32
    wanted = layer(x) * mask
    assert (found - wanted).abs().max() <= (2e-2 if autocast else 1e-5) * wanted.abs().max()
    assert mmcv.masked_conv2d(x, mask.float(), layer.weight, None, 1).shape == (1, 3, 5, 6)


def test_mmcvs_module_refuses_by_name_what_it_would_leave_out(mmcv):
    x, mask = torch.randn(1, 2, 5, 6), torch.ones(1, 5, 6)
    for name, value in (("stride", 2), ("dilation", 2), ("groups", 2), ("padding", "same")):
        layer = mmcv.MaskedConv2d(2, 4, 3, **{"padding": 1, name: value})
        assert layer(x).dim() == 4
        with pytest.raises(ValueError, match=f"^{name} must be"):
            layer(x, mask)
    layer = mmcv.MaskedConv2d(2, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"^features and mask must have shapes .* and \(1, 4, 6\)$"):
        layer(x, mask[:, :4])
    with pytest.raises(ValueError, match=r"^mask must be 0 outside of the result"):
        mmcv.MaskedConv2d(2, 4, 3)(x, mask)


def test_mmcvs_module_is_its_own_again(mmcv):
    layer = mmcv.MaskedConv2d(2, 4, 3, padding=1)
    _mmcv.disable()
    with pytest.raises(AssertionError):
        layer(torch.randn(1, 2, 5, 6), torch.ones(1, 4, 6))
    _mmcv.enable(None)
    with pytest.raises(ValueError, match="features and mask"):
        layer(torch.randn(1, 2, 5, 6), torch.ones(1, 4, 6))
