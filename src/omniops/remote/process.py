"""The life of the process: how it is started and asked, and every way in which it ends.

It is a new interpreter, as multiprocessing's spawn starts, but one that does not import the caller's ``__main__``: a
script needs no guard. Request and answer take turns on a socket pair. The process ends when the socket says that nobody
holds the other end any more, also if the caller was killed.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from typing import Any, NamedTuple

from omniops.remote import messages

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from omniops.remote.worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
EXIT_TIMEOUT = 5.0
"""Seconds that a process has to end by itself, before it is killed."""
POLL_INTERVAL = 1.0
"""Seconds between checks that the process is alive: a child of its own can keep the socket open after its death."""
MAX_IDLE_MEMORY = 2**26
"""Bytes of shared memory that are kept between requests; a message that took more gives all of it back."""
MAX_OUTPUT = 4000
"""Bytes of what the process wrote last that errors repeat."""


class Answer(NamedTuple):
    """What the process says to a request: see ``omniops.remote.worker.Worker``."""

    kind: str
    value: Any


class ProcessEndedError(Exception):
    """The process did not answer, and has ended; ``Process.ending`` says how."""


def require_posix() -> None:
    """Raise where a process cannot be started as this file does.

    Raises:
        OSError: on Windows.
    """
    if os.name != "posix":
        raise OSError(
            "omniops.remote needs a POSIX system, Linux or macOS: on Windows a process cannot be given open file "
            "descriptors (subprocess.Popen's pass_fds)"
        )


class Process:
    """A process that serves an object. Its requests take turns: the caller holds a lock around each of them."""

    def __init__(self) -> None:
        self.ending = ""
        """How it ended, in words that follow its name; empty while it runs."""
        self.released: deque[int] = deque()
        """The numbers of objects that nobody holds here any more: the next request passes them on."""
        self._memory = messages.shared_memory()
        self._connection, its_end = Pipe()
        output, written = os.pipe()
        inherited = (its_end.fileno(), self._memory.fileno())
        try:
            self._popen = subprocess.Popen(
                [get_executable(), "-u", "-c", PROGRAM, *map(str, inherited), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=written,  # what the object prints must not get among what the caller prints
                stderr=written,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C in the terminal is for the caller, who ends the process
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            its_end.close()
            os.close(written)
        self.pid = self._popen.pid
        self._output = open(output, "rb", buffering=0)  # noqa: SIM115 closed by the thread that reads it
        self._last_chunks: deque[bytes] = deque(maxlen=64)
        self._reader = threading.Thread(target=_forward, args=(self._output, self._last_chunks), daemon=True)
        self._reader.start()
        self._finalizer = weakref.finalize(self, _end, self._popen, self._connection, self._memory)

    @property
    def memory_size(self) -> int:
        """Bytes that the shared memory takes at the moment."""
        return os.fstat(self._memory.fileno()).st_size

    def encode(self, request: tuple[Any, ...]) -> bytes:
        """The message for a request. If that raises, nothing was sent, and the process remains usable."""
        released = list(self.released)
        message = messages.encode((released, request), self._memory)
        for _ in released:
            self.released.popleft()
        return message

    def exchange(self, message: bytes, timeout: float | None = None) -> Answer:
        """Send a request and wait for its answer.

        Args:
            message: of ``encode``.
            timeout: the seconds that the process may take to answer, if it is starting.

        Raises:
            ProcessEndedError: where the process is dead, or has not answered in time and was killed.
            BaseException: whatever else breaks the exchange off, as KeyboardInterrupt. The process is killed, for the
                answer that it still owes would be taken for that to the next request.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._connection.send_bytes(message)
            while not self._connection.poll(POLL_INTERVAL):
                if self._popen.poll() is not None and not self._connection.poll():
                    raise EOFError
                if deadline is not None and time.monotonic() > deadline:
                    self._end_now(f"did not answer within {timeout:g} s of its start and was stopped")
                    raise ProcessEndedError
            answer = Answer(*messages.decode(self._connection.recv_bytes(), self._memory))
        except ProcessEndedError:
            raise
        except (EOFError, OSError):
            self.stop()
            self.ending = _describe_exit(self._popen.returncode)
            raise ProcessEndedError from None
        except BaseException as error:
            self._end_now(f"was stopped when {type(error).__name__} broke off a call")
            raise
        if self.memory_size > MAX_IDLE_MEMORY:
            self._memory.truncate(0)
        return answer

    def stop(self) -> None:
        """End the process: by itself if it can, or it is killed after ``EXIT_TIMEOUT``."""
        self._finalizer()

    def kill(self) -> None:
        """Kill the process, whatever it is doing. Any thread may, and the exchange in progress sees it dead."""
        self._popen.kill()

    def last_output(self) -> str:
        """The end of what the process wrote; all is there once it has ended."""
        self._reader.join(POLL_INTERVAL)
        return b"".join(self._last_chunks)[-MAX_OUTPUT:].decode(errors="replace").strip()

    def disown(self) -> None:
        """In a forked process: close the descriptors, so that the parent alone holds the process, and leave it be."""
        self.ending = "belongs to the process that this one was forked from"
        self._popen.returncode = 0  # it is no child of this process, which can neither wait for it nor kill it
        self._finalizer()
        self._output.close()

    def _end_now(self, ending: str) -> None:
        self.kill()
        self.stop()
        self.ending = ending


def _end(process: subprocess.Popen[bytes], connection: Connection, memory: io.FileIO) -> None:
    """What ends a process, without a reference to its ``Process``, whose garbage collection calls this, too."""
    connection.close()
    memory.close()
    try:
        process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _forward(output: io.FileIO, last_chunks: deque[bytes]) -> None:
    """Pass what the process writes on to the caller's stderr, and keep the end of it."""
    with output:
        while chunk := output.read(2**16):
            last_chunks.append(chunk)
            with suppress(OSError):
                os.write(2, chunk)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
