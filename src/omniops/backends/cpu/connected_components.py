"""Connected components in C++; ``omniops.ops.connected_components`` says what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import omniops._C as _C
from omniops.backends import as_signed, prepared


@prepared
def connected_components(mask: Tensor, connectivity: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    shape = n, _, h, w = mask.shape
    strides, dense = (h * w, h * w, w, 1), mask.is_contiguous()
    arguments = (mask.element_size(), n, h, w, connectivity == 8)

    def run(mask: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        labels = torch.empty_strided(shape, strides, dtype=torch.int32)
        counts = torch.empty_strided(shape, strides, dtype=torch.int32)
        mask = mask if dense else as_signed(mask).contiguous()
        threads = torch.get_num_threads()
        _C.connected_components(mask.data_ptr(), *arguments, labels.data_ptr(), counts.data_ptr(), threads)
        return labels, counts

    return run
