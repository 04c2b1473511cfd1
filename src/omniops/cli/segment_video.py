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
from rich.progress import Progress, TimeRemainingColumn

from omniops.cli.common import CommandError, Heartbeat, digits, print_lines, progress
from omniops.cli.errors import cause, exit_status, say
from omniops.cli.outputs import Records
from omniops.cli.segment_parts import (
    NOT_FINITE,
    Prompts,
    Record,
    Work,
    as_record,
    check,
    draw_prompts,
    grouped,
    largest_first,
    masks_of,
    where,
)
from omniops.drawing import VideoWriter, paint
from omniops.sam2.frames import Frames, IncompleteVideoWarning
from omniops.sam2.video_predictor import SAM2VideoPredictor

if TYPE_CHECKING:
    from torch import Tensor

_STOPPING = (KeyboardInterrupt, CommandError, RuntimeError, ValueError, OSError)
"""What ends the work, and what was found so far is kept."""


class _Followed:
    """What was found on the frames of a video, on disk as it is found."""

    def __init__(self, work: Work, video: Frames, prompts: Mapping[tuple[int, int], Prompts]) -> None:
        self._prompts = prompts
        self._times = video.times
        self._writer = VideoWriter(work.out, like=video)
        self._records = Records(work.out.with_suffix(".json"), work.overwrite)
        self._found: dict[int, list[Record]] = {}

    def record(self, frame: int, numbers: Iterable[int], logits: Tensor) -> list[Record]:
        """A record of each object on a frame, written down."""
        if not logits.isfinite().all():
            raise CommandError(NOT_FINITE, status=1)
        masks = (logits[:, 0] > 0).cpu().numpy()
        place = {"frame": frame} if self._times is None else {"frame": frame, "time": float(self._times[frame])}
        records = [{**place, **as_record(number, mask)} for number, mask in zip(numbers, masks, strict=True)]
        self._records.add(records)
        self._found[frame] = records
        return records

    def show(self, frame: int, pixels: NDArray[np.uint8], records: list[Record]) -> None:
        """Append a frame with the masks on it; frames come in order."""
        order = largest_first(records)
        paint(pixels, zip((int(each["id"]) for each in order), masks_of(order), strict=True))
        here = {number: each for (at, number), each in self._prompts.items() if at == frame}
        time = None if self._times is None else float(self._times[frame])
        self._writer.write(draw_prompts(pixels, here), time)

    @property
    def frames(self) -> int:
        """How many have records."""
        return len(self._found)

    def close(self) -> Iterator[BaseException]:
        """End both files; yields what kept them from it."""
        try:
            self._writer.close()
        except OSError as error:
            yield error
        if self.frames:
            try:
                self._records.finish([record for _, records in sorted(self._found.items()) for record in records])
            except CommandError as error:
                yield error


def follow(work: Work) -> None:
    """Segment a video, and write it with its masks as they come."""
    with _collect_warnings() as at_opening:
        video = _open_frames(work.source)
    check(work.written, work.source, video.width, video.height, len(video))
    prompts = grouped(work.written)
    predictor = SAM2VideoPredictor(work.load())
    count = len({number for _, number in prompts})
    say(f"following {count} {'object' if count == 1 else 'objects'} through {len(video)} frames")
    followed = _Followed(work, video, prompts)
    stopped: BaseException | None = None
    started = perf_counter()
    with _collect_warnings() as on_the_way:
        try:
            with progress(TimeRemainingColumn()) as bar:
                count_frame = _frame_counter(bar, len(video))
                for frame, pixels, records in _propagate(predictor, work.source, prompts, followed, count_frame):
                    followed.show(frame, pixels, records)
        except _STOPPING as error:
            stopped = error
    seconds = perf_counter() - started
    unwritten = list(followed.close())
    frames = followed.frames
    if frames and not unwritten:
        speed = f"{frames} of {len(video)} frames in {digits(seconds)} s, {frames / seconds:.2f} frames/s"
        files = f"Wrote {work.out} and {work.out.with_suffix('.json')}"
        random = ["The weights are random: these masks mean nothing."] if work.random_weights else []
        print_lines(f"{speed}, on {where(predictor.model)}", *random, files)
    for each in dict.fromkeys(map(str, at_opening + on_the_way)):
        print(each, file=sys.stderr)
    kept = f"the masks of {frames} of {len(video)} frames were kept"
    if stopped is not None or unwritten:
        why = dict.fromkeys(cause(each) for each in (stopped, *unwritten) if each is not None)
        raise CommandError(f"{'; '.join(why)}: {kept}", exit_status(stopped or unwritten[0]))
    if frames < len(video) or any(isinstance(each, IncompleteVideoWarning) for each in at_opening):
        raise CommandError(f"{work.source} is not whole: {kept}", status=1)


def _open_frames(source: Path) -> Frames:
    try:
        return Frames(source)
    except ValueError as error:
        nor = "" if source.is_dir() else "; nor is it a picture that Pillow can read"
        raise CommandError(f"{error}{nor}") from None


@contextmanager
def _collect_warnings() -> Iterator[list[Warning]]:
    """What is warned of meanwhile: where a video breaks off or is damaged. It is there at the end."""
    said: list[Warning] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield said
        finally:
            shown = (UserWarning, IncompleteVideoWarning)
            said += [each.message for each in caught if isinstance(each.message, Warning) and each.category in shown]


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
    followed: _Followed,
    count_frame: Callable[[], None],
) -> Iterator[tuple[int, NDArray[np.uint8], list[Record]]]:
    """Each frame of a video in order, and a record of each object on it; ``count_frame`` is called at each."""
    state = predictor.init_state(source)
    for (frame, number), each in prompts.items():
        predictor.add_new_points_or_box(state, frame, number, each.points or None, each.labels or None, box=each.box)
    first = min(frame for frame, _ in prompts)
    before: dict[int, list[Record]] = {}
    stopped: BaseException | None = None
    try:
        for frame, numbers, logits in predictor.propagate_in_video(state, first, reverse=True):
            before[frame] = followed.record(frame, numbers, logits)
            count_frame()
    except _STOPPING as error:
        stopped = error
    for frame, records in sorted(before.items()):
        yield frame, state.frames[frame], records
    if stopped is not None:
        raise stopped
    for frame, numbers, logits in predictor.propagate_in_video(state, first):
        if frame not in before:
            records = followed.record(frame, numbers, logits)
            count_frame()
            yield frame, state.frames[frame], records
