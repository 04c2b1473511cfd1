"""SAM 2 (Ravi et al., 2024, https://arxiv.org/abs/2408.00714) on every device.

The network, its checkpoints, and predictors with the names, arguments and results of the official package, so that a
script written for that runs with its imports changed.

Names are imported at their first use: a web worker with a ``remote`` predictor does not import the network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The import of the module ``remote`` sets that attribute of the package, and this sets it to the function.
from omniops.sam2.remote import RemoteError, remote

if TYPE_CHECKING:
    from omniops.sam2.build_sam import (
        build_sam2,
        build_sam2_hf,
        build_sam2_video_predictor,
        build_sam2_video_predictor_hf,
    )
    from omniops.sam2.checkpoints import load
    from omniops.sam2.image_predictor import SAM2ImagePredictor
    from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
    from omniops.sam2.video_predictor import SAM2VideoPredictor

__all__ = [
    "RemoteError",
    "SAM2AutomaticMaskGenerator",
    "SAM2ImagePredictor",
    "SAM2VideoPredictor",
    "build_sam2",
    "build_sam2_hf",
    "build_sam2_video_predictor",
    "build_sam2_video_predictor_hf",
    "load",
    "remote",
]

_MODULES = {
    "SAM2AutomaticMaskGenerator": "mask_generator",
    "SAM2ImagePredictor": "image_predictor",
    "SAM2VideoPredictor": "video_predictor",
    "build_sam2": "build_sam",
    "build_sam2_hf": "build_sam",
    "build_sam2_video_predictor": "build_sam",
    "build_sam2_video_predictor_hf": "build_sam",
    "load": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise ImportError(f"omniops.sam2 needs huggingface_hub ({error}): pip install 'omniops[sam2]'") from error
    globals()[name] = value
    return value
