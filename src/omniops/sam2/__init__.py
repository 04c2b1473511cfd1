"""SAM 2 (Ravi et al., 2024, https://arxiv.org/abs/2408.00714) on every device.

The model is transformers' ``Sam2VideoModel``. Here are the weights' ways into it, and predictors with the names,
arguments and results of the official package, so that a script written for that runs with its imports changed.

What is asked for is imported when it is asked for: a web worker with a ``remote`` predictor needs no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from omniops.sam2.remote_predictor import RemoteError, remote
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

_PLACES = {
    "RemoteError": "remote_predictor",
    "SAM2AutomaticMaskGenerator": "mask_generator",
    "SAM2ImagePredictor": "image_predictor",
    "SAM2VideoPredictor": "video_predictor",
    "build_sam2": "build_sam",
    "build_sam2_hf": "build_sam",
    "build_sam2_video_predictor": "build_sam",
    "build_sam2_video_predictor_hf": "build_sam",
    "load": "checkpoints",
    "remote": "remote_predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    except ImportError as error:
        if error.name not in ("transformers", "huggingface_hub"):
            raise
        raise ImportError(f"omniops.sam2 needs transformers ({error}): pip install 'omniops[sam2]'") from error
    globals()[name] = value
    return value
