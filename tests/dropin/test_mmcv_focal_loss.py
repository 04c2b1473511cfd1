"""mmcv's focal losses against the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import EMPTY, assert_near, random_tensor

from omniops.dropin import mmcv_ext

ALPHA, GAMMA = 0.3, 1.7


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted):
    logits, target = (3 * random_tensor(6, 4)).requires_grad_(), torch.tensor([0, 3, 4, 1, 1, 4])  # 4: background
    weight = torch.tensor([0.5, 2, 1, 3], dtype=torch.float64) if weighted else EMPTY.double()
    truth = F.one_hot(target, 5)[:, :4].double()
    p = logits.sigmoid()
    balance = (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * (truth * (1 - p) + (1 - truth) * p) ** GAMMA
    expected = balance * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if weighted:  # that of the row's class, for every column; the background has none
        expected = expected * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    (wanted,) = torch.autograd.grad(expected.sum(), logits)

    output, by_input = torch.zeros_like(logits), torch.zeros_like(logits)
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, weight, output, GAMMA, ALPHA)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, weight, by_input, GAMMA, ALPHA)
    assert_near(output, expected)
    assert_near(by_input, wanted)


def test_sigmoid_focal_loss_of_extreme_logits_is_finite():
    logits, target = torch.tensor([[-200.0, 200.0], [200.0, -200.0]]), torch.tensor([0, 0])
    output, by_input = torch.zeros(2, 2), torch.zeros(2, 2)
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, EMPTY, output, 2.0, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, EMPTY, by_input, 2.0, 0.25)
    least = -math.log(torch.finfo(torch.float32).tiny)
    assert_near(output, torch.tensor([[0.25 * least, 0.75 * least], [0, 0]]), 1e-5)
    assert_near(by_input, torch.tensor([[-0.25, 0.75], [0, 0]]), 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted):
    logits, target = random_tensor(6, 4).requires_grad_(), torch.tensor([0, 3, -1, 1, 1, 2])
    weight = torch.tensor([0.5, 2, 1, 3], dtype=torch.float64) if weighted else EMPTY.double()
    p = logits.softmax(1)
    picked = p[range(6), target.clamp(min=0)]
    expected = -ALPHA * (1 - picked) ** GAMMA * picked.log() * (target >= 0)
    if weighted:
        expected = expected * weight[target]
    (wanted,) = torch.autograd.grad(expected.sum(), logits)

    output, buffer, by_input = torch.zeros(6).double(), torch.zeros(6).double(), torch.zeros_like(logits)
    mmcv_ext.softmax_focal_loss_forward(p, target, weight, output, GAMMA, ALPHA)
    mmcv_ext.softmax_focal_loss_backward(p, target, weight, buffer, by_input, GAMMA, ALPHA)
    assert_near(output, expected)
    assert_near(by_input, wanted)
