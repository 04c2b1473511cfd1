"""The detector of ``omniops detect`` and ``omniops detect-eval``, and how they fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniops.cli.common import CommandError
from omniops.cli.detect.options import Model
from omniops.cli.errors import raise_received, reason, say

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from omniops.detection import CARAFERCNN


def require_detection() -> None:
    """Raise before any work where a package is missing."""
    try:
        import omniops.detection.coco  # noqa: F401
    except ImportError as error:
        raise CommandError(str(error), status=1) from None


def load_detector(
    model: Model,
    weights: str | None,
    device: torch.device,
    progress: bool = True,
    classes: str = "COCO's 80 classes",
    **arguments: Any,
) -> CARAFERCNN:
    """The detector in evaluation on the device; without weights from a fixed seed. Its masks are boolean.

    ``classes`` says in an error what the model is for.
    """
    import torch

    from omniops import detection

    say(f"loading {model.value}" + (", with random weights: what it finds means nothing" if weights is None else ""))
    build = {
        Model.MASK: detection.mask_rcnn_resnet50_fpn_carafe,
        Model.FASTER: detection.faster_rcnn_resnet50_fpn_carafe,
    }[model]
    torch.manual_seed(0)
    try:
        detector: CARAFERCNN = build(weights, progress=progress, mask_threshold=0.5, **arguments)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    except ValueError as error:
        raise CommandError(f"{error} (--model is {model.value}, here for {classes})", status=1) from None
    except ConnectionError as error:  # said by us, with what to do
        raise CommandError(str(error), status=1) from None
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"{prefix}{reason(error)}", status=1) from None
    except ImportError as error:
        raise CommandError(str(error), status=1) from None
    detector.eval().to(device)
    raise_received()
    return detector


def detect_objects(detector: CARAFERCNN, picture: Image, device: torch.device) -> dict[str, Tensor]:
    """The detections in a picture, on the CPU."""
    import numpy as np

    from omniops.detection.inference import detect

    try:
        return detect(detector, np.array(picture), device)
    except FloatingPointError as error:
        raise CommandError(str(error), status=1) from None
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        size = f"a picture of {picture.width} x {picture.height} pixels"
        raise CommandError(f"{size}: {reason(error)}", status=1) from None


def say_failed(failed: Mapping[Path, str]) -> None:
    """Name the pictures that were lost, and why."""
    for why in failed.values():
        say(f"error: {why}", "error")


def fail_for(failed: Mapping[Path, str], total: int) -> None:
    """Name the pictures that were lost, if any, and end with status 1."""
    if failed:
        say_failed(failed)
        raise CommandError(f"{len(failed)} of {total} images failed", status=1)
