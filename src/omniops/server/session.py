"""A video or picture that somebody works on, and its propagation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from omniops.server.errors import NotFound, ServerError
from omniops.server.masks import RLE, Masks
from omniops.server.metrics import Metrics
from omniops.server.predictors import DiedError, Predictor

_MAX_NAME = 200  # characters
_MAX_NAMES = 255  # as many as there may be objects; names may be given before the first prompt
_ENTRY_BYTES = 120  # that Python holds for a mask besides its counts


def missing(reason: str) -> NotFound:
    """The error of a session that is not there."""
    return NotFound(f"Cannot find session ID; it {reason}")


class Owner(Protocol):
    """What a session asks of whoever keeps all sessions: ``Sessions``."""

    metrics: Metrics

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds since some moment."""

    def later(self, job: Callable[[], None]) -> None:
        """Have something done by another thread. Takes no lock."""

    def make_room(self, newest: Session | None = None) -> None:
        """End idle sessions until all together hold no more than they may, but for ``newest``."""

    def lose(self, session: Session) -> None:
        """End a session that its predictor does not know any more."""


class Session:
    """One video or picture in a predictor; made by ``Sessions.start``. Every method may be called from any thread.

    Frames count from 0; points and boxes are (x, y) from 0 to 1 of width and height. Whatever changes the session ends
    its propagation first: the stream ends between two frames. A call that fails changes nothing else.

    Every method raises ``NotFound`` once the session has ended, with the reason; ``ServerError`` for arguments that do
    not fit, with words that a person understands.
    """

    def __init__(
        self,
        owner: Owner,
        predictor: Predictor,
        id: str,
        path: Path,
        name: str,
        guided: bool,
        opened: Mapping[str, Any],
    ) -> None:
        self.id = id
        self.path = path
        """Of the file on the disk."""
        self.name = name
        """The path that the API has for it."""
        self.guided = guided
        self.frames: int = opened["frames"]
        self.width: int = opened["width"]
        self.height: int = opened["height"]
        self.fps: float | None = opened["fps"]
        self.is_picture = self.frames == 1 and self.fps is None
        """Whether it is a picture rather than a video."""
        self.names: dict[int, str] = {}
        """What a person called an object."""
        self.predictor = predictor
        self.predictor_start = predictor.starts
        self.ended: str | None = None
        """Why it is over; set by its owner."""
        self.leaves_at: float | None = None
        """When it ends because its page was left, unless somebody uses it before; set by its owner."""
        self.last_used = owner.clock()
        self._owner = owner
        self._opened_bytes: int = opened["bytes"]
        self._lock = threading.Lock()  # of what follows; never held during an exchange with the predictor
        self._found: dict[int, dict[int, str]] = {}
        self._found_bytes = 0
        self._stream: _Stream | None = None
        self._calls = 0
        self._begun: _Stream | None = None  # what the predictor propagates; read and written within its turns alone

    @property
    def tracking(self) -> bool:
        """Whether it is being propagated."""
        stream = self._stream
        return stream is not None and not stream.is_over

    @property
    def is_busy(self) -> bool:
        """Whether something is computed for it, or waits for its turn; not between two frames of a propagation."""
        return self._calls > 0

    @property
    def nbytes(self) -> int:
        """The bytes that it holds, in the predictor and in this process."""
        in_predictor: int = self.predictor.memory["sessions"].get(self.id, self._opened_bytes)
        return in_predictor + self._found_bytes

    @property
    def found(self) -> dict[int, dict[int, str]]:
        """The masks that were found last: {frame: {object: COCO's counts}}. A copy, whose values are not to be changed.

        Every mask is of ``height`` x ``width``.
        """
        with self._lock:
            return dict(self._found)

    def add_points(
        self,
        frame: int,
        object: int,
        points: Sequence[Sequence[float]],
        labels: Sequence[int],
        clear: bool = True,
    ) -> Masks:
        """Prompt an object with points (n, 2) whose labels are 1 where it is and 0 where it is not.

        Args:
            clear: whether they replace the points that the object has on this frame.

        Returns:
            the masks of all objects on this frame.
        """
        return self._prompt(frame, "add", object, [list(point) for point in points], list(labels), None, clear)

    def add_box(
        self,
        frame: int,
        object: int,
        box: Sequence[float],
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        clear: bool = True,
    ) -> Masks:
        """Prompt an object with the box [x0, y0, x1, y1] around it, and with points within it."""
        return self._prompt(frame, "add", object, [list(point) for point in points], list(labels), list(box), clear)

    def add_mask(self, frame: int, object: int, rle: Mapping[str, Any]) -> Masks:
        """Prompt an object with its mask."""
        return self._prompt(frame, "add_mask", object, dict(rle))

    def clear_frame(self, frame: int, object: int) -> Masks:
        """Take back an object's prompts on a frame; the masks of all objects there."""
        return self._prompt(frame, "clear_frame", object)

    def clear_video(self) -> None:
        """Take back all objects; the session lives on."""
        with self._change() as inference:
            inference.clear_video(self.id)
            with self._lock:
                self._found, self._found_bytes = {}, 0
                self.names.clear()

    def remove(self, object: int) -> list[tuple[int, Masks]]:
        """Take back one object; the remaining ones' masks on each frame where it had prompts."""
        with self._change() as inference:
            changed: list[tuple[int, Masks]] = inference.remove(self.id, object)
            with self._lock:
                self.names.pop(object, None)
                for frame, found in list(self._found.items()):
                    self._put(frame, {other: counts for other, counts in found.items() if other != object})
                for frame, masks in changed:
                    self._put(frame, _counts(masks))
            return changed

    def rename(self, object: int, name: str) -> None:
        """Call an object by a name; an empty one is none."""
        self._check()
        if len(name) > _MAX_NAME:
            raise ServerError(f"A name has at most {_MAX_NAME} characters, got {len(name)}.")
        with self._lock:
            if not name:
                self.names.pop(object, None)
            elif object in self.names or len(self.names) < _MAX_NAMES:
                self.names[object] = name
            else:
                raise ServerError(f"At most {_MAX_NAMES} objects have names: take one back first.")

    def preview(
        self,
        frame: int,
        points: Sequence[Sequence[float]],
        labels: Sequence[int],
        box: Sequence[float] | None = None,
    ) -> RLE:
        """The mask that a prompt would give for a new object. Changes nothing, and lets clicks go before it."""
        with self._turn("frame") as inference:
            mask: RLE = inference.preview(
                self.id, frame, [list(point) for point in points], list(labels), None if box is None else list(box)
            )
            return mask

    def everything(self, frame: int, points_per_side: int = 16) -> list[dict[str, Any]]:
        """All that is found on a frame by a grid of points; see ``Inference.next_everything``. Changes nothing.

        Each batch of points is a turn of its own, so that clicks and frames go in between.
        """
        self._count(1)  # it is busy between two turns, too
        try:
            with self.predictor.searching:
                with self._turn("frame") as inference:
                    number: int = inference.begin_everything(self.id, frame, points_per_side)
                while True:
                    with self._turn("frame") as inference:
                        masks: list[dict[str, Any]] | None = inference.next_everything(self.id, number)
                    if masks is not None:
                        return masks
        finally:
            self._count(-1)

    def propagate(self, start: int = 0) -> Propagation:
        """Track all objects from a frame to the end, then from it back to the beginning. Ends one that is in progress.

        Returns:
            an iterator of (frame, masks of all objects), each computed when it is asked for; see ``Propagation``.
        """
        stream = _Stream()
        with self._lock:
            previous, self._stream = self._stream, stream
        if previous is not None:
            previous.end()
        total = 0
        try:
            self._owner.make_room(self)
            with self._turn("frame") as inference:
                self._stop_propagation(inference)
                if not stream.is_over:
                    total = inference.begin(self.id, start)
                    self._begun = stream
        except BaseException:
            stream.end()
            raise
        return Propagation(self, stream, total)

    def cancel(self) -> None:
        """End the propagation, if there is one, without waiting for the frame that is being computed."""
        stream = self._end_stream()
        if stream is not None:
            # Whoever reads the stream may have stalled, and would not have the predictor stop.
            self._owner.later(lambda: self._finish(stream))

    def snapshot(self) -> dict[str, Any]:
        """What a page needs that was loaded again.

        Returns:
            session_id, path (the API's), num_frames, width, height, fps, is_picture, tracking, objects, each with
            object_id, name and prompts (frame_index, points, labels, box, has_mask), and frames, each (frame, masks).
        """
        with self._turn("click") as inference:
            prompts: dict[int, dict[int, dict[str, Any]]] = inference.prompts(self.id)
            found = self.found
        size = [self.height, self.width]
        return {
            "session_id": self.id,
            "path": self.name,
            "num_frames": self.frames,
            "width": self.width,
            "height": self.height,
            "fps": self.fps,
            "is_picture": self.is_picture,
            "tracking": self.tracking,
            "objects": [
                {"object_id": object, "name": self.names.get(object, ""), "prompts": _prompts(frames)}
                for object, frames in prompts.items()
            ],
            "frames": [
                (frame, [(object, {"size": size, "counts": counts}) for object, counts in found[frame].items()])
                for frame in sorted(found)
            ],
        }

    def end(self, error: ServerError | None) -> None:
        """For the owner, which has set ``ended``: end the propagation, with an error if whoever reads it must know."""
        self._end_stream(error)

    def _finish(self, stream: _Stream) -> None:
        """End a propagation, also in the predictor, which need not keep what it had for it any longer."""
        stream.end()
        if self._begun is stream:
            with suppress(ServerError), self._turn("click") as inference:
                self._stop(inference, stream)

    def _next(self, stream: _Stream) -> tuple[int, Masks] | None:
        """The next frame of a propagation, and the masks on it; None if it is over."""
        with self._turn("frame") as inference:
            result: tuple[int, Masks] | None = None if stream.is_over else inference.next(self.id)
            if result is None or stream.is_over:  # ended while it was computed
                stream.end()
                self._stop(inference, stream)
                return None
            self._keep(*result)
            self.predictor.note_memory(inference)
        self._owner.metrics.frame()
        self._owner.make_room(self)
        return result

    def _later(self, stream: _Stream) -> None:
        """As ``_finish``, soon and in another thread; takes no lock, so it may be called while garbage is collected."""
        stream.end()
        self._owner.later(lambda: self._finish(stream))

    def _prompt(self, frame: int, method: str, *arguments: Any) -> Masks:
        with self._change() as inference:
            masks: Masks = getattr(inference, method)(self.id, frame, *arguments)
            self._keep(frame, masks)
            return masks

    @contextmanager
    def _change(self) -> Iterator[Any]:
        """A turn for what ends the propagation."""
        arrived = self._owner.clock()
        self._end_stream()
        with self._turn("click") as inference:
            self._stop_propagation(inference)
            yield inference
            self.predictor.note_memory(inference)
        self._owner.metrics.click(self._owner.clock() - arrived)

    @contextmanager
    def _turn(self, kind: Literal["click", "frame"]) -> Iterator[Any]:
        self._check()
        self._count(1)
        try:
            with self.predictor.turn(kind, self.predictor_start) as inference:
                self._check()  # it may have ended while this waited
                yield inference
        except DiedError:
            self._check()  # says so by name
            raise
        except KeyError as error:
            if error.args != (self.id,):
                raise
            self._owner.lose(self)
            self._check()
            raise
        finally:
            self.last_used = self._owner.clock()
            self._count(-1)

    def _count(self, calls: int) -> None:
        with self._lock:
            self._calls += calls

    def _check(self) -> None:
        if self.ended is not None:
            raise missing(self.ended)

    def _end_stream(self, error: ServerError | None = None) -> _Stream | None:
        """The propagation that was in progress and is not any more."""
        with self._lock:
            stream = self._stream
            if stream is None or stream.is_over:
                return None
            stream.end(error)
            return stream

    def _stop_propagation(self, inference: Any) -> None:
        """In a turn: end what the predictor propagates for this session."""
        if self._begun is not None:
            self._begun.end()
            self._stop(inference, self._begun)

    def _stop(self, inference: Any, stream: _Stream) -> None:
        """In a turn: have the predictor drop a propagation, if it has not begun another since."""
        if self._begun is stream:
            self._begun = None
            inference.stop(self.id)

    def _keep(self, frame: int, masks: Masks) -> None:
        with self._lock:
            self._put(frame, _counts(masks))

    def _put(self, frame: int, counts: dict[int, str]) -> None:
        """Replace the masks that were found on a frame. The lock is held."""
        self._found_bytes -= _nbytes(self._found.pop(frame, {}))
        if counts:
            self._found[frame] = counts
            self._found_bytes += _nbytes(counts)


class Propagation(Iterator[tuple[int, Masks]]):
    """The frames of a propagation: (frame, masks of all objects). Between two it holds nothing: no lock, no turn.

    It ends early, without an error, when it is cancelled, when the session is changed, closed or propagated anew, and
    with ``NotFound`` when the session ended otherwise. ``close()``, which a reader calls who wants no more, and garbage
    collection have the predictor drop it.
    """

    def __init__(self, session: Session, stream: _Stream, total: int) -> None:
        self.total = total
        """How many frames there are if nothing ends it early."""
        self._session = session
        self._stream = stream

    def __next__(self) -> tuple[int, Masks]:
        result = None
        if not self._stream.is_over:
            try:
                result = self._session._next(self._stream)
            except ServerError as error:
                self._stream.end(error)
            except BaseException:
                self._session._later(self._stream)
                raise
        if result is None:
            self.close()
            reason, self._stream.error = self._stream.error, None
            raise reason or StopIteration
        return result

    def close(self) -> None:
        """End it."""
        self._session._finish(self._stream)

    def __del__(self) -> None:
        if not self._stream.is_over:
            self._session._later(self._stream)


class _Stream:
    """Whether a propagation is over, and the error that whoever reads it gets. The first end counts."""

    __slots__ = ("error", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self.error: ServerError | None = None

    def end(self, error: ServerError | None = None) -> None:
        if not self.is_over:
            self.error = error
            self.is_over = True


def _prompts(frames: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "frame_index": frame,
            "points": prompt["points"],
            "labels": prompt["labels"],
            "box": prompt["box"],
            "has_mask": prompt["mask"],
        }
        for frame, prompt in sorted(frames.items())
    ]


def _counts(masks: Masks) -> dict[int, str]:
    """COCO's counts by object."""
    return {object: rle["counts"] for object, rle in masks}


def _nbytes(counts: Mapping[int, str]) -> int:
    return sum(len(text) + _ENTRY_BYTES for text in counts.values())
