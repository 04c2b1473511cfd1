"""mmcv's SyncBatchNorm on one process against PyTorch's batch normalisation."""

import functools

import pytest
import torch
from dropin.mmcv_inputs import random_tensor
from torch import nn

from omniops.dropin import mmcv_ext

EPS, MOMENTUM = 1e-3, 0.3


_random = functools.partial(random_tensor, dtype=torch.float32)


def _oracle(affine: bool = True) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(3, EPS, MOMENTUM, affine).double()
    layer.running_mean.copy_(torch.tensor([1.0, 2, 3]))
    layer.running_var.copy_(torch.tensor([0.5, 2, 1]))
    if affine:
        layer.load_state_dict({"weight": _random(3, seed=2), "bias": _random(3, seed=3)}, strict=False)
    return layer


def _forward(input, weight, bias, running_mean, running_var, group_size=1):
    """As mmcv's Python calls the extension."""
    mean, var, std = (torch.zeros(3) for _ in range(3))
    norm, output = torch.zeros_like(input, dtype=torch.float), torch.zeros_like(input)
    mmcv_ext.sync_bn_forward_mean(input, mean)
    mmcv_ext.sync_bn_forward_var(input, mean, var)
    numbers = {"eps": EPS, "momentum": torch.tensor(MOMENTUM), "group_size": group_size}
    mmcv_ext.sync_bn_forward_output(
        input, mean, var, weight, bias, running_mean, running_var, norm, std, output, **numbers
    )
    return output, norm, std


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(4, 3, 10), (2, 3, 1), (1, 3, 7), (1, 3, 1)])
def test_one_process_is_batch_normalisation(shape, dtype, tolerance):
    input, grad = (5 * _random(*shape) + 30).to(dtype), _random(*shape, seed=1).to(dtype)
    oracle = _oracle()
    wide = input.double().requires_grad_()
    weight, bias = oracle.weight.detach().float(), oracle.bias.detach().float()
    running = oracle.running_mean.float(), oracle.running_var.float()
    alone = shape[0] * shape[2] == 1
    if alone:  # PyTorch refuses one value a channel
        expected = oracle.bias.detach().view(1, 3, 1)
    else:
        expected = oracle(wide)
        wanted = torch.autograd.grad(expected, (wide, oracle.weight, oracle.bias), grad.double())

    output, norm, std = _forward(input, weight, bias, *running)
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    by_weight, by_bias, by_input = torch.zeros(3), torch.zeros(3), torch.zeros_like(input)
    mmcv_ext.sync_bn_backward_param(grad, norm, by_weight, by_bias)
    mmcv_ext.sync_bn_backward_data(grad, weight, by_weight, by_bias, norm, std, by_input)
    if alone:
        assert by_input.abs().max() <= tolerance
        assert torch.allclose(running[1], torch.tensor([0.5, 2, 1]) * (1 - MOMENTUM))
        return
    # The terms of a gradient of the input cancel each other: of two values a channel nearly all is gone.
    terms = (oracle.weight[:, None] * grad / std[:, None]).abs().max()
    scales = terms, *(one.abs().max() for one in wanted[1:])
    for found, one, scale in zip((by_input, by_weight, by_bias), wanted, scales, strict=True):
        assert (found - one).abs().max() <= tolerance * scale
    torch.testing.assert_close(running[0].double(), oracle.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running[1].double(), oracle.running_var, rtol=1e-4, atol=1e-5)


def test_without_weights_and_running_statistics():
    input, oracle = _random(4, 3, 10), _oracle(affine=False)
    output, _, _ = _forward(input, None, None, None, None)
    torch.testing.assert_close(output.double(), oracle(input.double()), rtol=1e-5, atol=1e-5)


def test_the_running_variance_counts_every_process():
    input, running = _random(4, 3, 10), torch.zeros(3)
    _forward(input, torch.ones(3), torch.zeros(3), torch.zeros(3), running, group_size=5)
    expected = input.double().var((0, 2), unbiased=False) * (200 / 199) * MOMENTUM
    torch.testing.assert_close(running.double(), expected, rtol=1e-5, atol=1e-5)


# The real mmcv-lite


def _compare(layer: nn.Module) -> None:
    oracle = nn.BatchNorm2d(3).double()
    oracle.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    for _ in range(2):
        x = _random(4, 3, 5, 6).requires_grad_()
        wide = x.detach().double().requires_grad_()
        found, expected = layer(x), oracle(wide)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        by = torch.autograd.grad(found.sin().sum(), (x, layer.weight, layer.bias))
        wanted = torch.autograd.grad(expected.sin().sum(), (wide, oracle.weight, oracle.bias))
        for one, other in zip(by, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value.double(), oracle.state_dict()[name].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stats_mode", ["default", "N"])
@pytest.mark.parametrize("initialised", [False, True])
def test_mmcvs_module(mmcv, tmp_path, initialised, stats_mode):
    distributed = torch.distributed
    if initialised:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _compare(mmcv.SyncBatchNorm(3, stats_mode=stats_mode))
    finally:
        if initialised:
            distributed.destroy_process_group()
