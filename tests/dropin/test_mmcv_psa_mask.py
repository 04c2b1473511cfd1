"""mmcv's psamask against loops over positions and masks."""

import importlib
import itertools

import pytest
import torch
from dropin.mmcv_inputs import random_tensor

from omniops.dropin import mmcv_ext
from omniops.dropin._mmcv import mmcv as _mmcv

COLLECT, DISTRIBUTE = 0, 1
# The map's height and width, and the mask's: smaller and larger than the map, even and odd.
SIZES = [((4, 5), (3, 3)), ((3, 6), (5, 11)), ((4, 3), (7, 5)), ((5, 4), (2, 4)), ((1, 1), (3, 1)), ((2, 5), (9, 15))]


def _attention(masks, psa_type, size, mask_size):
    (height, width), (h_mask, w_mask) = size, mask_size
    rows = []
    for p, q in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        # p is the channel of the result and q its position: the mask of (h, w) has a value for (y, x)
        (y, x), (h, w) = (p, q) if psa_type == COLLECT else (q, p)
        v, u = y - h + (h_mask - 1) // 2, x - w + (w_mask - 1) // 2
        inside = 0 <= v < h_mask and 0 <= u < w_mask
        rows.append(masks[:, v * w_mask + u, h, w] if inside else masks.new_zeros(len(masks)))
    return torch.stack(rows, 1).view(len(masks), height * width, height, width)


def _numbers(size, mask_size):
    half = {"half_h_mask": (mask_size[0] - 1) // 2, "half_w_mask": (mask_size[1] - 1) // 2}
    named = {"h_feature": size[0], "w_feature": size[1], "h_mask": mask_size[0], "w_mask": mask_size[1]}
    return {"num_": 2, **named, **half}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("psa_type", [COLLECT, DISTRIBUTE])
@pytest.mark.parametrize(("size", "mask_size"), SIZES)
def test_forward_and_backward(size, mask_size, psa_type, dtype):
    masks = random_tensor(2, mask_size[0] * mask_size[1], *size).to(dtype).requires_grad_()
    expected = _attention(masks, psa_type, size, mask_size)
    grad = random_tensor(*expected.shape, seed=1).to(dtype)
    (by_masks,) = torch.autograd.grad(expected, masks, grad)
    output, by_input = torch.full_like(expected, torch.nan), torch.full_like(by_masks, torch.nan)
    mmcv_ext.psamask_forward(masks.detach(), output, psa_type=psa_type, **_numbers(size, mask_size))
    mmcv_ext.psamask_backward(grad, by_input, psa_type=psa_type, **_numbers(size, mask_size))
    assert output.equal(expected)
    assert by_input.equal(by_masks)


@pytest.mark.parametrize("psa_type", [COLLECT, DISTRIBUTE])
def test_what_the_masks_do_not_reach_stays_zero_where_numbers_are_not_finite(psa_type):
    masks = torch.full((2, 9, 4, 5), torch.inf)
    output = torch.empty(2, 20, 4, 5)
    mmcv_ext.psamask_forward(masks, output, psa_type=psa_type, **_numbers((4, 5), (3, 3)))
    assert not output.isnan().any()
    assert output.isinf().any()


@pytest.mark.parametrize("psa_type", [COLLECT, DISTRIBUTE])
def test_other_memory_layouts(psa_type):
    masks = random_tensor(2, 9, 4, 5)
    outputs = [torch.empty(2, 20, 4, 5).double() for _ in range(2)]
    grads = [torch.empty(2, 9, 4, 5).double() for _ in range(2)]
    grad = random_tensor(2, 20, 4, 5)
    for i, layout in enumerate((torch.contiguous_format, torch.channels_last)):
        ours = {"psa_type": psa_type, **_numbers((4, 5), (3, 3))}
        mmcv_ext.psamask_forward(masks.contiguous(memory_format=layout), outputs[i], **ours)
        mmcv_ext.psamask_backward(grad.contiguous(memory_format=layout), grads[i], **ours)
    assert outputs[0].equal(outputs[1])
    assert grads[0].equal(grads[1])


def test_mmcvs_module():
    pytest.importorskip("mmcv", reason="mmcv-lite is not installed")
    was = _mmcv.enabled()
    _mmcv.enable(None)
    mmcv = importlib.import_module("mmcv.ops")
    for (size, mask_size), name in itertools.product(SIZES[:3], ("collect", "distribute")):
        masks = random_tensor(2, mask_size[0] * mask_size[1], *size).requires_grad_()
        module = mmcv.PSAMask(name, mask_size)
        psa_type = COLLECT if name == "collect" else DISTRIBUTE
        assert module(masks).equal(_attention(masks, psa_type, size, mask_size))
        # mmcv's backward returns a gradient too many for gradcheck's other checks: one backward is compared
        (found,) = torch.autograd.grad(module(masks).square().sum(), masks)
        (wanted,) = torch.autograd.grad(_attention(masks, psa_type, size, mask_size).square().sum(), masks)
        assert found.equal(wanted)
    if not was:
        _mmcv.disable()
