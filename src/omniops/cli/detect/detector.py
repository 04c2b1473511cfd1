"""The detector and the annotations of ``omniops detect``, ``detect-eval`` and ``detect-train``, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omniops.cli.common import CommandError, choose_device
from omniops.cli.detect.options import Model
from omniops.cli.errors import raise_received, reason, say

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from omniops.detection import CARAFERCNN
    from omniops.detection.trained import Categories
    from omniops.distributed import Processes


class Known(NamedTuple):
    """What is known of a detector before it is built."""

    model: Model
    categories: Categories
    """The names and COCO's ids of its labels."""
    arguments: dict[str, Any]
    """Of the function that builds it."""


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
    torch.manual_seed(0)
    with errors_of_weights(f"--model is {model.value}, here for {classes}"):
        build = getattr(detection, model.architecture)
        detector: CARAFERCNN = build(weights, progress=progress, mask_threshold=0.5, **arguments)
    detector.eval().to(device)
    raise_received()
    return detector


@contextmanager
def errors_of_weights(what: str) -> Iterator[None]:
    """What goes wrong while weights are read, as errors of the command; ``what`` says what they were to fit."""
    try:
        yield
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    except ValueError as error:
        raise CommandError(f"{error} ({what})", status=1) from None
    except ConnectionError as error:  # said by us, with what to do
        raise CommandError(str(error), status=1) from None
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"{prefix}{reason(error)}", status=1) from None
    except ImportError as error:
        raise CommandError(str(error), status=1) from None


def identify(model: Model, weights: str | None, progress: bool = True) -> Known:
    """The detector that the weights say they are of, or else the model that was asked for, of COCO's categories."""
    from omniops.detection.trained import COCO, read_description

    described = None
    if weights not in (None, "coco"):
        with errors_of_weights(f"--weights {weights}"):
            described = read_description(weights, progress)
    if described is None:
        return Known(model, COCO, {})
    sizes = {"min_size": described.min_size, "max_size": described.max_size}
    count = len(described.categories.ids)
    return Known(Model.of(described.architecture), described.categories, {"num_classes": count, **sizes})


def read_coco(path: Path) -> dict[str, Any]:
    """A COCO annotation file of instances."""
    from omniops.detection import coco

    try:
        return coco.read_annotations(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def choose_own_device(name: str | None, processes: Processes) -> torch.device:
    """As every command; but of several processes each takes its own GPU where none is named by its number."""
    chosen = choose_device(name)
    if processes.are_several and chosen.type != "cpu" and ":" not in (name or ""):
        return choose_device(f"{chosen.type}:{processes.local_rank}")
    return chosen


def detect_objects(detector: CARAFERCNN, picture: Image, device: torch.device) -> dict[str, Tensor]:
    """The detections in a picture, on the CPU."""
    import numpy as np

    from omniops.detection.inference import detect

    with errors_of_picture(picture.width, picture.height):
        return detect(detector, np.array(picture), device)


@contextmanager
def errors_of_picture(width: int, height: int) -> Iterator[None]:
    """What goes wrong while a picture is looked at, as errors of the command."""
    try:
        yield
    except FloatingPointError as error:
        raise CommandError(str(error), status=1) from None
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        raise CommandError(f"a picture of {width} x {height} pixels: {reason(error)}", status=1) from None


def say_failed(failed: Mapping[Path, str]) -> None:
    """Name the pictures that were lost, and why."""
    for why in failed.values():
        say(f"error: {why}", "error")


def fail_for(failed: Mapping[Path, str], total: int) -> None:
    """Name the pictures that were lost, if any, and end with status 1."""
    if failed:
        say_failed(failed)
        raise CommandError(f"{len(failed)} of {total} images failed", status=1)
