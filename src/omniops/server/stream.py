"""The framing of /propagate_in_video: multipart/x-savi-stream."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from omniops.server.errors import UNKNOWN_ERROR, ServerError
from omniops.server.masks import Masks

# The official front end takes all after "boundary=" for the boundary: no quotes, nothing behind it.
CONTENT_TYPE = "multipart/x-savi-stream; boundary=frame"

_STALLED = 10.0  # seconds after which a reader that takes nothing may lose its slot to another

_logger = logging.getLogger(__name__)


def body_part(frame_index: int, masks: Masks) -> bytes:
    """The body part of a frame.

    Args:
        masks: each object's id and mask, in the objects' order.
    """
    results = [
        {"object_id": object_id, "mask": {"size": list(mask["size"]), "counts": mask["counts"]}}
        for object_id, mask in masks
    ]
    body = json.dumps({"frame_index": frame_index, "results": results}).encode()
    return (
        b"--frame\r\n"
        b"Content-Type: application/json; charset=utf-8\r\n"
        b"Frame-Current: -1\r\n"
        b"Frame-Total: -1\r\n"
        b"Mask-Type: RLE[]\r\n"
        b"Content-Length: %d\r\n"
        b"\r\n"
        b"%s"
    ) % (len(body), body)


def failure(message: str) -> bytes:
    """What ends a stream that failed after its first part: an own part with the words, and one that is cut short.

    The official front end skips a part that is not JSON, and takes a stream that ends inside of a part for an error.
    """
    body = json.dumps({"error": {"message": message}}).encode()
    return (
        b"--frame\r\n"
        b"Content-Type: application/problem+json; charset=utf-8\r\n"
        b"Content-Length: %d\r\n"
        b"\r\n"
        b"%s"
        b"--frame\r\n"
        b"Content-Type: application/json; charset=utf-8\r\n"
    ) % (len(body), body)


class MultipartStream:
    """The body parts of a propagation, as WSGI iterates over them; the first is computed when this is made.

    So what goes wrong before it is raised here, where an answer with a status is still possible. Closing it, which WSGI
    servers do when the client went away, ends the propagation.

    Args:
        frames: (frame, masks), as ``body_part`` takes them.
        on_close: called once, when it is closed or garbage; not where making it raises. Garbage is collected anywhere,
            also where a lock is held, so it must not take one.
        break_off: ends the connection of who reads.
    """

    def __init__(
        self,
        frames: Iterator[tuple[int, Masks]],
        on_close: Callable[[], None] = lambda: None,
        break_off: Callable[[], None] = lambda: None,
    ) -> None:
        self.break_off = break_off
        self.waits_since: float | None = None
        """When the last part was handed over, if the next has not been asked for; by ``time.monotonic``."""
        self._frames = frames
        self._first: list[bytes] = []
        self._is_over = False
        try:
            for frame_index, masks in frames:
                self._first.append(body_part(frame_index, masks))
                break
        except BaseException:
            self._close_frames()
            raise
        # A response that is never iterated over may never be closed either.
        self._close = weakref.finalize(self, on_close)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.waits_since = None
        chunk = self._next()
        self.waits_since = time.monotonic()
        return chunk

    def _next(self) -> bytes:
        if self._first:
            return self._first.pop()
        if self._is_over:
            raise StopIteration
        try:
            return body_part(*next(self._frames))
        except StopIteration:
            self._is_over = True
            raise
        except ServerError as error:
            message = error.message
        except Exception:
            _logger.exception("A propagation failed")
            message = UNKNOWN_ERROR
        self._is_over = True
        return failure(message)

    def close(self) -> None:
        """End the propagation, if it has not ended; may be called again."""
        self._is_over = True
        self.waits_since = None
        try:
            self._close_frames()
        finally:
            self._close()

    def _close_frames(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


class StreamSlots:
    """How many streams there may be at once, each of which takes a thread of the server while it lasts.

    A reader that has stalled for 10 seconds loses its slot, and the connection, once another asks for one.
    """

    def __init__(self, count: int) -> None:
        # Unlike a semaphore, a SimpleQueue may be put to by a finalizer that interrupts this thread within ``get``.
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[MultipartStream] = weakref.WeakSet()

    def take(self, timeout: float) -> bool:
        """Whether there is a free slot, or one becomes free within ``timeout`` seconds; ``give_back`` returns it."""
        with suppress(queue.Empty):
            self._free.get_nowait()
            return True
        stalled = self._stalled()
        if stalled is not None:
            stalled.break_off()
        with suppress(queue.Empty):
            self._free.get(timeout=timeout)
            return True
        return False

    def give_back(self) -> None:
        """Free a slot. Takes no lock."""
        self._free.put(None)

    def watch(self, stream: MultipartStream) -> None:
        """Have a stream that has a slot lose it if its reader stalls."""
        with self._lock:
            self._open.add(stream)

    def _stalled(self) -> MultipartStream | None:
        """The stream that has waited longest for its reader, if for too long."""
        latest = time.monotonic() - _STALLED
        with self._lock:
            waiting = [(stream.waits_since, stream) for stream in self._open]
        late = [(since, stream) for since, stream in waiting if since is not None and since <= latest]
        return min(late, key=lambda item: item[0])[1] if late else None
