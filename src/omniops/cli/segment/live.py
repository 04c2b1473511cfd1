"""``omniops segment`` of a live video: a camera, a stream or a pipe."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from omniops.cli.common import CommandError, Heartbeat, print_lines, progress
from omniops.cli.errors import Terminated, cause, exit_status, reason, say
from omniops.cli.pipeline import OrderedOutput
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.options import WhenFull
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.request import Request
from omniops.cli.segment.video import STOPPING, collect_warnings, tracked_frame
from omniops.cli.segment.video_results import FrameFiles, VideoResults
from omniops.cli.segment.window import Window
from omniops.formatting import digits
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.video_predictor import SAM2VideoPredictor

if TYPE_CHECKING:
    from omniops.sam2.inference_state import InferenceState

_NUM_WAITING = 8
_NUM_LATENCIES = 1000
"""Of how many frames, the last, the latency is told at the end."""


def segment_live(request: Request, when_full: WhenFull | None, max_frames: int | None, *, shows: bool) -> None:
    """Segment a live video until it ends, the window is closed, or Ctrl-C.

    Args:
        request: the live video; nothing is written where it saves nothing.
        when_full: what becomes of frames that come too fast.
        max_frames: how many frames are tracked at most.
        shows: whether a window shows it, and takes clicks.
    """
    prompts = group_prompts(request.prompts)
    predictor = SAM2VideoPredictor(request.model.load(), upsampling=request.upsampling.value)
    name = request.source.name
    try:
        frames = LiveFrames(request.source.place, when_full=None if when_full is None else when_full.value)  # type: ignore[arg-type]
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(reason(error), status=1) from None
    with frames:
        check_prompts(request.prompts, name, frames.width, frames.height, sys.maxsize)
        window = Window(f"omniops segment {name}", frames.width, frames.height) if shows else None
        say(f"following {name}, {frames.width} x {frames.height}, until Ctrl-C" + (" or q" if window else ""))
        results = VideoResults(request, None, prompts, keeps_records=False)
        video = _LiveVideo(predictor, frames, prompts, results, window)
        stopped: BaseException | None = None
        started = perf_counter()
        with collect_warnings() as collected:
            try:
                video.follow(max_frames)
            except STOPPING as error:
                stopped = error
            finally:
                if window is not None:
                    window.close()
    seconds = perf_counter() - started
    unwritten = list(results.close()) if request.save else []
    if video.num_frames:
        speed = f"{video.num_frames} frames in {digits(seconds)} s, {video.num_frames / seconds:.2f} frames/s"
        dropped = f"{frames.num_dropped} dropped, latency {digits(median(video.latencies))} s"
        random = ["The weights are random: these masks mean nothing."] if request.model.random_weights else []
        written = [f"Wrote {results.names}"] if request.save and not unwritten else []
        print_lines(f"{speed}, {dropped}, on {device_and_dtype(predictor.model)}", *random, *written)
    for message in dict.fromkeys(map(str, collected)):
        say(message, "warning")
    is_ordinary_end = isinstance(stopped, KeyboardInterrupt) and not isinstance(stopped, Terminated)
    if unwritten or (stopped is not None and not is_ordinary_end):
        why = dict.fromkeys(cause(error) for error in (stopped, *unwritten) if error is not None)
        kept = f"the masks of {results.num_frames} frames were kept"
        raise CommandError(f"{'; '.join(why)}: {kept}", exit_status(stopped or unwritten[0]))


class _LiveVideo:
    """A live video, followed frame by frame."""

    def __init__(
        self,
        predictor: SAM2VideoPredictor,
        frames: LiveFrames,
        prompts: Mapping[tuple[int, int], Prompts],
        results: VideoResults,
        window: Window | None,
    ) -> None:
        self._predictor, self._frames = predictor, frames
        self._prompts, self._results, self._window = prompts, results, window
        self.num_frames = 0
        self.latencies: deque[float] = deque(maxlen=_NUM_LATENCIES)
        """Seconds from the arrival of each of the last frames to its masks."""

    def follow(self, max_frames: int | None) -> None:
        """Follow the objects until the video ends."""
        state = self._predictor.init_state(self._frames)
        first_time = self._frames.time(0)
        with progress() as bar, OrderedOutput(_as_it_is, self._results.write, 1, _NUM_WAITING) as output:
            task = bar.add_task("", total=max_frames)
            heartbeat = Heartbeat(bar)
            tracked = self._predictor.propagate_in_video(state)
            for frame, numbers, logits in tracked:
                if self._add_prompts(state, frame):
                    _, numbers, logits = self._predictor.masks_on_frame(state, frame)
                found = tracked_frame(state, frame, numbers, logits)
                latency = self._frames.latency
                self.latencies.append(latency)
                found.time = self._frames.time(frame) - first_time
                found.more = {"latency": latency}
                files = self._results.files_of(found, self._frames[frame].copy())
                output.add(files)
                self.num_frames += 1
                says = f"{self.num_frames} frames, {self._frames.num_dropped} dropped, {1000 * latency:.0f} ms behind"
                bar.update(task, completed=self.num_frames, description=says)
                heartbeat.beat(says)
                if self._window is not None and files.picture is not None:
                    self._window.show(files.picture)
                if self.num_frames == max_frames or (self._window is not None and not self._window.is_open):
                    return

    def _add_prompts(self, state: InferenceState, frame: int) -> bool:
        """Add those that were given for a frame, and the clicks since the last one; whether there were any."""
        given = {number: prompts for (prompted, number), prompts in self._prompts.items() if prompted == frame}
        for number, prompts in given.items():
            self._predictor.add_new_points_or_box(
                state, frame, number, prompts.points or None, prompts.labels or None, box=prompts.box
            )
        clicks = [] if self._window is None else self._window.take_clicks()
        for click in clicks:
            self._predictor.add_new_points_or_box(
                state, frame, click.number, [(click.x, click.y)], [click.label], clear_old_points=False
            )
        removed = [] if self._window is None else self._window.take_removed()
        for number in removed:
            self._predictor.remove_object(state, number, strict=False)
        return bool((given or clicks or removed) and state.obj_ids)


def _as_it_is(files: FrameFiles) -> FrameFiles:
    return files
