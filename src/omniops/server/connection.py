"""The client's connection under gunicorn: how long it may stall, and whether it is still there."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Any


def _socket(environ: dict[str, Any]) -> socket.socket | None:
    """The client's socket, where the server gives it away: gunicorn does."""
    found = environ.get("gunicorn.socket")
    return found if isinstance(found, socket.socket) else None


def limit_stalls(environ: dict[str, Any], seconds: float) -> None:
    """Have the connection broken off when the client neither reads nor writes for so long.

    Gunicorn takes the time-out back before it waits for the connection's next request.
    """
    found = _socket(environ)
    if found is not None:
        found.settimeout(seconds)


def is_gone(environ: dict[str, Any]) -> bool:
    """Whether the client closed the connection; False where that cannot be known."""
    found = _socket(environ)
    if found is None:
        return False
    try:
        readable, _, _ = select.select([found], [], [], 0)
        # With TLS the end of the connection is known only by reading, which would consume the client's data.
        return bool(readable) and not hasattr(found, "cipher") and found.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # closed on this side, too
        return True


def break_off(environ: dict[str, Any]) -> None:
    """End the connection, so that a thread that waits for its client to read waits no longer."""
    found = _socket(environ)
    if found is not None:
        with suppress(OSError):  # it has ended
            # Not the method of TLS, after which the other thread would go on unencrypted.
            socket.socket.shutdown(found, socket.SHUT_RDWR)


def drain(environ: dict[str, Any], limit: int) -> None:
    """Read what the client still sends, so that it comes to reading the answer; at most ``limit`` bytes.

    A client whose body is refused half-way sees a connection that broke off, instead of the reason.
    """
    left = min(int(environ.get("CONTENT_LENGTH") or 0), limit)
    try:
        while left > 0 and (data := environ["wsgi.input"].read(min(left, 2**16))):
            left -= len(data)
    except OSError:
        pass  # it is gone
