"""Connected components in C++; ``omniops.ops.connected_components`` says what they are."""

from __future__ import annotations

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import as_signed, empty


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    mask = as_signed(mask).contiguous()
    labels, counts = (empty(mask.shape, like=mask, dtype=torch.int32) for _ in range(2))
    n, _, h, w = mask.shape
    _C.connected_components(
        mask.data_ptr(),
        mask.element_size(),
        n,
        h,
        w,
        connectivity == 8,
        labels.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return labels, counts
