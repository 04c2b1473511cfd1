"""mmcv's carafe and carafe_naive against unfolded windows."""

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import EMPTY, assert_near, random_tensor
from torch import Tensor

from omniops.dropin import mmcv_ext


def _carafe(features: Tensor, masks: Tensor, k: int, groups: int, scale: int) -> Tensor:
    n, c, h, w = features.shape
    windows = F.unfold(features, k, padding=k // 2).view(n, c * k * k, h, w)
    windows = windows.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    windows = windows.view(n, groups, c // groups, k * k, h * scale, w * scale)
    return (windows * masks.view(n, groups, 1, k * k, h * scale, w * scale)).sum(3).flatten(1, 2)


@pytest.mark.parametrize("naive", [False, True])
def test_carafe(naive):
    sizes = (3, 2, 2)
    features, masks = random_tensor(2, 4, 3, 5).requires_grad_(), random_tensor(2, 18, 6, 10, seed=1).requires_grad_()
    expected = _carafe(features, masks, *sizes)
    grad = random_tensor(*expected.shape, seed=2)
    by_features, by_masks = torch.autograd.grad(expected, (features, masks), grad)

    output, again = torch.zeros_like(expected), torch.zeros_like(features)
    grads = torch.zeros_like(features), torch.zeros_like(masks)
    if naive:
        mmcv_ext.carafe_naive_forward(features, masks, output, *sizes)
        mmcv_ext.carafe_naive_backward(grad, features, masks, *grads, *sizes)
    else:
        mmcv_ext.carafe_forward(features, masks, again, EMPTY, EMPTY, output, *sizes)
        mmcv_ext.carafe_backward(grad, again, masks, *(EMPTY,) * 4, *grads, *sizes)
    assert_near(output, expected)
    assert_near(grads[0], by_features)
    assert_near(grads[1], by_masks)


def test_autocast_leaves_the_kernels_alone():
    features, masks = random_tensor(1, 4, 3, 3).float(), random_tensor(1, 9, 6, 6).float()
    output = torch.zeros(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mmcv_ext.carafe_naive_forward(features, masks, output, 3, 1, 2)
    assert_near(output, _carafe(features, masks, 3, 1, 2), 1e-5)
