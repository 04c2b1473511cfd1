"""What ``omniops detect`` and ``omniops detect-eval`` share: their options, the detector, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniops.cli.common import CommandError
from omniops.cli.errors import raise_received, reason, say

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from omniops.detection import CARAFERCNN


class Model(str, Enum):
    """The detectors, as ``--model`` names them."""

    MASK = "mask-rcnn-r50-carafe"
    FASTER = "faster-rcnn-r50-carafe"


ModelOption = Annotated[Model, typer.Option("--model", help="Mask R-CNN gives masks as well.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|URL|coco",
        help="OpenMMLab's checkpoint or a state dict; coco: the one that OpenMMLab published, 200 MB, fetched once.",
    ),
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Instead of --weights: to see it run. It finds nothing real.")
]


def require_weights(weights: str | None, random_weights: bool) -> None:
    """Raise where there is not one of the two."""
    if weights is None and not random_weights:
        raise CommandError(
            "no weights: --weights coco fetches those that OpenMMLab published; a file of them or their URL will do "
            "as well, and --random-weights shows how it runs"
        )
    if weights is not None and random_weights:
        raise CommandError("--weights and --random-weights exclude each other")


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
        place = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"{place}{reason(error)}", status=1) from None
    except ImportError as error:
        raise CommandError(str(error), status=1) from None
    detector.eval().to(device)
    raise_received()
    return detector


def detect_objects(detector: CARAFERCNN, picture: Image, device: torch.device) -> dict[str, Tensor]:
    """The detections in a picture, on the CPU."""
    import numpy as np
    import torch

    image = torch.from_numpy(np.array(picture)).to(device).permute(2, 0, 1) / 255
    try:
        with torch.inference_mode():
            (detections,) = detector([image])
            found = {name: value.cpu() for name, value in detections.items()}
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        size = f"a picture of {picture.width} x {picture.height} pixels"
        raise CommandError(f"{size}: {reason(error)}", status=1) from None
    if not (found["boxes"].isfinite().all() and found["scores"].isfinite().all()):
        raise CommandError(
            "the detections are no finite numbers: are the weights damaged, or another model's?", status=1
        )
    return found


def fail_for(bad: Mapping[Path, str], total: int) -> None:
    """Name the pictures that were lost, if any, and end with status 1."""
    if bad:
        print(*bad.values(), sep="\n", file=sys.stderr)
        raise CommandError(f"{len(bad)} of {total} images failed", status=1)
