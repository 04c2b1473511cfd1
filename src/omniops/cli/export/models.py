"""The models that ``omniops export`` knows by name, in parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omniops.cli.common import CommandError, load_sam2, require_sam2
from omniops.cli.detect.detector import identify, load_detector, require_detection
from omniops.cli.detect.options import Model, require_weights
from omniops.cli.errors import say
from omniops.cli.segment.model import config_file, load_model
from omniops.cli.segment.options import Precision, require_image_size

if TYPE_CHECKING:
    from omniops.export import Part

_DETECTORS = [model.value for model in Model]
_SIZES = ("tiny", "small", "base-plus", "large")


def is_detector(model: str) -> bool:
    """Whether it is the name of one."""
    return model in _DETECTORS


def require_sam2_model(model: str) -> None:
    """Raise for what names no model at all."""
    if model not in _SIZES and "/" not in model and not Path(model).exists():
        raise CommandError(
            f"{model} is no model: detectors are {' and '.join(_DETECTORS)}; SAM 2 is {', '.join(_SIZES)}, a file, a "
            "URL or a hub id; and a model of yours is module:function"
        )


def detector_parts(
    name: str, weights: str | None, random_weights: bool, fixed: bool, size: tuple[int, int] | None
) -> list[Part]:
    """A detector, which is one part, of images of any size unless one is given."""
    if size is not None and min(size) < 2:
        raise CommandError(f"--size must be a height and a width of at least 2 pixels, got {size[0]} {size[1]}")
    require_weights(weights, random_weights, "shows how it is exported")
    require_detection()
    import torch

    from omniops.export import detection

    model, _, arguments = identify(Model(name), weights)
    detector = load_detector(model, weights, torch.device("cpu"), **arguments)
    if size is not None:
        return detection.parts(detector, dynamic=False, size=size)
    return detection.parts(detector, dynamic=not fixed)


def sam2_parts(model: str, part: str | None, random_weights: bool, image_size: int | None, fixed: bool) -> list[Part]:
    """SAM 2's parts, or the one that is named."""
    require_image_size(image_size)
    require_sam2_model(model)
    require_sam2()
    say(f"loading SAM 2, {model}" + (", with random weights: its masks mean nothing" if random_weights else ""))
    load_sam2()
    if random_weights:
        config_file(model)
    import torch

    from omniops.export import sam2

    network = load_model(model, random_weights, torch.device("cpu"), Precision.FLOAT32, image_size)
    parts = sam2.parts(network, dynamic=not fixed)
    return [found for found in parts if part is None or found.name == part.replace("-", "_")]
