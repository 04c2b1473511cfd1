"""What is done beside the model: reading in threads before it, drawing and writing in threads after it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """As ``map``; threads compute the next results while the caller is busy with one.

    Args:
        function: called in threads.
        items: taken in the caller's thread.
        threads: how many.
        ahead: how many results may wait for the caller; by default twice as many as threads.

    Raises:
        Exception: what ``function`` raises, in its turn.
    """
    limit = 2 * threads if ahead is None else ahead
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "omniops ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > limit:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class OrderedOutput(Generic[Item, Result]):
    """Items that threads prepare, and one thread consumes in the order in which they were added.

    Leaving it as a context manager consumes all that was added, also after an error or a signal.

    Args:
        prepare: called with an item, in one of several threads.
        consume: called with what ``prepare`` returned, in one thread.
        threads: how many prepare.
        waiting: how many items may be on their way; ``add`` waits for room.
    """

    def __init__(
        self, prepare: Callable[[Item], Result], consume: Callable[[Result], None], threads: int, waiting: int
    ) -> None:
        self._prepare, self._consume = prepare, consume
        self._pool = ThreadPoolExecutor(threads, "omniops prepares")
        self._room = threading.Semaphore(waiting)
        self._futures: queue.SimpleQueue[Future[Result] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._is_closed = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._consume_all, name="omniops consumes")
        self._thread.start()

    def add(self, item: Item) -> None:
        """Hand on an item; raises what went wrong with one before it, after which none is consumed."""
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._futures.put(self._pool.submit(self._prepare, item))

    def close(self) -> BaseException | None:
        """Wait until all is consumed, and raise a signal only then; returns what went wrong."""
        if not self._is_closed:
            self._is_closed = True
            self._futures.put(None)
        interrupted: KeyboardInterrupt | None = None
        while not self._is_over.is_set():  # a thread's join, interrupted, takes it for ended in Python 3.12 and before
            try:
                self._is_over.wait()
            except KeyboardInterrupt as error:  # noqa: PERF203  # who handles it may close what is written to
                interrupted = error
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        if interrupted is not None:
            raise interrupted
        return self._error

    def __enter__(self) -> OrderedOutput[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wrong = self.close()
        if error is None and wrong is not None:
            raise wrong

    def _consume_all(self) -> None:
        while (future := self._futures.get()) is not None:
            if self._error is None:
                self._consume_one(future)
            self._room.release()
        self._is_over.set()

    def _consume_one(self, future: Future[Result]) -> None:
        try:
            self._consume(future.result())
        except BaseException as error:  # for the thread that adds
            self._error = error
