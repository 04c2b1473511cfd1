"""SAM 2 and the projects made from it: ``_C``, whose one function labels the connected components that they fill."""

from __future__ import annotations

from torch import Tensor

from omniops.dropin._extension import Extension
from omniops.ops.connected_components import connected_components


def get_connected_componnets(mask: Tensor) -> tuple[Tensor, Tensor]:
    """8-connected components of (N, 1, H, W), uint8 or bool: labels and counts, both int32."""
    return connected_components(mask)


_FUNCTIONS = {"get_connected_componnets": get_connected_componnets}

sam2 = Extension("sam2._C", _FUNCTIONS)
sam2_train = Extension("sam2_train._C", _FUNCTIONS)
"""MedSAM-2's copy of sam2."""
efficient_track_anything = Extension("efficient_track_anything._C", _FUNCTIONS)
"""EfficientTAM's copy of sam2."""
