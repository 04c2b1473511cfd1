"""Work that takes long, in a few threads of its own, which reports its progress and can be cancelled.

Requests are answered by other threads: they start a job and wait for it, and cancel it when their client is gone.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from omniops.server.errors import Busy, ServerError

Result = TypeVar("Result")

_KEPT_KEYS = 1000
"""Keys whose progress is still reported after the end of their jobs."""
_LOOK_AGAIN = 0.5
"""Seconds between two looks at whether the client is still there."""


class Cancelled(ServerError):  # noqa: N818  # what happened to a job, not a fault
    """The job was cancelled before its end."""

    def __init__(self) -> None:
        super().__init__("It was cancelled.", 409)


class Progress:
    """How far a job is: ``done`` of ``total``, None where that is not known, and ``what`` is done, in words."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = 0
        self.total: int | None = None
        self._cancelled = threading.Event()

    def update(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Report how far the job is.

        Raises:
            Cancelled: where the job was cancelled meanwhile.
        """
        self.done, self.total, self.what = done, total, what or self.what
        self.check()

    def check(self) -> None:
        """Raise ``Cancelled`` where the job was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Cancel the job: its next ``update`` raises."""
        self._cancelled.set()

    def as_json(self) -> dict[str, Any]:
        """What ``GET /progress/<key>`` answers."""
        return {"done": self.done, "total": self.total, "what": self.what}


class Job(Generic[Result]):
    """Work that runs, or waits for its turn."""

    def __init__(self, work: Callable[[Progress], Result], progress: Progress) -> None:
        self.progress = progress
        self._work = work
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, in the thread that calls."""
        try:
            self.progress.check()
            self._result = self._work(self.progress)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether there is a result or an error."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Cancel the job."""
        self.progress.cancel()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end, whatever it is, or for so long."""
        self._ended.wait(seconds)

    def result(self, gone: Callable[[], bool] | None = None) -> Result:
        """Wait for the end. ``gone`` says whether the client went meanwhile, which cancels the job.

        Raises:
            Cancelled: where the job was cancelled; else whatever the work raised.
        """
        while not self._ended.wait(None if gone is None else _LOOK_AGAIN):
            if gone is not None and gone():
                self.cancel()
                raise Cancelled
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # it may be None where Result is


class Budget:
    """The threads that may decode and encode at once, over all jobs."""

    def __init__(self, threads: int) -> None:
        self._free = max(1, threads)
        self._changed = threading.Condition()

    @contextmanager
    def threads(self, max_threads: int | None = None) -> Iterator[int]:
        """Wait for a free thread; take all that are free, ``max_threads`` at most, and give how many these are."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0)
            taken = self._free if max_threads is None else min(max_threads, self._free)
            self._free -= taken
        try:
            yield taken
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


class Jobs:
    """The jobs of a server.

    Args:
        threads: how many threads may decode and encode video at once, over all jobs.
        workers: jobs that run at once.
        waiting: jobs that wait for their turn, at most.
    """

    def __init__(self, threads: int = 1, workers: int = 2, waiting: int = 32) -> None:
        self.budget = Budget(threads)
        self._workers = workers
        self._queue: queue.Queue[Job[Any]] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._running: set[Job[Any]] = set()
        self._progress: OrderedDict[str, Progress] = OrderedDict()

    def start(
        self, work: Callable[[Progress], Result], progress: Progress | None = None, what: str = ""
    ) -> Job[Result]:
        """Have the work done by one of the threads.

        Raises:
            Busy: where too many wait already.
        """
        job = Job(work, progress or Progress(what))
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Busy("The server has too much to do. Try again in a minute.") from None
        self._start_thread()
        return job

    def announce(self, key: str | None, what: str) -> Progress:
        """The progress of a job that begins, which ``progress(key)`` returns."""
        progress = Progress(what)
        if key:
            with self._lock:
                self._progress[key[:100]] = progress
                self._progress.move_to_end(key[:100])
                while len(self._progress) > _KEPT_KEYS:
                    self._progress.popitem(last=False)
        return progress

    def progress(self, key: str) -> Progress | None:
        """What was announced under the key; None where nothing was."""
        with self._lock:
            return self._progress.get(key[:100])

    def close(self, seconds: float = 2.0) -> None:
        """Cancel all jobs, and wait so long for them to notice."""
        end = time.monotonic() + seconds
        with self._lock:
            running = list(self._running)
        while True:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            waiting.cancel()
            waiting.run()  # which ends at once
        for job in running:
            job.cancel()
        while any(not job.ended for job in running) and time.monotonic() < end:
            time.sleep(0.01)

    def _start_thread(self) -> None:
        # Threads begin with the first job: a process that is forked before has none to lose.
        with self._lock:
            if len(self._threads) < self._workers:
                if not self._threads:
                    atexit.register(self.close)
                thread = threading.Thread(target=self._work, name=f"job-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            with self._lock:
                self._running.add(job)
            job.run()
            with self._lock:
                self._running.discard(job)
            del job  # its result is not kept until the next one comes
