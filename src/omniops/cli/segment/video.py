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
from omniops.cli.segment.files import state_of
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.records import NOT_FINITE
from omniops.cli.segment.request import Request
from omniops.cli.segment.resume import KeptState, load_state, tracked_frames
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
    state = load_state(predictor, request, prompts) if request.resume else None
    results = VideoResults(request, video, prompts)
    kept_state = KeptState(state_of(request.out))
    stopped: BaseException | None = None
    started = perf_counter()
    with collect_warnings() as tracking_warnings:
        try:
            if state is None:
                state = _new_state(predictor, source, prompts)
            with progress(TimeRemainingColumn()) as bar:
                _track(
                    predictor,
                    state,
                    min(frame for frame, _ in prompts),
                    results,
                    kept_state,
                    _frame_counter(bar, len(video)),
                )
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
    if stopped is None and not unwritten:
        kept_state.delete()
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


def _new_state(
    predictor: SAM2VideoPredictor, source: Path, prompts: Mapping[tuple[int, int], Prompts]
) -> InferenceState:
    state = predictor.init_state(source)
    for (frame, number), given in prompts.items():
        predictor.add_new_points_or_box(state, frame, number, given.points or None, given.labels or None, box=given.box)
    return state


def _track(
    predictor: SAM2VideoPredictor,
    state: InferenceState,
    first: int,
    results: VideoResults,
    kept_state: KeptState,
    count_frame: Callable[[], None],
) -> None:
    """Follow the objects from the first frame with a prompt back, then on to the end, from where the state is."""
    done = tracked_frames(state)
    back = first
    while back in done:
        back -= 1
    stopped: BaseException | None = None
    try:
        with results.recorded_in_threads() as output:
            for frame in sorted(done):
                output.add(tracked_frame(state, *predictor.masks_on_frame(state, frame)))
                count_frame()
            if back >= 0 and first > 0:
                # From frame 0 nothing is followed back, as in the official predictor.
                for found in predictor.propagate_in_video(state, max(back, 1), reverse=True):
                    if found[0] not in done:
                        output.add(tracked_frame(state, *found))
                        count_frame()
                        kept_state.save_now_and_then(state)
    except STOPPING as error:
        stopped = error
    before = dict.fromkeys(results.recorded_frames)
    # What was followed back is not tracked once more: its masks would be others than those that are written.
    on = first
    while on in before:
        on += 1
    assert isinstance(state.frames, Frames)
    with results.painted_in_threads(state.frames) as output:
        try:
            for frame in before:
                output.add(frame)
            if stopped is not None:
                raise stopped
            if on < len(state.frames):
                for found in predictor.propagate_in_video(state, on):
                    if found[0] not in before:
                        output.add(tracked_frame(state, *found))
                        count_frame()
                        kept_state.save_now_and_then(state)
        except STOPPING:
            if results.num_frames:
                kept_state.save(state)
            raise
