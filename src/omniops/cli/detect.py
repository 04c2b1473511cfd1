"""``omniops detect``: pictures in, the same pictures with what was found drawn on them, and COCO results, out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import normalize

import typer
from rich.markup import escape

from omniops.cli.common import CommandError, DeviceOption, choose_device, print_lines, progress
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
from omniops.cli.errors import cause, exit_status, raise_received, say
from omniops.cli.outputs import OverwriteOption, Records, lines_of, require_new, writing
from omniops.cli.pictures import find_pictures, read_picture
from omniops.drawing import colour_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from omniops.detection import CARAFERCNN

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
    overwrite: OverwriteOption = False,
) -> None:
    """Find COCO's 80 kinds of objects in pictures: draw their boxes, masks, classes and scores, and write them down.

    DIR gets a .jpg of each picture, numbered where several have the same name, and detections.json: every detection
    that scores above 0.05, in COCO's results format and with its picture's file_name. Its image_id is the number that
    is the picture's name where all are named by different numbers, as COCO's are, or else counts the pictures from 1.
    What is there already is not replaced without --overwrite, and what is read never is.

    A picture that cannot be read does not keep the others from being done: it is named at the end, with status 1.
    Ctrl-C, or SIGTERM, ends it with what was found so far written down. Until the end that is in detections.jsonl, a
    line of JSON for each detection, which stays there where the process is killed.

    Example: omniops detect street.jpg photos/ --weights coco --out found
    """
    require_weights(weights, random_weights)
    paths = find_pictures(images)
    targets = [out / name for name in _names(paths)]
    results = out / RESULTS
    require_new([*targets, results, lines_of(results)], overwrite, paths)
    say("loading PyTorch and torchvision")
    chosen = choose_device(device)
    require_detection()
    detector = load_detector(model, weights, chosen, box_score_thresh=min(LOWEST_SCORE, threshold))
    say(f"looking at {len(paths)} pictures" if len(paths) > 1 else f"looking at {paths[0]}")

    work = _Work(detector, chosen, threshold, overwrite, Records(results, overwrite))
    stopped: BaseException | None = None
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(paths))
            for path, image_id, target in zip(paths, _ids(paths), targets, strict=True):
                raise_received()
                bar.update(task, description=escape(path.name))
                summary = work.process(path, image_id, target)
                if summary:
                    print_lines(summary, above=bar)
                bar.advance(task)
    except (KeyboardInterrupt, OSError, CommandError) as error:  # what was found so far is kept
        stopped = error
    work.records.finish(work.found)
    done = f"{work.pictures} of {len(paths)} images were done"
    if isinstance(stopped, OSError):  # of the output, which nobody reads or nothing takes
        raise stopped
    print_lines(f"Wrote {len(work.found)} detections in {work.pictures} pictures to {results}")
    if stopped is not None:
        print(*work.bad.values(), sep="\n", end="\n" if work.bad else "", file=sys.stderr)
        raise CommandError(f"{cause(stopped)}: {done}", exit_status(stopped))
    fail_for(work.bad, len(paths))


class _Work:
    """The pictures that are done, and what was found on them."""

    def __init__(
        self, detector: CARAFERCNN, device: torch.device, threshold: float, overwrite: bool, records: Records
    ) -> None:
        self._detector, self._device, self._threshold, self._overwrite = detector, device, threshold, overwrite
        self.records = records
        self.found: list[dict[str, Any]] = []
        self.bad: dict[Path, str] = {}
        self.pictures = 0

    def process(self, path: Path, image_id: int, target: Path) -> str:
        """Find what is on a picture and write both; returns the line to print, or nothing where it is bad."""
        from omniops.detection import COCO_CATEGORIES, coco

        try:
            picture = read_picture(path)
            found = detect_objects(self._detector, picture, self._device)
            records = [{**each, "file_name": path.as_posix()} for each in coco.to_results(found, image_id)]
            shown = {name: value[found["scores"] >= self._threshold] for name, value in found.items()}
        except CommandError as error:
            self.bad[path] = str(error)
            return ""
        self.records.add(records)  # whatever keeps them from the disk ends the work
        self.found += records
        classes = [COCO_CATEGORIES[label] for label in shown["labels"].tolist()]
        try:
            with writing(target, self._overwrite) as part:
                _draw(picture, shown, classes).save(part, format="JPEG", quality=90)
        except CommandError as error:
            self.bad[path] = str(error)
            return ""
        self.pictures += 1
        counts = ", ".join(f"{count} {name}" for name, count in Counter(classes).most_common())
        return f"{path} -> {target}: {counts or f'nothing that scores {self._threshold:g}'}"


def _names(paths: Sequence[Path]) -> list[str]:
    """What each picture is called in the folder that is written to.

    Some file systems tell neither A from a nor é from e with an accent.
    """
    names: dict[str, str] = {}
    for path in paths:
        name, number = f"{path.stem}.jpg", 1
        while (key := normalize("NFC", name).casefold()) in names:
            number += 1
            name = f"{path.stem}-{number}.jpg"
        names[key] = name
    return list(names.values())


def _ids(paths: Sequence[Path]) -> list[int]:
    """COCO's ids of pictures that are called as COCO's, 000000397133.jpg, or else 1, 2, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def _draw(picture: Image, found: dict[str, Tensor], classes: Sequence[str]) -> Image:
    """The picture with everything found drawn on it, the surest on top."""
    import numpy as np
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
