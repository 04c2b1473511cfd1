"""Errors, signals and the exit status: an error is one line, and a signal is an error, so that results are kept.

Little is imported here, because Python itself answers Ctrl-C, by a traceback, until it is.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

INTERRUPTED = 130
_UNREAD = 128 + 13
"""What a shell reports of a process that SIGPIPE ended, which Python ignores."""
_received: list[KeyboardInterrupt] = []
"""What signals raised."""
_LEVELS = {"error": 40, "warning": 30, "info": 20, "debug": 10}
"""What is said on stderr, numbered as ``logging`` does."""
_level = _LEVELS["info"]


class CommandError(Exception):
    """Ends the command with one line: status 2 says that it was used wrongly, 1 that it failed."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Terminated(KeyboardInterrupt):
    """The process was told to end, by SIGTERM, or by SIGHUP where its terminal was closed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def exit_status(stopped: BaseException) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP; else 1."""
    if isinstance(stopped, KeyboardInterrupt):
        return getattr(stopped, "status", INTERRUPTED)
    return 1


def cause(error: BaseException) -> str:
    """What ended the work: a signal, or the reason that an error gives."""
    if isinstance(error, KeyboardInterrupt):
        return "terminated" if isinstance(error, Terminated) else "interrupted"
    return reason(error)


def run(call: Callable[[], object]) -> int:
    """Call what may exit or raise, write its output to the end, say on stderr what went wrong: the exit status."""
    try:
        try:
            call()
            status = 0
        except SystemExit as ended:
            status = _status(ended)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BaseException as error:
        return report(error)


def report(error: BaseException) -> int:
    """Say on stderr what ended the command, in one line where it is no fault of this package: the exit status."""
    if isinstance(error, BrokenPipeError):  # as of ``| head -1``
        _discard_output()
        return _UNREAD
    status = _say_error(error)
    if _level <= _LEVELS["debug"]:
        _print_traceback(error)
    return status


def _say_error(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        say(f"error: {cause(error)}", "error")
        return exit_status(error)
    if isinstance(error, CommandError):
        say(f"error: {error}", "error")
        return error.status
    if isinstance(error, OSError):
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG):
            _discard_output()
            say(f"error: cannot write the output: {reason(error)}", "error")
        else:
            prefix = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            say(f"error: {prefix}{reason(error)}", "error")
        return 1
    if _is_memory(error):
        say(f"error: not enough memory: {reason(error)}", "error")
        return 1
    name = type(error).__name__
    say(f"error: a fault of omniops, please report it with what follows: {name}: {reason(error)}", "error")
    if _level > _LEVELS["debug"]:
        _print_traceback(error)
    return 1


def _print_traceback(error: BaseException) -> None:
    import traceback

    with suppress(OSError, ValueError):
        traceback.print_exception(error)


def reason(error: BaseException) -> str:
    """What an error says in one line, without the number that an operating system or a library gives it."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror).partition("\n")[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def levels() -> Iterator[None]:
    """Meanwhile ``set_level`` may be called; afterwards all is said again that was said before."""
    import logging
    import warnings

    global _level
    before, disabled = _level, logging.root.manager.disable
    with warnings.catch_warnings():
        try:
            yield
        finally:
            _level = before
            logging.disable(disabled)


def set_level(name: str) -> None:
    """Say on stderr what is as urgent as error, warning, info or debug, or more so; libraries follow."""
    import logging
    import warnings

    global _level
    _level = _LEVELS[name]
    if _level > _LEVELS["info"]:
        logging.disable(_level - 1)
    if _level > _LEVELS["warning"]:
        warnings.simplefilter("ignore")


def is_quiet() -> bool:
    """Whether errors alone are said."""
    return _level >= _LEVELS["error"]


def says(level: str) -> bool:
    """Whether what is of that level is said: error, warning, info or debug."""
    return _LEVELS[level] >= _level


def say(text: str, level: str = "info") -> None:
    """A line on stderr, at once, whatever stderr is; none where what is of that level is not said."""
    if not says(level):
        return
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"omniops: {text}", file=sys.stderr, flush=True)


@contextmanager
def signals_as_errors() -> Iterator[None]:
    """Meanwhile SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP ``Terminated``, in the main thread.

    A signal that is ignored, or that somebody else handles, is left alone.
    """
    _received.clear()
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with suppress(ValueError):  # in another thread
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_received() -> None:
    """Raise what a signal raised before, where that was lost: compiled modules may drop it while they are imported."""
    if _received:
        raise _received[-1]


def escape_unencodable() -> None:
    """Have stdout take names that its encoding cannot express, as stderr does."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _raise(number: int, frame: FrameType | None) -> None:
    _received.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated(number))
    raise _received[-1]


def _status(ended: SystemExit) -> int:
    if isinstance(ended.code, str):
        say(ended.code, "error")
        return 1
    return int(ended.code or 0)


def _discard_output() -> None:
    """So that what is still buffered is not written, and complained of, when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _is_memory(error: BaseException) -> bool:
    """Of PyTorch's own types too, which are not imported here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
