"""Masks upsampled with the picture as a guide: joint bilateral upsampling (Kopf et al., SIGGRAPH 2007), by CARAFE.

A low-resolution mask does not know where in its pixel an edge runs; the picture does. Each pixel p of the result is an
average of the k x k low-resolution logits about it, of those q above all that are near and whose colour is p's:

    out[p] = sum over q of w[p, q] * logits[q]
    w[p, q] ~ exp(-|p - q|**2 / (2 * sigma_space**2)) * exp(-|guide[p] - colour[q]|**2 / (2 * sigma_colour**2))

where |p - q| is in low-resolution pixels, colour[q] is the guide's mean over q, and the weights of a p add up to 1 over
the q inside the map. This is a reassembly with kernels that depend on the content: ``omniops.carafe``, its kernels
computed, not predicted. All masks of a picture share them, as channels.

CARAFE upsamples by one whole number s along both axes, and pictures are of any size. So it computes a grid of s*h x s*w
cells, with the least s for which the grid is not coarser than the result. A cell has the colour and the position of the
pixel that its centre lies in, and every pixel has one cell or more. Nothing is interpolated a second time; the price is
work for (s*h * s*w) / (H * W) times the pixels: from 256 x 256 to 1024 x 1024 that is 1, to
1200 x 1800 it is 1.9.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops import carafe
from omniops.ops import _checks
from omniops.ops._library import without_autocast

STRIP_BYTES = 2**25
"""Bytes of the kernels and features of a strip: as much as caches hold, and enough to keep a GPU busy."""


def guided(
    logits: Tensor,
    guide: Tensor,
    size: tuple[int, int],
    *,
    kernel_size: int = 5,
    sigma_space: float = 0.8,
    sigma_colour: float = 0.15,
) -> Tensor:
    """Upsample mask logits along the edges of the picture.

    The work is done in strips, so that beside the result it needs as much again and some 60 MB, or what two copies of
    the kernels of one row of the low-resolution map take. Where a gradient is asked for, all kernels are kept:
    ``kernel_size**2`` numbers a cell.

    Args:
        logits: (B, M, h, w), float64, float32, float16 or bfloat16. A gradient reaches them, of any order.
        guide: (B, C, H, W), or (1, C, H, W) for all, floating, on the same device: the picture, usually in RGB from 0
            to 1. One of another size than the result is sampled. No gradient reaches it.
        size: the height and width of the result.
        kernel_size: the side k of the neighbourhood in low-resolution pixels, odd.
        sigma_space: how near a neighbour is, in low-resolution pixels.
        sigma_colour: how alike a colour is, in the guide's unit; ``float("inf")`` for all alike, which makes a Gaussian
            blur of it, as does a guide of one colour.

    Returns:
        (B, M, *size), in the dtype of ``logits``, computed in float32, or in float64 where they are.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, number or device.
    """
    size, kernel_size = _check(logits, guide, size, kernel_size, sigma_space, sigma_colour)
    if not logits.numel():
        return logits.new_zeros((*logits.shape[:2], *size))
    with without_autocast(logits):
        return _guided(logits, guide, size, kernel_size, sigma_space, sigma_colour)


def _guided(
    logits: Tensor, guide: Tensor, size: tuple[int, int], kernel_size: int, sigma_space: float, sigma_colour: float
) -> Tensor:
    (b, m, h, w), (height, width) = logits.shape, size
    dtype = torch.promote_types(logits.dtype, torch.float32)
    features = logits.to(dtype).reshape(len(guide), -1, h, w)
    s = max(-(-height // h), -(-width // w))
    rows, columns = _nearest(height, h * s), _nearest(width, w * s).to(logits.device)

    n, channels = features.shape[:2]
    row_bytes = n * (2 * kernel_size**2 + 2 * channels) * s * s * w * dtype.itemsize
    per_strip = min(h, max(1, STRIP_BYTES // row_bytes))
    strips = []
    for first, kernels in _kernels(guide, (h, w), size, s, per_strip, kernel_size, sigma_space, sigma_colour, dtype):
        last = first + kernels.shape[2] // s
        # The rows around the strip are reassembled too, with kernels of zeros, because the strip averages over them.
        top, bottom = min(first, kernel_size // 2), min(h - last, kernel_size // 2)
        kernels = F.pad(kernels, (0, 0, top * s, bottom * s)) if top or bottom else kernels
        strip = carafe(features[:, :, first - top : last + bottom], kernels, kernel_size, 1, s)
        strip_rows = rows[(rows >= first * s) & (rows < last * s)] - (first - top) * s
        strips.append(_select(strip, strip_rows.to(logits.device), columns).to(logits.dtype))
    return torch.cat(strips, 2).reshape(b, m, height, width)


@torch.no_grad()
def _kernels(
    guide: Tensor,
    low: tuple[int, int],
    size: tuple[int, int],
    s: int,
    per_strip: int,
    k: int,
    sigma_space: float,
    sigma_colour: float,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor]]:
    """The kernels of every ``per_strip`` low-resolution rows, (N, k*k, rows * s, w * s), with the first of the rows."""
    (h, w), p = low, k // 2
    n, channels = guide.shape[:2]
    guide_rows, guide_columns = (
        _nearest(length * s, guide_length).to(guide.device)
        for length, guide_length in zip(low, guide.shape[2:], strict=True)
    )

    def colours(first: int, last: int) -> Tensor:
        """The colours of the cells of low-resolution rows, (N, C, rows * s, w * s)."""
        return _select(guide, guide_rows[first * s : last * s], guide_columns).to(dtype) / sigma_colour

    starts = range(0, h, per_strip)
    means = torch.cat([F.avg_pool2d(colours(first, min(first + per_strip, h)), s) for first in starts], 2)
    # The exponents are colour . mean - |mean|**2 / 2 - distance. What all weights of a pixel share cancels in softmax.
    # Columns are repeated once, before the loops, which then run along contiguous rows.
    lengths = F.pad(-(means**2).sum(1, keepdim=True) / 2, (p, p, p, p), value=-torch.inf).repeat_interleave(s, 3)
    means = F.pad(means, (p, p, p, p)).repeat_interleave(s, 3)
    down, across = (
        _distances(length, full_length, s, k, sigma_space).to(guide.device, dtype)
        for length, full_length in zip(low, size, strict=True)
    )
    for first in starts:
        last = min(first + per_strip, h)
        r = last - first
        fine = colours(first, last).view(n, channels, r, s, w * s)
        exponents = fine.new_empty((n, k * k, r, s, w * s))
        for tap in range(k * k):
            u, v = divmod(tap, k)
            near = (..., slice(first + u, last + u), None, slice(v * s, (v + w) * s))
            exponent = exponents[:, tap]
            # Not by out=, which MPS may fail to write into a view (pytorch pull request 193385).
            exponent.copy_(lengths[:, 0][near] - across[v]).sub_(down[u].view(h, s, 1)[first:last])
            for channel in range(channels):
                exponent.addcmul_(fine[:, channel], means[:, channel][near])
        yield first, exponents.softmax(1).view(n, k * k, r * s, w * s)


def _nearest(num_cells: int, num_pixels: int) -> Tensor:
    """The pixel that the centre of every cell lies in, along an axis that is divided into cells and into pixels."""
    return (2 * torch.arange(num_cells) + 1) * num_pixels // (2 * num_cells)


def _select(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of (N, C, H, W)."""
    of_rows = x.index_select(2, rows)
    # From more than two dimensions PyTorch is slow to select columns on the CPU.
    selected: Tensor = of_rows.flatten(0, 2).index_select(1, columns).unflatten(0, of_rows.shape[:3])
    return selected


def _distances(low: int, high: int, s: int, k: int, sigma: float) -> Tensor:
    """|p - q|**2 / (2 * sigma**2) along an axis, (k, low * s) in float64: from every cell to its k neighbours."""
    position = (_nearest(low * s, high).double() + 0.5) * low / high - 0.5
    neighbours = torch.arange(low).repeat_interleave(s) + torch.arange(k)[:, None] - k // 2
    return ((position - neighbours) / sigma) ** 2 / 2


def _check(
    logits: Tensor, guide: Tensor, size: tuple[int, int], kernel_size: int, sigma_space: float, sigma_colour: float
) -> tuple[tuple[int, int], int]:
    """The size and the kernel size as ints; raises for arguments that are wrong."""
    _checks.tensor(logits=logits, guide=guide)
    _checks.four_dimensional(logits=logits, guide=guide)
    _checks.alike(logits=logits)
    _checks.alike(guide=guide)
    if 0 in logits.shape[2:]:
        raise ValueError(f"logits must not be empty maps, got {tuple(logits.shape)}")
    if guide.device != logits.device:
        raise ValueError(
            f"guide must be on the device of logits, {logits.device}, got {guide.device}: "
            "move it there with guide.to(logits.device)"
        )
    if len(guide) not in (1, len(logits)) or 0 in guide.shape:
        raise ValueError(f"guide must be (B or 1, C, H, W) with B = {len(logits)} of logits, got {tuple(guide.shape)}")
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise TypeError(f"size must be (height, width), got {size!r}")
    height, width, kernel_size = _checks.integer(height=size[0], width=size[1], kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    for name, value in (("sigma_space", sigma_space), ("sigma_colour", sigma_colour)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    return (height, width), kernel_size
