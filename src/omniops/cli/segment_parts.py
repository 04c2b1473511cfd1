"""What ``omniops segment`` is made of: prompts as they are written, the model, what is drawn, and videos written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from omniops.cli.common import CommandError, dtype_name
from omniops.cli.errors import reason
from omniops.drawing import colour_of
from omniops.sam2 import picture_files

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import Sam2VideoModel

Record = dict[str, Any]
Mask = NDArray[np.bool_]
"""(H, W)"""
Point = tuple[float, float]
Box = tuple[float, float, float, float]

_MOST_IN_A_BYTE = 255
_GREEN, _RED = (40, 200, 80), (230, 50, 50)
NOT_FINITE = "the scores or masks are no finite numbers: are the weights damaged, or another model's?"


class Precision(str, Enum):
    """What the model computes in, as ``omniops.sam2.load`` takes it."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


PrecisionOption = Annotated[
    Precision, typer.Option("--dtype", help="What is computed in; auto: the one that suits the device.")
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="To see it run without any: its masks mean nothing.")
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="N",
        help="The side of the square that the model sees, a multiple of 32: less is faster and coarser.",
        show_default="1024, as the model was trained",
    ),
]


@dataclass
class Prompts:
    """Those of one object on one frame."""

    points: list[Point] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """1 where a point is of the object, 0 where it is not."""
    box: Box | None = None

    @property
    def is_one_click(self) -> bool:
        """Which may mean an object, a part of it or all that it is part of."""
        return self.box is None and len(self.points) == 1


@dataclass(frozen=True)
class Written:
    """A prompt as it came, for what is said of it."""

    option: str
    text: str
    numbers: tuple[float, ...]
    label: int
    frame: int | None
    object: int

    def wrong(self, why: str) -> CommandError:
        """The error that says so."""
        return CommandError(f"{self.option} {self.text}: {why}")


@dataclass(frozen=True)
class Work:
    """What the command was asked for."""

    source: Path
    written: list[Written]
    load: Callable[[], Sam2VideoModel]
    """The model, loaded when it is called."""
    out: Path
    overwrite: bool
    random_weights: bool


def parse(points: Iterable[str], boxes: Iterable[str]) -> list[Written]:
    """The prompts of ``--point`` and ``--box``."""
    forms = {"--point": ("X,Y or X,Y,LABEL, with LABEL 1 or 0", points), "--box": ("X0,Y0,X1,Y1", boxes)}
    written = []
    for option, (form, texts) in forms.items():
        for text in texts:
            found = re.fullmatch(r"([^@#]+)(?:@(\d+))?(?:#([1-9]\d{0,3}))?", text)
            try:
                numbers = tuple(float(number) for number in found[1].split(",")) if found else ()
            except ValueError:
                numbers = ()
            label = numbers[2] if option == "--point" and len(numbers) == 3 else 1.0
            if not found or len(numbers) not in ((2, 3) if option == "--point" else (4,)) or label not in (0, 1):
                raise CommandError(f"{option} must be {form}, then @FRAME and #OBJECT where wanted, got {text!r}")
            size = 2 if option == "--point" else 4
            written.append(
                Written(
                    option,
                    text,
                    numbers[:size],
                    int(label),
                    None if found[2] is None else int(found[2]),
                    int(found[3] or 1),
                )
            )
    return written


def check(written: Iterable[Written], path: Path, width: int, height: int, frames: int | None) -> None:
    """Raise where a prompt lies outside of what it is for; a picture has no frames."""
    size = f"{path} has {width} x {height} pixels"
    for each in written:
        if frames is None and each.frame is not None:
            raise each.wrong(f"{path} is a picture, which has no frames")
        if frames is not None and (each.frame or 0) >= frames:
            raise each.wrong(f"{path} has {frames} frames, the first of which is 0")
        if each.option == "--point":
            x, y = each.numbers
            if not (0 <= x < width and 0 <= y < height):
                raise each.wrong(f"it is outside: {size}")
        else:
            x0, y0, x1, y1 = each.numbers
            if not (x0 < x1 and y0 < y1):
                raise each.wrong("it is inside out: X0 must be less than X1, and Y0 less than Y1")
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise each.wrong(f"it is outside: {size}")


def grouped(written: Iterable[Written]) -> dict[tuple[int, int], Prompts]:
    """The prompts by frame and object, in that order."""
    groups: dict[tuple[int, int], Prompts] = {}
    for each in written:
        prompts = groups.setdefault((each.frame or 0, each.object), Prompts())
        if each.option == "--point":
            x, y = each.numbers
            prompts.points.append((x, y))
            prompts.labels.append(each.label)
        elif prompts.box is None:
            x0, y0, x1, y1 = each.numbers
            prompts.box = (x0, y0, x1, y1)
        else:
            raise each.wrong(f"object {each.object} has a box there: for another object add #{each.object + 1}")
    groups = dict(sorted(groups.items()))
    shown = set()
    for (_, number), prompts in groups.items():
        if number not in shown and prompts.box is None and 1 not in prompts.labels:
            raise CommandError(f"object {number} is only told where it is not: give a point of it, or a box")
        shown.add(number)
    return groups


def is_picture(path: Path) -> bool:
    """Whether Pillow takes the file for one picture, whatever it is called; an animation is a video."""
    from PIL import Image, UnidentifiedImageError

    picture_files.register_heif()
    try:
        with Image.open(path) as picture:
            # Pillow knows MPEG, and cannot read it.
            return bool(picture.format != "MPEG" and not picture_files.animated(picture))
    except UnidentifiedImageError:
        # HEIF without pillow-heif: what reads pictures says what is missing.
        return bool(picture_files.needed(path))
    except Exception:  # Pillow's decoders raise what they like on damaged files
        return True


def load_model(
    model: str, random_weights: bool, device: torch.device, precision: Precision, image_size: int | None
) -> Sam2VideoModel:
    """The model on the device; its random weights are from a fixed seed."""
    from omniops import sam2

    try:
        return sam2.load(model, device, precision.value, image_size=image_size, random_weights=random_weights)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: no memory
        raise CommandError(reason(error), status=1) from None


def configuration(size: str) -> str:
    """The official package's configuration of a size."""
    from omniops.sam2.architectures import LETTERS, SIZES

    if size not in SIZES:
        raise CommandError(f"random weights are of a size, --model {', '.join(SIZES)}; got {size!r}")
    return f"configs/sam2.1/sam2.1_hiera_{LETTERS[size]}.yaml"


def require_image_size(image_size: int | None) -> None:
    """Raise for a side that no model has."""
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise CommandError(f"--image-size must be a positive multiple of 32, got {image_size}")


def as_record(number: int, mask: Mask) -> Record:
    """The mask of an object as COCO's run lengths."""
    from omniops.sam2 import rle

    return {"id": number, "segmentation": rle.encode(mask), "area": int(mask.sum())}


def largest_first(records: Iterable[Record]) -> list[Record]:
    """So that none is hidden by what it lies in when they are drawn."""
    return sorted(records, key=lambda each: -int(each["area"]))


def masks_of(records: Iterable[Record]) -> Iterator[Mask]:
    """One at a time, for all of them may be more than there is memory."""
    from omniops.sam2 import rle

    return (rle.decode(each["segmentation"]) for each in records)


def where(model: Sam2VideoModel) -> str:
    """The device in words, and what is computed in."""
    import torch

    from omniops import device as devices

    return f"{devices.title(torch.device(model.device))}, {dtype_name(model.vision_encoder.dtype)}"


def draw_prompts(pixels: NDArray[np.uint8], prompts: Mapping[int, Prompts]) -> NDArray[np.uint8]:
    """With the prompts of each object on it: boxes, and points green where they are of it and red where not."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels)
    drawing = ImageDraw.Draw(picture)
    width, radius = max(1, max(picture.size) // 400), max(1, max(picture.size) // 150)
    for number, each in prompts.items():
        if each.box is not None:
            drawing.rectangle(each.box, outline=colour_of(number), width=width)
        for (x, y), label in zip(each.points, each.labels, strict=True):
            around = (x - radius, y - radius, x + radius, y + radius)
            drawing.ellipse(around, fill=_GREEN if label else _RED, outline="white", width=width)
    return np.array(picture)


def as_picture(numbers: Sequence[int], masks: Iterable[Mask], height: int, width: int) -> Image:
    """One mask: white inside. More: the number of the object at each pixel, the last on top.

    Numbers up to 255 are coloured by a palette, as in DAVIS; higher ones make it a grey picture of 16 bits.
    """
    from PIL import Image

    highest = max(numbers) if len(numbers) > 1 else _MOST_IN_A_BYTE
    at = np.zeros((height, width), np.uint8 if highest <= _MOST_IN_A_BYTE else np.uint16)
    for number, mask in zip(numbers, masks, strict=True):
        at[mask] = number if len(numbers) > 1 else highest
    picture = Image.fromarray(at)
    if len(numbers) > 1 and highest <= _MOST_IN_A_BYTE:
        picture.putpalette(bytes([0, 0, 0, *(value for i in range(1, highest + 1) for value in colour_of(i))]))
    return picture
