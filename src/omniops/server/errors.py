"""What goes wrong in the server, in words that the person at the browser may see."""

from __future__ import annotations

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
