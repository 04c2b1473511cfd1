"""Vision operators that PyTorch leaves on CUDA, on every device: see README.md."""

import os
import sys
from importlib import import_module

TYPE_CHECKING = False


def _is_command() -> bool:
    """Whether this process is the command, by its own name or as ``python -m omniops``."""
    program = "".join(getattr(sys, "argv", [])[:1])
    if program == "-m":  # until Python knows the module's file
        arguments = sys.orig_argv
        return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["omniops"]
    return os.path.basename(program) in ("omniops", "omniops.exe")


# In the command's process they are imported when they are asked for: its help and Ctrl-C need not wait for PyTorch.
if TYPE_CHECKING or not _is_command():
    from omniops import nn, onnx
    from omniops.decomposed import decompositions
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
        MultiScaleDeformableAttention,
    )
    from omniops.ops.carafe import carafe, carafe_downsample, carafe_naive
    from omniops.ops.connected_components import connected_components, fill_holes, remove_small_components
    from omniops.ops.deform_conv2d import deform_conv2d, modulated_deform_conv2d
    from omniops.ops.multi_scale_deform_attn import multi_scale_deform_attn

_MODULES = (  # in this order: functions have the names of files of modules
    "omniops.ops.carafe",
    "omniops.ops.connected_components",
    "omniops.ops.deform_conv2d",
    "omniops.ops.multi_scale_deform_attn",
    "omniops.decomposed",
    "omniops.dropin",
    "omniops.nn",
)
__all__ = [
    "CARAFE",
    "CARAFEDownsamplePack",
    "CARAFENaive",
    "CARAFEPack",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "carafe",
    "carafe_downsample",
    "carafe_naive",
    "connected_components",
    "decompositions",
    "deform_conv2d",
    "disable",
    "enable",
    "fill_holes",
    "modulated_deform_conv2d",
    "multi_scale_deform_attn",
    "nn",
    "onnx",
    "remove_small_components",
]


if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> object:
        """A public name that was not imported above, or the version, which takes reading files."""
        if name == "__version__":
            from importlib.metadata import version

            globals()[name] = version("omniops")
            return globals()[name]
        if name in ("nn", "onnx"):
            return import_module(f"omniops.{name}")
        if name in __all__:
            for module in map(import_module, _MODULES):
                if name in vars(module):
                    return vars(module)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
