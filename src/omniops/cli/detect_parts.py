"""What ``omniops detect`` and ``omniops detect-eval`` share: the detector, and pictures read whatever they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from omniops.cli.common import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

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

_ENDINGS = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    model: Model, weights: str | None, device: torch.device, progress: bool = True, **arguments: Any
) -> CARAFERCNN:
    """The detector in evaluation on the device; without weights from a fixed seed. Its masks are boolean."""
    from omniops import detection

    build = {
        Model.MASK: detection.mask_rcnn_resnet50_fpn_carafe,
        Model.FASTER: detection.faster_rcnn_resnet50_fpn_carafe,
    }[model]
    torch.manual_seed(0)
    try:
        detector: CARAFERCNN = build(weights, progress=progress, mask_threshold=0.5, **arguments)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error), status=1) from None
    detector.eval().to(device)
    return detector


def detect_objects(detector: CARAFERCNN, picture: Image, device: torch.device) -> dict[str, Tensor]:
    """The detections in a picture, on the CPU."""
    image = torch.from_numpy(np.array(picture)).to(device).permute(2, 0, 1) / 255
    try:
        with torch.inference_mode():
            (detections,) = detector([image])
            found = {name: value.cpu() for name, value in detections.items()}
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        line = str(error).partition("\n")[0]
        raise CommandError(f"a picture of {picture.width} x {picture.height} pixels: {line}", status=1) from None
    if not (found["boxes"].isfinite().all() and found["scores"].isfinite().all()):
        raise CommandError(
            "the detections are no finite numbers: are the weights damaged, or another model's?", status=1
        )
    return found


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The files named, and those of the folders named that end as pictures do; each once."""
    found: dict[Path, Path] = {}
    for place in places:
        try:
            if place.is_dir():
                inside = [each for each in place.iterdir() if each.suffix.lower() in _ENDINGS and not each.is_dir()]
            else:
                place.stat()
                inside = [place]
        except OSError as error:
            raise CommandError(f"cannot read {place}: {error.strerror}") from None
        for each in sorted(inside):
            found.setdefault(each.resolve(), each)
    if not found:
        raise CommandError(f"no pictures in {', '.join(map(str, places))}: no file ends with {', '.join(_ENDINGS)}")
    return list(found.values())


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image:
    """The picture in RGB as its EXIF data turns it, without transparency.

    With a size, (width, height), it is turned or left as it is stored, whichever has that size.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as stored:
            turned = ImageOps.exif_transpose(stored)
            if size is not None and turned.size != size:
                if stored.size != size:
                    raise CommandError(
                        f"{path} has {turned.width} x {turned.height} pixels, its annotations {size[0]} x {size[1]}"
                    )
                turned = stored
            return _to_rgb(turned)
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"not a picture that Pillow can read: {path}") from None
    except CommandError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise CommandError(f"cannot read {path}: {error}") from None


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode[0] in "IF":  # converting these would cut off at 255, not scale
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are neither of 8 nor of 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # where its transparent colours stay colours
    return picture.convert("RGB")


def fail_for(bad: Mapping[Path, str], total: int) -> None:
    """Name the pictures that were lost, if any, and end with status 1."""
    if bad:
        for reason in bad.values():
            print(reason, file=sys.stderr)
        raise CommandError(f"{len(bad)} of {total} images failed", status=1)
