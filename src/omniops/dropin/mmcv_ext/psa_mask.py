"""PSANet's point-wise spatial attention (Zhao et al., ECCV 2018): masks around each position, laid on the whole map.

``mask`` is (N, h_mask * w_mask, H, W): what each position has for those around it, from half_h_mask rows above and
half_w_mask columns to the left. The result is (N, H * W, H, W), with 0 where a mask does not reach: for ``COLLECT``
attention[n, y * W + x, h, w] is what the mask of (h, w) has for (y, x), for ``DISTRIBUTE`` that is
attention[n, h * W + w, y, x].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omniops.dropin.mmcv_ext._kernel import kernel

COLLECT = 0
"""A psa_type; the other, ``DISTRIBUTE``, is 1."""


@kernel
def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``output``, the attention, by ``input``, the masks."""
    masks = input.unflatten(1, (h_mask, w_mask))
    attention = _attention(output, psa_type, h_feature, w_feature)
    h, w = _coordinates(h_feature, w_feature, input.device)
    x = torch.arange(w_feature, device=input.device)[:, None, None]
    columns = _clamp(x - w + half_w_mask, w_mask)
    # Row by row of the attention, so that no indices as large as it are kept.
    for y in range(h_feature):
        rows = _clamp(y - h + half_h_mask, h_mask)
        values = masks[:, rows.indices, columns.indices, h, w]
        attention[:, y] = torch.where(rows.inside & columns.inside, values, 0)


@kernel
def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``grad_input``, the gradient of the masks."""
    by_masks = grad_input.unflatten(1, (h_mask, w_mask))
    attention = _attention(grad_output, psa_type, h_feature, w_feature)
    h, w = _coordinates(h_feature, w_feature, grad_output.device)
    number = torch.arange(w_mask, device=grad_output.device)[:, None, None]
    columns = _clamp(number + w - half_w_mask, w_feature)
    for v in range(h_mask):
        rows = _clamp(v + h - half_h_mask, h_feature)
        values = attention[:, rows.indices, columns.indices, h, w]
        by_masks[:, v] = torch.where(rows.inside & columns.inside, values, 0)


class _Clamped(NamedTuple):
    """Indices along an axis, clamped to it, and whether they were inside of it."""

    indices: Tensor
    inside: Tensor


def _clamp(index: Tensor, side: int) -> _Clamped:
    return _Clamped(index.clamp(0, side - 1), (index >= 0) & (index < side))


def _coordinates(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(height, device=device)[:, None], torch.arange(width, device=device)


def _attention(tensor: Tensor, psa_type: int, height: int, width: int) -> Tensor:
    """A view of it as (N, y, x, h, w), of the masks' positions (h, w) and those that they have values for."""
    view = tensor.view(len(tensor), height, width, height, width)
    return view if psa_type == COLLECT else view.permute(0, 3, 4, 1, 2)
