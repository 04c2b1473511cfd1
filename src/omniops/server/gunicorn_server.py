"""Serves the application by gunicorn: a master, which holds the socket, and one worker, whose threads answer.

Imports gunicorn, which is for POSIX alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from omniops.server.startup import LineHandler, Ready, ServingError, failure, load_models, log_lines, predictors_of

if TYPE_CHECKING:
    from flask import Flask

_GRACE = 3  # seconds that requests have to end when the server does
_KEEP_ALIVE = 15
_LINGER = 2.0  # seconds that a client has to end a connection that is closed


def serve(
    make_app: Callable[[], Flask],
    bound: socket.socket,
    context: ssl.SSLContext | None,
    threads: int,
    patience: float,
    on_ready: Callable[[Ready], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM; see ``omniops.server.serving.serve``."""
    application = _Application(make_app, bound, context, threads, patience, on_ready, log_lines())
    sys.stdout.flush()  # or the worker would write it too
    try:
        _Master(application).run()
    except SystemExit as ended:
        if os.getpid() != application.master:
            raise
        status = ended.code
    reported = application.reported_failure()
    if reported is not None:
        raise ServingError(*reported)
    if status:
        raise ServingError("gunicorn could not serve; what is above says why", status=1)


class _Application(BaseApplication):  # type: ignore[misc]
    """The application, how gunicorn serves it, and the pipe by which the worker reports a failure to the master."""

    def __init__(
        self,
        make_app: Callable[[], Flask],
        bound: socket.socket,
        context: ssl.SSLContext | None,
        threads: int,
        patience: float,
        on_ready: Callable[[Ready], None],
        log: LineHandler,
    ) -> None:
        self.master = os.getpid()
        self.patience = patience
        self.is_ending = threading.Event()
        """Set in the worker once a signal asks it to end."""
        self._make_app, self._on_ready, self._log = make_app, on_ready, log
        self._bound, self._context, self._threads = bound, context, threads
        self._failures, self._failed = os.pipe()
        super().__init__()

    def load_config(self) -> None:
        settings = {
            "bind": f"fd://{self._bound.detach()}",
            "worker_class": _Worker,
            "workers": 1,
            "threads": self._threads,
            "timeout": 0,  # nothing computes in the worker that could hang it
            "graceful_timeout": 2 * _GRACE,
            "post_fork": lambda _, worker: worker.cfg.set("graceful_timeout", _GRACE),  # so that it is not killed
            "worker_exit": _exit_at_once,
            "keepalive": _KEEP_ALIVE,
            "loglevel": "error",
            "control_socket_disable": True,
        }
        if self._context is not None:
            settings["ssl_context"] = lambda config, default: self._context
            settings["certfile"] = os.devnull  # what has gunicorn speak TLS; the context has the certificate
        for name, value in settings.items():
            if name in self.cfg.settings:  # older versions do not know all
                self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI application, made in the worker."""
        os.close(self._failures)
        try:
            app = self._make_app()
        except BaseException as error:
            self._fail(error)
            return _unavailable
        threading.Thread(target=load_models, args=(app, self._on_ready, self._fail, self._log), daemon=True).start()
        return app

    def _fail(self, error: BaseException) -> None:
        """In the worker: report an error, and have the master end the server, unless it does so already."""
        if self.is_ending.is_set():
            return
        os.write(self._failed, json.dumps(failure(error)).encode() + b"\n")
        os.kill(self.master, signal.SIGTERM)

    def reported_failure(self) -> tuple[str, int] | None:
        """In the master, after the end: the first failure that the worker reported, a message and an exit status."""
        os.close(self._failed)
        with os.fdopen(self._failures, "rb") as pipe:
            line = pipe.read().partition(b"\n")[0]
        return tuple(json.loads(line)) if line else None


class _Worker(ThreadWorker):  # type: ignore[misc]
    """Whose threads do not wait for ever for the rest of a request, and end the connections that they close."""

    app: _Application

    def handle_exit(self, *signalled: Any) -> None:
        self.app.is_ending.set()
        super().handle_exit(*signalled)

    def handle_quit(self, *signalled: Any) -> None:
        self.app.is_ending.set()
        super().handle_quit(*signalled)

    def handle(self, connection: Any) -> Any:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(self.app.patience))
        result = super().handle(connection)
        if result is False:  # to be closed, by the thread that also accepts connections
            _end_connection(connection.sock)
        return result


class _Master(Arbiter):  # type: ignore[misc]
    """Which ends where its terminal does, and has one worker, come what may."""

    handle_hup = Arbiter.handle_term
    handle_ttin = handle_ttou = handle_usr1 = handle_usr2 = handle_winch = lambda self: None


def _exit_at_once(_: Any, worker: Any) -> None:
    """At the end of a worker that a signal asked to end: do not wait for threads, which may wait for a client."""
    if os.getpid() != worker.app.master and worker.app.is_ending.is_set():
        if worker.app.callable not in (None, _unavailable):
            for predictor in predictors_of(worker.app.callable):
                predictor.close(timeout=0)
        sys.stdout.flush()
        os._exit(0)


def _unavailable(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answers 503 instead of an application that could not be made, until the server has ended."""
    start_response("503 Service Unavailable", [("Content-Length", "0")])
    return []


def _end_connection(sock: socket.socket) -> None:
    """Wait for the client to end a connection, too, and then no more: gunicorn 27 would, and accept no other meanwhile.

    Of TLS it is the connection under it. What still comes is read, for else the client might lose the answer's end.
    """
    end = time.monotonic() + _LINGER
    with suppress(OSError, ValueError):  # gone, or closed
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            if not socket.socket.recv(sock, 2**16):
                break
    with suppress(OSError, ValueError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
