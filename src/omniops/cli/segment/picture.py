"""``omniops segment`` of pictures: they are read and written in threads beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import TimeRemainingColumn

from omniops import device as devices
from omniops.cli.common import CommandError, Heartbeat, print_lines, progress
from omniops.cli.errors import reason, say
from omniops.cli.pictures import read_picture
from omniops.cli.pipeline import OrderedOutput, map_ahead
from omniops.cli.segment.files import SETS, file_of_set, files_of_picture, in_words
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.records import NOT_FINITE, Record, mask_record
from omniops.cli.segment.request import Request
from omniops.cli.segment.results import write_picture, write_sets
from omniops.formatting import digits

if TYPE_CHECKING:
    from omniops.annotations import Annotations
    from omniops.sam2.modeling.sam2 import SAM2Base

_POINTS_PER_BATCH, _POINTS_PER_BATCH_ON_CPU = 64, 8
_MANY_POINTS_ON_CPU = 256
_NUM_THREADS = 4
"""That read, and as many that write."""
_NUM_WAITING = 8
"""Pictures that are to be written."""


@dataclass(frozen=True)
class Everything:
    """What ``SAM2AutomaticMaskGenerator`` is asked for with ``--everything``."""

    points_per_side: int
    pred_iou_thresh: float | None
    stability_score_thresh: float | None
    crop_n_layers: int
    min_mask_region_area: int

    def arguments(self, random_weights: bool) -> dict[str, Any]:
        """As the generator takes them."""
        # Those of random weights are never sure and hardly stable: all of them are shown that are not found twice.
        thresholds = {
            "pred_iou_thresh": 0 if self.pred_iou_thresh is None and random_weights else self.pred_iou_thresh,
            "stability_score_thresh": (
                0 if self.stability_score_thresh is None and random_weights else self.stability_score_thresh
            ),
        }
        return {
            "points_per_side": self.points_per_side,
            "crop_n_layers": self.crop_n_layers,
            "min_mask_region_area": self.min_mask_region_area,
            **{name: value for name, value in thresholds.items() if value is not None},
        }


@dataclass
class Outcomes:
    """How many of many sources are done, and which failed, each by its name with the reason."""

    num_done: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Picture:
    request: Request
    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    prompts: dict[int, Prompts]


@dataclass
class _Found:
    """The mask of an object that was prompted."""

    number: int
    mask: NDArray[np.bool_]
    """(H, W)."""
    score: float
    prompts: Prompts

    def record(self) -> Record:
        """As it is written."""
        record = {**mask_record(self.number, self.mask), "predicted_iou": self.score}
        if self.prompts.points:
            record |= {"point_coords": self.prompts.points, "point_labels": self.prompts.labels}
        if self.prompts.box:
            record["box"] = self.prompts.box
        return record


@dataclass
class _Segmented:
    picture: _Picture
    found: Sequence[_Found | Record]
    """Of prompts, whose masks are encoded where they are written, or of everything."""
    lines: list[str]

    @cached_property
    def records(self) -> list[Record]:
        """As they are written."""
        return [found.record() if isinstance(found, _Found) else found for found in self.found]


def segment_picture(request: Request, everything: Everything | None) -> None:
    """Segment one picture."""
    picture = _read(request)
    segmenter = _Segmenter(request, everything)
    with progress(TimeRemainingColumn()) as bar:
        segmented = segmenter.segment(picture, _points_counter(bar) if everything else None)
    write_picture(request, picture.pixels, picture.prompts, segmented.records, is_one=True)
    written = in_words(path for save in request.save for path in files_of_picture(request.out, save))
    print_lines(*segmented.lines, f"Wrote {written}")


def segment_pictures(
    requests: Sequence[Request], everything: Everything | None, folder: Path, names: Sequence[str], outcomes: Outcomes
) -> None:
    """Segment pictures; ``outcomes`` tells which failed, and the others are segmented all the same.

    ``names`` are of all pictures, those too that an earlier run has done.
    """
    segmenter = _Segmenter(requests[0], everything)
    say(f"segmenting {len(requests)} pictures")
    of_sets: list[Annotations] = []
    started = perf_counter()
    try:
        with progress(TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=len(requests))
            heartbeat = Heartbeat(bar)

            def finish(result: tuple[Request, _Segmented | CommandError, Annotations | None]) -> None:
                request, outcome, annotations = result
                if isinstance(outcome, CommandError):
                    outcomes.failed[request.source.name] = str(outcome)
                else:
                    outcomes.num_done += 1
                    of_sets.extend([annotations] if annotations is not None else [])
                    count = len(outcome.found)
                    objects = "1 object" if count == 1 else f"{count} objects"
                    print_lines(f"{request.source.name} -> {_shown(request)}: {objects}", above=bar)
                bar.advance(task)

            with OrderedOutput(_write, finish, _NUM_THREADS, _NUM_WAITING) as output:
                for number, (request, picture) in enumerate(map_ahead(_try_to_read, requests, _NUM_THREADS)):
                    bar.update(task, description=escape(request.source.name))
                    heartbeat.beat(f"{number} of {len(requests)} pictures")
                    output.add((request, segmenter.try_to_segment(picture)))
    finally:
        written = write_sets(requests[0], folder, of_sets, names) if outcomes.num_done else []
    seconds = perf_counter() - started
    speed = f"{outcomes.num_done} pictures in {digits(seconds)} s, {outcomes.num_done / seconds:.2f} pictures/s"
    random = ["The weights are random: these masks mean nothing."] if segmenter.random_weights else []
    also = f", and {', '.join(map(str, written))}" if written else ""
    print_lines(f"{speed}, on {device_and_dtype(segmenter.model)}", *random, f"Wrote what was found to {folder}{also}")


def _shown(request: Request) -> Path:
    """The file that a line names of those in which a picture is."""
    of_itself = [save for save in request.save if save not in SETS]
    if not of_itself:
        return file_of_set(request.out.parent, request.save[0])
    return files_of_picture(request.out, of_itself[0])[0]


def _read(request: Request) -> _Picture:
    source = request.source
    data = source.place if isinstance(source.place, bytes) else None
    path = source.path or Path(source.name)
    picture = read_picture(path, data=data)
    check_prompts(request.prompts, path, picture.width, picture.height, None)
    prompts = {number: object_prompts for (_, number), object_prompts in group_prompts(request.prompts).items()}
    return _Picture(request, np.array(picture), prompts)


def _try_to_read(request: Request) -> tuple[Request, _Picture | CommandError]:
    try:
        return request, _read(request)
    except CommandError as error:
        return request, error


def _write(
    work: tuple[Request, _Segmented | CommandError],
) -> tuple[Request, _Segmented | CommandError, Annotations | None]:
    request, outcome = work
    if isinstance(outcome, CommandError):
        return request, outcome, None
    picture = outcome.picture
    try:
        annotations = write_picture(request, picture.pixels, picture.prompts, outcome.records, is_one=False)
    except CommandError as error:
        return request, error, None
    return request, outcome, annotations


class _Segmenter:
    """The model, which is loaded once, and what finds the masks of a picture."""

    def __init__(self, request: Request, everything: Everything | None) -> None:
        self.model: SAM2Base = request.model.load()
        self.random_weights = request.model.random_weights
        self._everything = everything
        self._upsampling = request.upsampling.value
        self._predictor: Any = None

    def segment(self, picture: _Picture, count_points: Callable[[int, int], None] | None = None) -> _Segmented:
        """The masks of a picture."""
        try:
            found: Sequence[_Found | Record]
            if self._everything is None:
                found, lines = self._segment_prompts(picture.pixels, picture.prompts)
            else:
                found, lines = self._segment_everything(picture.pixels, self._everything, count_points)
        except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
            height, width = picture.pixels.shape[:2]
            raise CommandError(f"a picture of {width} x {height} pixels: {reason(error)}", status=1) from None
        return _Segmented(picture, found, lines)

    def try_to_segment(self, picture: _Picture | CommandError) -> _Segmented | CommandError:
        """The same, or what went wrong, then or before."""
        if isinstance(picture, CommandError):
            return picture
        try:
            return self.segment(picture)
        except CommandError as error:
            return CommandError(f"{picture.request.source.name}: {error}", error.status)

    def _segment_prompts(
        self, pixels: NDArray[np.uint8], prompts: Mapping[int, Prompts]
    ) -> tuple[list[_Found], list[str]]:
        """The mask of each object, and the lines to print."""
        from omniops.sam2 import SAM2ImagePredictor

        predictor = self._predictor = self._predictor or SAM2ImagePredictor(self.model, upsampling=self._upsampling)
        started = perf_counter()
        predictor.set_image(pixels)
        devices.synchronize(predictor.device)
        encoded = perf_counter()
        found, lines = [], []
        for number, object_prompts in prompts.items():
            masks, scores, _ = predictor.predict(
                object_prompts.points or None,
                object_prompts.labels or None,
                object_prompts.box,
                multimask_output=object_prompts.is_one_click,
            )
            if not np.isfinite(scores).all():
                raise ValueError(NOT_FINITE)
            best = int(scores.argmax())
            mask = np.asarray(masks[best]) > 0
            found.append(_Found(number, mask, float(scores[best]), object_prompts))
            area = np.count_nonzero(mask)
            lines.append(f"object {number}: score {scores[best]:.3f}, {area} pixels ({area / mask.size:.1%})")
        times = f"set_image {digits(encoded - started)} s, predict {digits(perf_counter() - encoded)} s"
        return found, [*lines, f"{times} on {device_and_dtype(self.model)}"]

    def _segment_everything(
        self, pixels: NDArray[np.uint8], everything: Everything, count_points: Callable[[int, int], None] | None
    ) -> tuple[list[Record], list[str]]:
        """A record of each mask, and the lines to print."""
        from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator

        on_cpu = self.model.device.type == "cpu"
        generator = self._predictor = self._predictor or SAM2AutomaticMaskGenerator(
            self.model,
            points_per_batch=_POINTS_PER_BATCH_ON_CPU if on_cpu else _POINTS_PER_BATCH,
            output_mode="coco_rle",
            upsampling=self._upsampling,
            **everything.arguments(self.random_weights),
        )
        points = everything.points_per_side**2
        if count_points is not None:
            half = everything.points_per_side // 2
            advice = f": on a CPU that takes minutes, --grid {half} a quarter of them, --image-size 512 less too"
            say(f"looking at {points} points{advice if on_cpu and points > _MANY_POINTS_ON_CPU else ''}")
        started = perf_counter()
        found = generator.generate(pixels, progress=count_points)
        seconds = perf_counter() - started
        records = [{"id": i, **mask} for i, mask in enumerate(found, start=1)]
        lines = [f"{len(found)} masks of {points} points in {digits(seconds)} s on {device_and_dtype(self.model)}"]
        if self.random_weights:
            lines.append("The weights are random: these masks mean nothing.")
        return records, lines


def _points_counter(bar: Any) -> Callable[[int, int], None]:
    """To be called with how many points of a picture were looked at."""
    task = bar.add_task("points", total=None)
    heartbeat = Heartbeat(bar)

    def show_progress(points: int, total: int) -> None:
        bar.update(task, completed=points, total=total)
        heartbeat.beat(f"{points} of {total} points")

    return show_progress
