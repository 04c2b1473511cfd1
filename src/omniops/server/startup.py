"""How a server starts, whatever serves it: models are loaded, failures put into words, and the log goes to stderr."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omniops.remote.errors import RemoteError
from omniops.server.errors import ServerError

if TYPE_CHECKING:
    from flask import Flask

    from omniops.server.predictors import Predictor


class ServingError(Exception):
    """The server cannot serve, or had to end; in words for whoever started it.

    Args:
        status: the exit status for it: 2 where it was asked for something wrong, 1 where something failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ready:
    """What ``on_ready`` gets, in the process that serves, once the models are loaded."""

    devices: list[dict[str, Any]]
    """What ``Inference.describe()`` says of each."""


def predictors_of(app: Flask) -> list[Predictor]:
    """The predictors of an application of ``omniops.server.create_app``."""
    found: list[Predictor] = app.extensions["omniops"].sessions.predictors
    return found


def load_models(
    app: Flask, on_ready: Callable[[Ready], None], fail: Callable[[BaseException], None], log: LineHandler
) -> None:
    """Load the models of an application, and call ``on_ready``; or ``fail``, with what the first one failed with."""
    predictors = predictors_of(app)
    try:
        for predictor in predictors:
            predictor.warm()
        devices = [predictor.describe() for predictor in predictors]
    except BaseException as error:
        fail(next((predictor.failure for predictor in predictors if predictor.failure is not None), error))
        return
    log.is_ready = True
    on_ready(Ready(devices))


class LineHandler(logging.Handler):
    """A line on stderr for whatever is logged, with its traceback where the error is unexpected."""

    is_ready = False
    """Until then models that cannot be loaded have no line: the server ends, and its own error says why."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        error = record.exc_info[1] if record.exc_info else None
        if not self.is_ready and record.name == "omniops.server.predictors":
            return
        words = record.getMessage() + (f": {reason(error)}" if error else "")
        with suppress(OSError, ValueError):
            print(f"omniops: {words}", file=sys.stderr, flush=True)
            if error is not None and not _is_expected(error):
                traceback.print_exception(error)


def log_lines() -> LineHandler:
    """Have what is logged while it serves go to stderr."""
    handler = LineHandler(logging.WARNING)
    log = logging.getLogger("omniops.server")
    log.propagate = False
    log.handlers = [handler]
    # A client that stopped reading or writing is no error.
    logging.getLogger("gunicorn.error").addFilter(_is_no_stall)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    return handler


def _is_no_stall(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (TimeoutError, BlockingIOError))


def failure(error: BaseException) -> tuple[str, int]:
    """Why the server could not start, and the exit status: for a model its own message, which browsers do not get."""
    while isinstance(error, ServerError) and error.__cause__ is not None:
        error = error.__cause__
    if not _is_expected(error):
        traceback.print_exception(error)
    return reason(error), 2 if isinstance(error, FileNotFoundError) else 1


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (OSError, ValueError, ImportError, RemoteError, ServerError))


def reason(error: BaseException) -> str:
    """The first line of what an error says, with the file's name where it has one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error).strip().partition("\n")[0] or type(error).__name__
