"""CARAFE in plain PyTorch; ``omniops.ops.carafe`` has the formula.

Each function is differentiable by autograd to any order, and loops over the k*k taps: a tap is a strided slice of the
padded features, so that no copy of the features is made for it. The letters are n batch, g group, c channel of the
group, y and x centres, a and b the result's place in its centre's block.
"""

import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated, accumulator, finish


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    n, c = features.shape[:2]
    weights = _blocks(masks, group_size, scale_factor).unflatten(2, (kernel_size, kernel_size))
    padded = _padded(features, kernel_size, group_size)
    out = weights.new_zeros((n, group_size, c // group_size, *weights.shape[4:]), dtype=accumulator(features))
    for u in range(kernel_size):
        for v in range(kernel_size):
            tap = _tap(padded, u, v, weights, stride)[..., :, None, :, None]
            out.addcmul_(tap, weights[:, :, None, u, v].to(out.dtype))
    return finish(out.flatten(5, 6).flatten(3, 4).flatten(1, 2), features)


def carafe_backward_features(
    grad: Tensor,
    masks: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H, W)."""
    n, c = grad.shape[:2]
    pad = kernel_size // 2
    weights = _blocks(masks, group_size, scale_factor).unflatten(2, (kernel_size, kernel_size))
    blocks = accumulated(_blocks(grad, group_size, scale_factor))
    padded = blocks.new_zeros((n, group_size, c // group_size, height + 2 * pad, width + 2 * pad))
    for u in range(kernel_size):
        for v in range(kernel_size):
            block_sums = (blocks * weights[:, :, None, u, v].to(blocks.dtype)).sum(4).sum(5)
            _tap(padded, u, v, weights, stride).add_(block_sums)
    out = padded[..., pad : pad + height, pad : pad + width].flatten(1, 2)
    return finish(out, grad)


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    blocks = accumulated(_blocks(grad, group_size, scale_factor))
    padded = _padded(features, kernel_size, group_size)
    n, _, _, *shape = blocks.shape
    out = grad.new_empty((n, group_size, kernel_size, kernel_size, *shape))
    for u in range(kernel_size):
        for v in range(kernel_size):
            tap = _tap(padded, u, v, blocks, stride)[..., :, None, :, None]
            out[:, :, u, v] = (blocks * tap).sum(2)
    return finish(out.flatten(6, 7).flatten(4, 5).flatten(1, 3), grad)


def carafe_backward(
    grad: Tensor, features: Tensor | None, masks: Tensor | None, height: int, width: int, *numbers: int
) -> tuple[Tensor, Tensor]:
    """The gradients of features, where there are masks, and of masks, where there are features."""
    return (
        grad.new_empty(0) if masks is None else carafe_backward_features(grad, masks, height, width, *numbers),
        grad.new_empty(0) if features is None else carafe_backward_masks(grad, features, *numbers),
    )


def _blocks(tensor: Tensor, group_size: int, scale_factor: int) -> Tensor:
    """(N, G*c, y*s, x*s) -> (N, G, c, y, s, x, s)."""
    n, channels, height, width = tensor.shape
    s = scale_factor
    return tensor.reshape(n, group_size, channels // group_size, height // s, s, width // s, s)


def _padded(features: Tensor, kernel_size: int, group_size: int) -> Tensor:
    """(N, G*c, H, W) -> (N, G, c, H + 2p, W + 2p), zero outside the map, in the dtype of the sums."""
    n, c, h, w = features.shape
    pad = kernel_size // 2
    features = accumulated(features)
    return F.pad(features, (pad, pad, pad, pad)).reshape(n, group_size, c // group_size, h + 2 * pad, w + 2 * pad)


def _tap(padded: Tensor, u: int, v: int, blocks: Tensor, stride: int) -> Tensor:
    """The view (N, G, c, y, x) of the padded features that tap (u, v) sees from the centres of ``blocks``."""
    y, x = blocks.shape[-4], blocks.shape[-2]
    return padded[..., u : u + (y - 1) * stride + 1 : stride, v : v + (x - 1) * stride + 1 : stride]
