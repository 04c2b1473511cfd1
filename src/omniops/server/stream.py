"""The framing of /propagate_in_video: multipart/x-savi-stream."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from omniops.server.errors import UNKNOWN_ERROR, ServerError

# The official front end takes all after "boundary=" for the boundary: no quotes, nothing behind it.
CONTENT_TYPE = "multipart/x-savi-stream; boundary=frame"

_logger = logging.getLogger(__name__)


def part(frame_index: int, masks: list[tuple[int, dict[str, Any]]]) -> bytes:
    """One frame's part.

    Args:
        masks: each object's id and mask, as ``{"size": [H, W], "counts": ...}``, in the objects' order.
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


class Parts:
    """The parts of a propagation, as WSGI iterates over them; the first is computed when this is made.

    So what goes wrong before it is raised here, where an answer with a status is still possible. Closing it, which WSGI
    servers do when the client went away, ends the propagation.

    Args:
        frames: (frame, masks), as ``part`` takes them.
        on_close: called once, when it is closed or garbage; not where making it raises.
    """

    def __init__(
        self,
        frames: Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._frames = frames
        self._first: list[bytes] = []
        self._is_over = False
        try:
            for frame_index, masks in frames:
                self._first.append(part(frame_index, masks))
                break
        except BaseException:
            self._close_frames()
            raise
        # A response that is never iterated over may never be closed either.
        self._close = weakref.finalize(self, on_close)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first:
            return self._first.pop()
        if self._is_over:
            raise StopIteration
        try:
            return part(*next(self._frames))
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
        try:
            self._close_frames()
        finally:
            self._close()

    def _close_frames(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()
