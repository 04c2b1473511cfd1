"""``omniops segment`` of a video: frames are painted and encoded in threads beside the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from rich.progress import Progress, TimeRemainingColumn

from omniops.cli.common import CommandError, Heartbeat, print_lines, progress
from omniops.cli.errors import cause, exit_status, say
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.records import NOT_FINITE
from omniops.cli.segment.request import Request
from omniops.cli.segment.video_results import TrackedFrame, VideoResults
from omniops.formatting import digits
from omniops.sam2 import rle
from omniops.sam2.frames import Frames, IncompleteVideoWarning
from omniops.sam2.video_predictor import SAM2VideoPredictor

if TYPE_CHECKING:
    from torch import Tensor

    from omniops.sam2.inference_state import InferenceState

STOPPING = (KeyboardInterrupt, CommandError, RuntimeError, ValueError, OSError)
"""What ends the work, and what was found so far is kept."""


def segment_video(request: Request) -> None:
    """Segment a video, and write it with its masks as they come."""
    source = request.source.path
    assert source is not None
    with collect_warnings() as opening_warnings:
        video = _open_frames(source)
    check_prompts(request.prompts, source, video.width, video.height, len(video))
    prompts = group_prompts(request.prompts)
    predictor = SAM2VideoPredictor(request.model.load(), upsampling=request.upsampling.value)
    count = len({number for _, number in prompts})
    say(f"following {count} {'object' if count == 1 else 'objects'} through {len(video)} frames")
    results = VideoResults(request, video, prompts)
    stopped: BaseException | None = None
    started = perf_counter()
    with collect_warnings() as tracking_warnings:
        try:
            with progress(TimeRemainingColumn()) as bar:
                _track(predictor, source, prompts, results, _frame_counter(bar, len(video)))
        except STOPPING as error:
            stopped = error
    seconds = perf_counter() - started
    unwritten = list(results.close())
    frames = results.num_frames
    if frames and not unwritten:
        speed = f"{frames} of {len(video)} frames in {digits(seconds)} s, {frames / seconds:.2f} frames/s"
        random = ["The weights are random: these masks mean nothing."] if request.model.random_weights else []
        print_lines(f"{speed}, on {device_and_dtype(predictor.model)}", *random, f"Wrote {results.names}")
    for message in dict.fromkeys(map(str, opening_warnings + tracking_warnings)):
        say(message, "warning")
    kept = f"the masks of {frames} of {len(video)} frames were kept"
    if stopped is not None or unwritten:
        why = dict.fromkeys(cause(error) for error in (stopped, *unwritten) if error is not None)
        raise CommandError(f"{'; '.join(why)}: {kept}", exit_status(stopped or unwritten[0]))
    if frames < len(video) or any(isinstance(warning, IncompleteVideoWarning) for warning in opening_warnings):
        raise CommandError(f"{source} is not whole: {kept}", status=1)


def _open_frames(source: Path) -> Frames:
    try:
        return Frames(source)
    except ValueError as error:
        nor = "" if source.is_dir() else "; nor is it a picture that Pillow can read"
        raise CommandError(f"{error}{nor}") from None


@contextmanager
def collect_warnings() -> Iterator[list[Warning]]:
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


def tracked_frame(state: InferenceState, frame: int, numbers: Sequence[int], logits: Tensor) -> TrackedFrame:
    """What the predictor found on a frame, on the CPU."""
    if not logits.isfinite().all():
        raise CommandError(NOT_FINITE, status=1)
    masks = logits[:, 0] > 0
    counts = rle.count_runs(masks)  # on the GPU: the CPU's threads decode, paint and encode meanwhile
    return TrackedFrame(frame, list(numbers), masks.cpu().numpy(), counts, state.predicted_ious(frame))


def _track(
    predictor: SAM2VideoPredictor,
    source: Path,
    prompts: Mapping[tuple[int, int], Prompts],
    results: VideoResults,
    count_frame: Callable[[], None],
) -> None:
    """Follow the objects back from the first frame with a prompt, then on to the end."""
    state = predictor.init_state(source)
    for (frame, number), object_prompts in prompts.items():
        predictor.add_new_points_or_box(
            state, frame, number, object_prompts.points or None, object_prompts.labels or None, box=object_prompts.box
        )
    first = min(frame for frame, _ in prompts)
    stopped: BaseException | None = None
    try:
        with results.recorded_in_threads() as output:
            for frame, numbers, logits in predictor.propagate_in_video(state, first, reverse=True):
                output.add(tracked_frame(state, frame, numbers, logits))
                count_frame()
    except STOPPING as error:
        stopped = error
    before = results.recorded_frames
    assert isinstance(state.frames, Frames)
    with results.painted_in_threads(state.frames) as output:
        for frame in before:
            output.add(frame)
        if stopped is not None:
            raise stopped
        for frame, numbers, logits in predictor.propagate_in_video(state, first):
            if frame not in before:
                output.add(tracked_frame(state, frame, numbers, logits))
                count_frame()
