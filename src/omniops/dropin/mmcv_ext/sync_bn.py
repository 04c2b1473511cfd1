"""The steps of mmcv's SyncBatchNorm between which it sums over processes: on one process, batch normalisation.

``input`` and ``output`` are (N, C, L), statistics (C,) and in float32.
"""

from __future__ import annotations

from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel


@kernel
def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Fill ``mean`` with that of this process."""
    mean.copy_(accumulated(input).mean((0, 2)))


@kernel
def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Fill ``var`` with the mean square around ``mean``, that of all processes."""
    var.copy_((input - mean[:, None]).square().mean((0, 2)))


@kernel
def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Fill ``norm``, ``std`` and ``output``, and move the running statistics, where there are some."""
    std.copy_((var + eps).sqrt())
    norm.copy_((input - mean[:, None]) / std[:, None])
    result = norm
    if weight is not None and bias is not None:
        result = norm * weight[:, None] + bias[:, None]
    output.copy_(result)
    if running_mean is not None and running_var is not None:
        count = input.shape[0] * input.shape[2] * group_size
        unbiased = var * (count / (count - 1)) if count > 1 else var
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(momentum * batch + (1 - momentum) * running)


@kernel
def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Fill the gradients of weight and bias."""
    grad = accumulated(grad_output)
    grad_weight.copy_((grad * norm).sum((0, 2)))
    grad_bias.copy_(grad.sum((0, 2)))


@kernel
def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Fill ``grad_input``; the gradients of weight and bias are the means of all processes."""
    count = norm.shape[0] * norm.shape[2]
    means = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_(weight[:, None] * (accumulated(grad_output) - means) / std[:, None])
