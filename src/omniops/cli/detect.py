"""``omniops detect``: pictures in, the same pictures with what was found drawn on them, and COCO results, out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.markup import escape
from torch import Tensor

from omniops.cli.common import CommandError, DeviceOption, choose_device, output, progress, require_writable
from omniops.cli.detect_parts import (
    Model,
    ModelOption,
    RandomWeightsOption,
    WeightsOption,
    detect_objects,
    fail_for,
    load_detector,
    require_detection,
    require_weights,
)
from omniops.cli.pictures import colour_of, find_pictures, read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

RESULTS = "detections.json"
LOWEST_SCORE = 0.05
"""Of a detection in the results: MMDetection's."""


def detect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, or folders of them.")],
    weights: WeightsOption = None,
    model: ModelOption = Model.MASK,
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")] = Path(
        "omniops-detections"
    ),
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="T", min=0.0, max=1.0, help="The lowest score that is drawn.")
    ] = 0.5,
) -> None:
    """Find COCO's 80 kinds of objects in pictures: draw their boxes, masks, classes and scores, and write them down.

    DIR gets a .jpg of each picture, numbered where several have the same name, and detections.json: every detection
    that scores above 0.05, in COCO's results format and with its picture's file_name. Its image_id is the number that
    is the picture's name where all are named by different numbers, as COCO's are, or else counts the pictures from 1.

    A picture that cannot be read does not keep the others from being done: it is named at the end, with status 1.
    Ctrl-C ends it with status 130, what was found so far written down.

    Example: omniops detect street.jpg photos/ --weights coco --out found
    """
    chosen = choose_device(device)
    require_weights(weights, random_weights)
    require_detection()
    paths = find_pictures(images)
    targets = [out / name for name in _names(paths)]
    inputs = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in inputs:
            raise CommandError(f"{target} would be overwritten: --out must be another folder")
    results_path = out / RESULTS
    require_writable(results_path)
    detector = load_detector(model, weights, chosen, box_score_thresh=min(LOWEST_SCORE, threshold))

    from omniops.detection import COCO_CATEGORIES, coco

    results, lines, bad, interrupted = [], [], {}, False
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(paths))
            for path, image_id, target in zip(paths, _ids(paths), targets, strict=True):
                bar.update(task, description=escape(path.name))
                try:
                    picture = read_picture(path)
                    found = detect_objects(detector, picture, chosen)
                    results += [{**each, "file_name": path.as_posix()} for each in coco.to_results(found, image_id)]
                    shown = {name: value[found["scores"] >= threshold] for name, value in found.items()}
                    classes = [COCO_CATEGORIES[label] for label in shown["labels"].tolist()]
                    _save(_draw(picture, shown, classes), target)
                    counts = ", ".join(f"{count} {name}" for name, count in Counter(classes).most_common())
                    lines.append(f"{path} -> {target}: {counts or f'nothing that scores {threshold:g}'}")
                except CommandError as error:
                    bad[path] = str(error)
                bar.advance(task)
    except KeyboardInterrupt:  # what was found so far is kept
        interrupted = True
    try:
        results_path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {results_path}: {error.strerror}", status=1) from None

    console = output()
    for line in [*lines, f"Wrote {len(results)} detections in {len(lines)} pictures to {results_path}"]:
        console.print(line, markup=False, soft_wrap=True)
    if interrupted:
        print(*bad.values(), sep="\n", end="\n" if bad else "", file=sys.stderr)
        raise CommandError(f"interrupted: {len(lines)} of {len(paths)} images were done", status=130)
    fail_for(bad, len(paths))


def _save(picture: Image, path: Path) -> None:
    try:
        picture.save(path, quality=90)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {error}") from None


def _names(paths: Sequence[Path]) -> list[str]:
    """What each picture is called in the folder that is written to; some file systems tell no A from a."""
    names: dict[str, str] = {}
    for path in paths:
        name, number = f"{path.stem}.jpg", 1
        while name.casefold() in names:
            number += 1
            name = f"{path.stem}-{number}.jpg"
        names[name.casefold()] = name
    return list(names.values())


def _ids(paths: Sequence[Path]) -> list[int]:
    """COCO's ids of pictures that are called as COCO's, 000000397133.jpg, or else 1, 2, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def _draw(picture: Image, found: dict[str, Tensor], classes: Sequence[str]) -> Image:
    """The picture with everything found drawn on it, the surest on top."""
    from PIL import Image, ImageDraw, ImageFont

    colours = [colour_of(label) for label in found["labels"].tolist()]
    if "masks" in found:
        pixels = np.array(picture)
        for mask, colour in reversed(list(zip(found["masks"][:, 0].numpy(), colours, strict=True))):
            pixels[mask] = (pixels[mask] * 0.5 + np.multiply(colour, 0.5)).astype(np.uint8)
        picture = Image.fromarray(pixels)
    drawing = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, max(picture.size) // 70))
    line = max(1, max(picture.size) // 400)
    drawn = list(zip(found["boxes"].tolist(), found["scores"].tolist(), classes, colours, strict=True))
    for box, score, name, colour in reversed(drawn):
        drawing.rectangle(box, outline=colour, width=line)
        text = f"{name} {score:.2f}"
        left, top, right, bottom = drawing.textbbox((0, 0), text, font)
        # Over the box, or in it where there is no room.
        corner = (box[0], max(0, box[1] - bottom + top - 2))
        drawing.rectangle((*corner, corner[0] + right - left + 4, corner[1] + bottom - top + 2), fill=colour)
        drawing.text((corner[0] + 2 - left, corner[1] + 1 - top), text, fill="black", font=font)
    return picture
