"""What goes wrong in the server, in words that the person at the browser may see."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

UNKNOWN_ERROR = "An unknown error occurred."


class ServerError(Exception):
    """A refusal, with the words that are shown and the HTTP status of routes that answer with one.

    The message names nothing of the server's disk, code or versions.
    """

    status = 400

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status = status


class Forbidden(ServerError):  # noqa: N818  # named as HTTP names it
    """The request comes from a page, a host or a person that the server does not serve."""

    status = 403


class NotFound(ServerError):  # noqa: N818  # named as HTTP names it
    """What is asked for is not here, or not any more."""

    status = 404


class TooLarge(ServerError):  # noqa: N818  # named as HTTP names it
    """The request's body is larger than the server takes."""

    status = 413


class Busy(ServerError):  # noqa: N818  # named as HTTP names it
    """The server does as much as it can, or cannot work as it was started; the request may be repeated later."""

    status = 503


@contextmanager
def full_disk_errors(kind: str) -> Iterator[None]:
    """Within it a full disk is a ``ServerError`` of status 507, which says that there is no room for that kind."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ServerError(f"The server has no room left for {kind}.", 507) from None
        raise
