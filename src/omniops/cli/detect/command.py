"""``omniops detect``: pictures in, the same pictures with what was found drawn on them, and COCO results, out."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.markup import escape

from omniops.cli.common import CommandError, DeviceOption, choose_device, print_lines, progress
from omniops.cli.detect.batches import BatchDetector, Detected
from omniops.cli.detect.detector import fail_for, identify, load_detector, require_detection, say_failed
from omniops.cli.detect.options import (
    BatchOption,
    Model,
    ModelOption,
    OutOption,
    PicturesArgument,
    RandomWeightsOption,
    ThresholdOption,
    WeightsOption,
    require_weights,
)
from omniops.cli.errors import cause, exit_status, raise_received, say
from omniops.cli.outputs import OverwriteOption, Records, lines_of, require_new, unique_stems, writing
from omniops.cli.pictures import find_pictures, read_picture
from omniops.cli.pipeline import OrderedOutput, map_ahead
from omniops.cli.sources import FilesFromOption, expand_sources
from omniops.drawing import draw_detections

if TYPE_CHECKING:
    from omniops.cli.detect.batches import Pixels

RESULTS = "detections.json"
LOWEST_SCORE = 0.05
"""Of a detection in the results: MMDetection's."""
_STDIN = Path("stdin")
"""What a picture from a pipe is called."""
_MAX_THREADS = 4
"""That read pictures ahead of the model, and as many that draw them after it."""


def detect(
    images: PicturesArgument = None,
    weights: WeightsOption = None,
    model: ModelOption = Model.MASK,
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    out: OutOption = Path("omniops-detections"),
    files_from: FilesFromOption = None,
    batch: BatchOption = None,
    threshold: ThresholdOption = 0.5,
    overwrite: OverwriteOption = False,
) -> None:
    """Find COCO's 80 kinds of objects in pictures: draw their boxes, masks, classes and scores, and write them down.

    With --weights of omniops detect-train it finds the categories of that training.

    DIR gets a .jpg of each picture, numbered where several have the same name, and detections.json: every detection
    that scores above 0.05, in COCO's results format and with its picture's file_name. Its image_id is the number that
    is the picture's name where all are named by different numbers, as COCO's are, or else counts the pictures from 1.
    What is there already is not replaced without --overwrite, and what is read never is.

    A picture that cannot be read does not keep the others from being done: it is named at the end, with status 1.
    Ctrl-C, or SIGTERM, ends it with what was found so far written down. Until the end that is in detections.jsonl, a
    line of JSON for each detection, which stays there where the process is killed.

    Example: omniops detect street.jpg photos/ --weights coco --out found

    Example: curl -s https://example.org/street.jpg | omniops detect - --weights coco

    Example: find . -name '*.jpg' | omniops detect --files-from - --weights coco --batch 8
    """
    require_weights(weights, random_weights)
    pictures = _find_pictures(images or (), files_from, out)
    paths = [picture.path for picture in pictures]
    results = out / RESULTS
    require_new([*(picture.target for picture in pictures), results, lines_of(results)], overwrite, paths)
    say("loading PyTorch and torchvision")
    chosen = choose_device(device)
    require_detection()
    model, categories, known = identify(model, weights)
    detector = load_detector(model, weights, chosen, box_score_thresh=min(LOWEST_SCORE, threshold), **known)
    say(f"looking at {len(paths)} pictures" if len(paths) > 1 else f"looking at {paths[0]}")

    detections = _Detections(threshold, categories.names, overwrite, Records(results, overwrite))
    batches = BatchDetector(detector, chosen, batch, threshold, categories.ids)
    stopped = _detect_until_stopped(detections, batches, pictures)
    detections.records.finish(detections.found)
    if isinstance(stopped, OSError):  # of the output, which nobody reads or nothing takes
        raise stopped
    print_lines(f"Wrote {len(detections.found)} detections in {detections.pictures} pictures to {results}")
    if stopped is not None:
        say_failed(detections.failed)
        done = f"{detections.pictures} of {len(paths)} images were done"
        raise CommandError(f"{cause(stopped)}: {done}", exit_status(stopped))
    fail_for(detections.failed, len(paths))


class _Picture(NamedTuple):
    """A picture, its id, the file that it is drawn into, and what is in it where it is no file."""

    path: Path
    image_id: int
    target: Path
    data: bytes | None = None


def _find_pictures(arguments: Sequence[str], files_from: str | None, out: Path) -> list[_Picture]:
    if list(arguments) == ["-"] and files_from is None:
        return [_Picture(_STDIN, 1, out / f"{_STDIN}.jpg", sys.stdin.buffer.read())]
    sources = expand_sources(arguments, files_from)
    if "-" in arguments:
        raise CommandError("- is a picture from stdin, and is read alone")
    paths = find_pictures([Path(source) for source in sources])
    return [
        _Picture(path, image_id, out / f"{stem}.jpg")
        for path, image_id, stem in zip(paths, _image_ids(paths), unique_stems(map(str, paths)), strict=True)
    ]


class _Drawn(NamedTuple):
    """Of a picture the COCO results, and the line to print, or why it could not be drawn."""

    picture: _Picture
    results: list[dict[str, Any]]
    summary: str | CommandError


def _detect_until_stopped(
    detections: _Detections, detector: BatchDetector, pictures: Sequence[_Picture]
) -> BaseException | None:
    """Find what is on the pictures; returns what ended that early, after which what was found so far is kept.

    Threads read the pictures to come, and others draw those that are done, while the detector is at work.
    """
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    waiting = threads + detector.size
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(pictures))

            def add(drawn: _Drawn) -> None:
                bar.update(task, description=escape(drawn.picture.path.name))
                if summary := detections.add(drawn):
                    print_lines(summary, above=bar)
                bar.advance(task)

            with (
                closing(map_ahead(_read, pictures, threads, waiting)) as read,
                OrderedOutput(detections.draw, add, threads, waiting) as output,
            ):
                while batch := list(islice(read, detector.size)):
                    raise_received()
                    for detected in _detect_batch(detector, batch):
                        output.add(detected)
    except (KeyboardInterrupt, OSError, CommandError) as error:
        return error
    return None


def _read(picture: _Picture) -> tuple[_Picture, Pixels | CommandError]:
    try:
        return picture, np.array(read_picture(picture.path, data=picture.data))
    except CommandError as error:
        return picture, error


def _detect_batch(
    detector: BatchDetector, batch: Sequence[tuple[_Picture, Pixels | CommandError]]
) -> Iterator[tuple[_Picture, Detected | CommandError]]:
    readable = [(picture.image_id, pixels) for picture, pixels in batch if not isinstance(pixels, CommandError)]
    detected = iter(detector.detect(readable))
    for picture, pixels in batch:
        yield picture, pixels if isinstance(pixels, CommandError) else next(detected)


class _Detections:
    """What was found on the pictures that are done, and which failed."""

    def __init__(self, threshold: float, names: Sequence[str], overwrite: bool, records: Records) -> None:
        self._threshold, self._names, self._overwrite = threshold, names, overwrite
        self.records = records
        self.found: list[dict[str, Any]] = []
        self.failed: dict[Path, str] = {}
        self.pictures = 0

    def draw(self, picture_and_detected: tuple[_Picture, Detected | CommandError]) -> _Drawn:
        """Draw what was found on a picture into its file; called in several threads."""
        from PIL import Image

        picture, detected = picture_and_detected
        if isinstance(detected, CommandError):
            return _Drawn(picture, [], detected)
        results = [{**result, "file_name": picture.path.as_posix()} for result in detected.results]
        classes = [self._names[label] for label in detected.shown["labels"].tolist()]
        try:
            with writing(picture.target, self._overwrite) as temporary:
                drawn = draw_detections(Image.fromarray(detected.pixels), detected.shown, classes)
                drawn.save(temporary, format="JPEG", quality=90)
        except CommandError as error:
            return _Drawn(picture, results, error)
        counts = ", ".join(f"{count} {name}" for name, count in Counter(classes).most_common())
        nothing = f"nothing that scores {self._threshold:g}"
        return _Drawn(picture, results, f"{picture.path} -> {picture.target}: {counts or nothing}")

    def add(self, drawn: _Drawn) -> str:
        """Write down what was found on the next picture; returns the line to print, or nothing where that failed."""
        picture, results, summary = drawn
        self.records.add(results)  # whatever keeps them from the disk ends the work
        self.found += results
        if isinstance(summary, CommandError):
            self.failed[picture.path] = str(summary)
            return ""
        self.pictures += 1
        return summary


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """COCO's ids of pictures that are called as COCO's, 000000397133.jpg, or else 1, 2, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))
