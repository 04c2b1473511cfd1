"""``omniops segment`` of a video."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress, TimeRemainingColumn

from omniops.cli.common import CommandError, Heartbeat, print_lines, progress
from omniops.cli.errors import cause, exit_status, say
from omniops.cli.outputs import Records
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.records import NOT_FINITE, Record, mask_record, numbered_masks, sort_by_area
from omniops.cli.segment.request import Request
from omniops.drawing import VideoWriter, draw_prompts, paint
from omniops.formatting import digits
from omniops.sam2.frames import Frames, IncompleteVideoWarning
from omniops.sam2.video_predictor import SAM2VideoPredictor

if TYPE_CHECKING:
    from torch import Tensor

_STOPPING = (KeyboardInterrupt, CommandError, RuntimeError, ValueError, OSError)
"""What ends the work, and what was found so far is kept."""


class _MaskFiles:
    """The files of a video's masks, written as they are found: their records, and a video that shows them."""

    def __init__(self, request: Request, video: Frames, prompts: Mapping[tuple[int, int], Prompts]) -> None:
        self._prompts = prompts
        self._times = video.times
        self._writer = VideoWriter(request.out, like=video)
        self._records = Records(request.out.with_suffix(".json"), request.overwrite)
        self._by_frame: dict[int, list[Record]] = {}

    def add_masks(self, frame: int, numbers: Iterable[int], logits: Tensor) -> list[Record]:
        """Write a record of each object on a frame; returns them."""
        if not logits.isfinite().all():
            raise CommandError(NOT_FINITE, status=1)
        masks = (logits[:, 0] > 0).cpu().numpy()
        position = {"frame": frame} if self._times is None else {"frame": frame, "time": float(self._times[frame])}
        records = [{**position, **mask_record(number, mask)} for number, mask in zip(numbers, masks, strict=True)]
        self._records.add(records)
        self._by_frame[frame] = records
        return records

    def add_frame(self, frame: int, pixels: NDArray[np.uint8], records: list[Record]) -> None:
        """Append a frame with the masks on it to the video; frames come in order."""
        paint(pixels, numbered_masks(sort_by_area(records)))
        picture = Image.fromarray(pixels)
        for (prompted_frame, number), object_prompts in self._prompts.items():
            if prompted_frame == frame:
                draw_prompts(picture, number, object_prompts.points, object_prompts.labels, object_prompts.box)
        self._writer.write(np.array(picture), None if self._times is None else float(self._times[frame]))

    @property
    def frames(self) -> int:
        """How many have records."""
        return len(self._by_frame)

    def close(self) -> Iterator[BaseException]:
        """End both files; yields what kept them from it."""
        try:
            self._writer.close()
        except OSError as error:
            yield error
        if self.frames:
            try:
                self._records.finish([record for _, records in sorted(self._by_frame.items()) for record in records])
            except CommandError as error:
                yield error


def segment_video(request: Request) -> None:
    """Segment a video, and write it with its masks as they come."""
    with _collect_warnings() as opening_warnings:
        video = _open_frames(request.source)
    check_prompts(request.prompts, request.source, video.width, video.height, len(video))
    prompts = group_prompts(request.prompts)
    predictor = SAM2VideoPredictor(request.model.load())
    count = len({number for _, number in prompts})
    say(f"following {count} {'object' if count == 1 else 'objects'} through {len(video)} frames")
    files = _MaskFiles(request, video, prompts)
    stopped: BaseException | None = None
    started = perf_counter()
    with _collect_warnings() as tracking_warnings:
        try:
            with progress(TimeRemainingColumn()) as bar:
                count_frame = _frame_counter(bar, len(video))
                for frame, pixels, records in _propagate(predictor, request.source, prompts, files, count_frame):
                    files.add_frame(frame, pixels, records)
        except _STOPPING as error:
            stopped = error
    seconds = perf_counter() - started
    unwritten = list(files.close())
    frames = files.frames
    if frames and not unwritten:
        speed = f"{frames} of {len(video)} frames in {digits(seconds)} s, {frames / seconds:.2f} frames/s"
        written = f"Wrote {request.out} and {request.out.with_suffix('.json')}"
        random = ["The weights are random: these masks mean nothing."] if request.model.random_weights else []
        print_lines(f"{speed}, on {device_and_dtype(predictor.model)}", *random, written)
    for message in dict.fromkeys(map(str, opening_warnings + tracking_warnings)):
        print(message, file=sys.stderr)
    kept = f"the masks of {frames} of {len(video)} frames were kept"
    if stopped is not None or unwritten:
        why = dict.fromkeys(cause(error) for error in (stopped, *unwritten) if error is not None)
        raise CommandError(f"{'; '.join(why)}: {kept}", exit_status(stopped or unwritten[0]))
    if frames < len(video) or any(isinstance(warning, IncompleteVideoWarning) for warning in opening_warnings):
        raise CommandError(f"{request.source} is not whole: {kept}", status=1)


def _open_frames(source: Path) -> Frames:
    try:
        return Frames(source)
    except ValueError as error:
        nor = "" if source.is_dir() else "; nor is it a picture that Pillow can read"
        raise CommandError(f"{error}{nor}") from None


@contextmanager
def _collect_warnings() -> Iterator[list[Warning]]:
    """What is warned of meanwhile: where a video breaks off or is damaged. It is there at the end."""
    collected: list[Warning] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield collected
        finally:
            shown = (UserWarning, IncompleteVideoWarning)
            collected += [
                warning.message
                for warning in caught
                if isinstance(warning.message, Warning) and warning.category in shown
            ]


def _frame_counter(bar: Progress, total: int) -> Callable[[], None]:
    """To be called at each of so many frames."""
    task = bar.add_task("", total=total)
    heartbeat = Heartbeat(bar)
    started = perf_counter()

    def count_frame() -> None:
        done = int(bar.tasks[0].completed) + 1
        speed = f"{done / (perf_counter() - started):.2f} frames/s"
        bar.update(task, completed=done, description=speed)
        heartbeat.beat(f"{done} of {total} frames, {speed}")

    return count_frame


def _propagate(
    predictor: SAM2VideoPredictor,
    source: Path,
    prompts: Mapping[tuple[int, int], Prompts],
    files: _MaskFiles,
    count_frame: Callable[[], None],
) -> Iterator[tuple[int, NDArray[np.uint8], list[Record]]]:
    """Each frame of a video in order, and a record of each object on it; ``count_frame`` is called at each."""
    state = predictor.init_state(source)
    for (frame, number), object_prompts in prompts.items():
        predictor.add_new_points_or_box(
            state, frame, number, object_prompts.points or None, object_prompts.labels or None, box=object_prompts.box
        )
    first = min(frame for frame, _ in prompts)
    before: dict[int, list[Record]] = {}
    stopped: BaseException | None = None
    try:
        for frame, numbers, logits in predictor.propagate_in_video(state, first, reverse=True):
            before[frame] = files.add_masks(frame, numbers, logits)
            count_frame()
    except _STOPPING as error:
        stopped = error
    for frame, records in sorted(before.items()):
        yield frame, state.frames[frame], records
    if stopped is not None:
        raise stopped
    for frame, numbers, logits in predictor.propagate_in_video(state, first):
        if frame not in before:
            records = files.add_masks(frame, numbers, logits)
            count_frame()
            yield frame, state.frames[frame], records
