"""``omniops detect``: pictures in, the same pictures with what was found drawn on them, and COCO results, out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from rich.markup import escape

from omniops.cli.common import CommandError, DeviceOption, choose_device, print_lines, progress
from omniops.cli.detect.detector import detect_objects, fail_for, load_detector, require_detection
from omniops.cli.detect.options import (
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
from omniops.cli.outputs import OverwriteOption, Records, lines_of, require_new, writing
from omniops.cli.pictures import find_pictures, read_picture
from omniops.drawing import draw_detections

if TYPE_CHECKING:
    import torch

    from omniops.detection import CARAFERCNN

RESULTS = "detections.json"
LOWEST_SCORE = 0.05
"""Of a detection in the results: MMDetection's."""


def detect(
    images: PicturesArgument,
    weights: WeightsOption = None,
    model: ModelOption = Model.MASK,
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    out: OutOption = Path("omniops-detections"),
    threshold: ThresholdOption = 0.5,
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
    targets = [out / name for name in _output_names(paths)]
    results = out / RESULTS
    require_new([*targets, results, lines_of(results)], overwrite, paths)
    say("loading PyTorch and torchvision")
    chosen = choose_device(device)
    require_detection()
    detector = load_detector(model, weights, chosen, box_score_thresh=min(LOWEST_SCORE, threshold))
    say(f"looking at {len(paths)} pictures" if len(paths) > 1 else f"looking at {paths[0]}")

    detections = _Detections(detector, chosen, threshold, overwrite, Records(results, overwrite))
    stopped = _detect_until_stopped(detections, paths, targets)
    detections.records.finish(detections.found)
    if isinstance(stopped, OSError):  # of the output, which nobody reads or nothing takes
        raise stopped
    print_lines(f"Wrote {len(detections.found)} detections in {detections.pictures} pictures to {results}")
    failed = detections.failed
    if stopped is not None:
        print(*failed.values(), sep="\n", end="\n" if failed else "", file=sys.stderr)
        done = f"{detections.pictures} of {len(paths)} images were done"
        raise CommandError(f"{cause(stopped)}: {done}", exit_status(stopped))
    fail_for(failed, len(paths))


def _detect_until_stopped(
    detections: _Detections, paths: Sequence[Path], targets: Sequence[Path]
) -> BaseException | None:
    """Find what is on the pictures; returns what ended that early, after which what was found so far is kept."""
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(paths))
            for path, image_id, target in zip(paths, _image_ids(paths), targets, strict=True):
                raise_received()
                bar.update(task, description=escape(path.name))
                summary = detections.add(path, image_id, target)
                if summary:
                    print_lines(summary, above=bar)
                bar.advance(task)
    except (KeyboardInterrupt, OSError, CommandError) as error:
        return error
    return None


class _Detections:
    """What was found on the pictures that are done, and which failed."""

    def __init__(
        self, detector: CARAFERCNN, device: torch.device, threshold: float, overwrite: bool, records: Records
    ) -> None:
        self._detector, self._device, self._threshold, self._overwrite = detector, device, threshold, overwrite
        self.records = records
        self.found: list[dict[str, Any]] = []
        self.failed: dict[Path, str] = {}
        self.pictures = 0

    def add(self, path: Path, image_id: int, target: Path) -> str:
        """Find what is on a picture and write both; returns the line to print, or nothing where that failed."""
        from omniops.detection import COCO_CATEGORIES, coco

        try:
            picture = read_picture(path)
            found = detect_objects(self._detector, picture, self._device)
            records = [{**result, "file_name": path.as_posix()} for result in coco.to_results(found, image_id)]
            shown = {name: value[found["scores"] >= self._threshold] for name, value in found.items()}
        except CommandError as error:
            self.failed[path] = str(error)
            return ""
        self.records.add(records)  # whatever keeps them from the disk ends the work
        self.found += records
        classes = [COCO_CATEGORIES[label] for label in shown["labels"].tolist()]
        try:
            with writing(target, self._overwrite) as temporary:
                draw_detections(picture, shown, classes).save(temporary, format="JPEG", quality=90)
        except CommandError as error:
            self.failed[path] = str(error)
            return ""
        self.pictures += 1
        counts = ", ".join(f"{count} {name}" for name, count in Counter(classes).most_common())
        return f"{path} -> {target}: {counts or f'nothing that scores {self._threshold:g}'}"


def _output_names(paths: Sequence[Path]) -> list[str]:
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


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """COCO's ids of pictures that are called as COCO's, 000000397133.jpg, or else 1, 2, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))
