"""Whose turn it is at a predictor, which does one thing at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# A frame that so many clicks went before goes next, if no click that waits had to wait for a frame already.
_PATIENCE = 8


class Turns:
    """A lock for one exchange with a predictor, which lets clicks go before frames of a propagation.

        with turns.click():
            masks = inference.add(...)

    Clicks are served in the order in which they came, and so are frames, which makes sessions that are tracked share
    the predictor evenly. A click waits for one frame at most, however many are waiting: for that in progress when it
    comes, or, where clicks leave no gap, for one that is let in after 8 of them, so that tracking never stands still.
    A turn is held by a thread, which must not take a second one within the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clicks: deque[_Waiter] = deque()
        self._frames: deque[_Waiter] = deque()
        self._holder: _Waiter | None = None
        self._clicks_before_frame = 0

    @contextmanager
    def click(self, timeout: float | None = None) -> Iterator[None]:
        """A turn for what a person waits for.

        Raises:
            TimeoutError: if it is not this one's turn within ``timeout`` seconds.
        """
        waiter = self._take(self._clicks, timeout)
        try:
            yield
        finally:
            self._release(waiter)

    @contextmanager
    def frame(self, timeout: float | None = None) -> Iterator[None]:
        """A turn for one frame of a propagation, or for other work that may wait; raises as ``click`` does."""
        waiter = self._take(self._frames, timeout)
        try:
            yield
        finally:
            self._release(waiter)

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._clicks) + len(self._frames)

    def _take(self, waiting: deque[_Waiter], timeout: float | None) -> _Waiter:
        waiter = _Waiter()
        with self._lock:
            waiter.met_frame = self._holder is not None and self._holder.is_frame
            waiter.is_frame = waiting is self._frames
            waiting.append(waiter)
            self._advance()
        try:
            is_called = waiter.called.wait(timeout)
        except BaseException:  # as of Ctrl-C: the turn must not stay with somebody who left
            self._leave(waiter, waiting)
            raise
        if not is_called and self._leave(waiter, waiting, keep_turn=True):
            raise TimeoutError(f"there was no turn within {timeout:g} s")
        return waiter

    def _leave(self, waiter: _Waiter, waiting: deque[_Waiter], keep_turn: bool = False) -> bool:
        """Whether it was still waiting; otherwise its turn had come, which ends unless ``keep_turn``."""
        with self._lock:
            if self._holder is not waiter:
                waiting.remove(waiter)
                return True
        if not keep_turn:
            self._release(waiter)
        return False

    def _release(self, waiter: _Waiter) -> None:
        with self._lock:
            assert self._holder is waiter
            self._holder = None
            self._advance()

    def _advance(self) -> None:
        """Give the turn to the next, if nobody has it. The lock is held."""
        if self._holder is not None or not (self._clicks or self._frames):
            return
        if self._is_frame_next():
            self._clicks_before_frame = 0
            self._holder = self._frames.popleft()
            for click in self._clicks:
                click.met_frame = True
        else:
            self._clicks_before_frame = self._clicks_before_frame + 1 if self._frames else 0
            self._holder = self._clicks.popleft()
        self._holder.called.set()

    def _is_frame_next(self) -> bool:
        if not self._clicks or not self._frames:
            return bool(self._frames)
        return self._clicks_before_frame >= _PATIENCE and not any(click.met_frame for click in self._clicks)


class _Waiter:
    """Somebody who waits for a turn, and whether a frame was computed meanwhile."""

    __slots__ = ("called", "is_frame", "met_frame")

    def __init__(self) -> None:
        self.called = threading.Event()
        self.is_frame = False
        self.met_frame = False
