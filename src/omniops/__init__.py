"""Vision operators that PyTorch leaves on CUDA, on every device: see README.md."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# The command imports what it calls: its help and Ctrl-C need not wait for PyTorch.
if TYPE_CHECKING or Path("".join(getattr(sys, "argv", [])[:1])).stem != "omniops":
    from omniops import nn
    from omniops.dropin import disable, enable
    from omniops.nn import (
        CARAFE,
        CARAFEDownsamplePack,
        CARAFENaive,
        CARAFEPack,
        DeformConv2d,
        DeformConv2dPack,
        ModulatedDeformConv2d,
        ModulatedDeformConv2dPack,
    )
    from omniops.ops.carafe import carafe, carafe_downsample, carafe_naive
    from omniops.ops.connected_components import connected_components, fill_holes, remove_small_components
    from omniops.ops.deform_conv2d import deform_conv2d, modulated_deform_conv2d

__all__ = [
    "CARAFE",
    "CARAFEDownsamplePack",
    "CARAFENaive",
    "CARAFEPack",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "carafe",
    "carafe_downsample",
    "carafe_naive",
    "connected_components",
    "deform_conv2d",
    "disable",
    "enable",
    "fill_holes",
    "modulated_deform_conv2d",
    "nn",
    "remove_small_components",
]
