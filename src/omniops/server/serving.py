"""Serves the application over HTTP: by gunicorn's threads on POSIX, by waitress' on Windows."""

from __future__ import annotations

import _thread
import ipaddress
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniops.server.errors import ServerError

if TYPE_CHECKING:
    from flask import Flask

    from omniops.server.predictors import Predictor

_BACKLOG = 512
_GRACE = 3  # seconds that requests have to end when the server does
_KEEP_ALIVE = 15
_LINGER = 2.0  # seconds that a client has to end a connection that is closed


class ServingError(Exception):
    """The server cannot serve, or had to end; in words for who started it.

    Args:
        status: the exit status for it: 2 where it was asked for something wrong, 1 where something failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ready:
    """What is told, in the process that serves, once the models are loaded."""

    devices: list[dict[str, Any]]
    """What ``Inference.describe()`` says of each."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0 is any that is free.

    Raises:
        ServingError: for a name that is none, or an address that is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise ServingError(f"{host} is no address of this machine: {_reason(error)}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows it would take the port from whoever has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ServingError(f"cannot listen on {host}, port {port}: {_reason(error)}") from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def tls(certfile: str | os.PathLike[str], keyfile: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """What a server with that certificate, and the key of another file or of the same, needs for HTTPS.

    Raises:
        ServingError: where a file is missing, is none of these, or the two do not fit.
    """
    for each in (certfile, keyfile):
        if each is not None and not Path(each).is_file():
            raise ServingError(f"no such file: {each}")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    files = f"{certfile}" if keyfile is None else f"{certfile} and {keyfile}"
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except _EncryptedError:
        raise ServingError(f"the key in {keyfile or certfile} is encrypted: it has to be stored without") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ServingError(f"{files} do not belong together: the key is another certificate's") from None
        raise ServingError(f"{files}: no certificate with its key, in PEM form") from None
    except OSError as error:
        raise ServingError(f"cannot read {files}: {_reason(error)}") from None
    return context


@contextmanager
def data_folder(given: Path | None) -> Iterator[Path]:
    """Where uploads and posters go: the given folder, made where it is not there, or a temporary one.

    That is removed at the end by the process that made it, not by those forked from it.

    Raises:
        ServingError: where it cannot be made or written to.
    """
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=given):
                pass
        except OSError as error:
            raise ServingError(f"cannot write to {given}: {_reason(error)}") from None
        yield given.resolve()
        return
    maker = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix="omniops-serve-")).resolve()
    try:
        yield folder
    finally:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)


def serve(
    make_app: Callable[[], Flask],
    bound: socket.socket,
    *,
    context: ssl.SSLContext | None = None,
    threads: int = 64,
    patience: float = 60.0,
    on_ready: Callable[[Ready], None] = lambda ready: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; the socket is closed then.

    The models are loaded in the background meanwhile, and where one cannot be, the server ends.

    Args:
        make_app: makes the application, as ``omniops.server.create_app`` does, in the process that serves.
        bound: as ``listen`` returns it.
        context: as ``tls`` returns it; None for HTTP.
        threads: how many requests are answered at once. Every stream of a propagation takes one while it lasts.
        patience: the seconds that a client may take between two packets of a request.
        on_ready: called in the process that serves, once the models are loaded.

    Raises:
        ServingError: where a model could not be loaded, or the application not be made.
    """
    if os.name == "posix":
        _serve_by_gunicorn(make_app, bound, context, threads, patience, on_ready)
    else:
        _serve_by_waitress(make_app, bound, context, threads, on_ready)


def _serve_by_gunicorn(
    make_app: Callable[[], Flask],
    bound: socket.socket,
    context: ssl.SSLContext | None,
    threads: int,
    patience: float,
    on_ready: Callable[[Ready], None],
) -> None:
    from gunicorn.app.base import BaseApplication
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.gthread import ThreadWorker

    failures, failed = os.pipe()
    master = os.getpid()
    ending = threading.Event()

    def fail(error: BaseException) -> None:
        """In the worker: tell why, and have the master end the server, unless it does so already."""
        if ending.is_set():
            return
        os.write(failed, json.dumps(_failure(error)).encode() + b"\n")
        os.kill(master, signal.SIGTERM)

    def leave(_: Any, worker: Any) -> None:
        """At the end of a worker that was told to end: do not wait for threads, which may wait for a client."""
        if os.getpid() != master and ending.is_set():
            for each in _predictors(worker.app.callable):
                each.close(timeout=0)
            sys.stdout.flush()
            os._exit(0)

    class Worker(ThreadWorker):  # type: ignore[misc]
        """Whose threads do not wait for ever for the rest of a request, and end the connections that they close."""

        def handle_exit(self, *signalled: Any) -> None:
            ending.set()
            super().handle_exit(*signalled)

        def handle_quit(self, *signalled: Any) -> None:
            ending.set()
            super().handle_quit(*signalled)

        def handle(self, connection: Any) -> Any:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(patience))
            result = super().handle(connection)
            if result is False:  # to be closed, by the thread that also accepts connections
                _end_connection(connection.sock)
            return result

    class Master(Arbiter):  # type: ignore[misc]
        """Which ends where its terminal does, and has one worker, come what may."""

        handle_hup = Arbiter.handle_term
        handle_ttin = handle_ttou = handle_usr1 = handle_usr2 = handle_winch = lambda self: None

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            settings = {
                "bind": f"fd://{bound.detach()}",
                "worker_class": Worker,
                "workers": 1,
                "threads": threads,
                "timeout": 0,  # nothing computes in the worker that could hang it
                "graceful_timeout": 2 * _GRACE,
                "post_fork": lambda _, worker: worker.cfg.set("graceful_timeout", _GRACE),  # so that it is not killed
                "worker_exit": leave,
                "keepalive": _KEEP_ALIVE,
                "loglevel": "error",
                "control_socket_disable": True,
            }
            if context is not None:
                settings["ssl_context"] = lambda config, default: context
                settings["certfile"] = os.devnull  # what has gunicorn speak TLS; the context has the certificate
            for name, value in settings.items():
                if name in self.cfg.settings:  # older versions do not know all
                    self.cfg.set(name, value)

        def load(self) -> Any:
            os.close(failures)
            try:
                app = make_app()
            except BaseException as error:
                fail(error)
                return _unavailable
            threading.Thread(target=_announce, args=(app, on_ready, fail, log), daemon=True).start()
            return app

    log = _log_in_lines()
    sys.stdout.flush()  # or the worker would write it too
    try:
        Master(Application()).run()
    except SystemExit as ended:
        if os.getpid() != master:
            raise
        status = ended.code
    os.close(failed)
    with os.fdopen(failures, "rb") as pipe:
        told = pipe.read().partition(b"\n")[0]
    if told:
        raise ServingError(*json.loads(told))
    if status:
        raise ServingError("gunicorn could not serve; what is above says why", status=1)


def _serve_by_waitress(
    make_app: Callable[[], Flask],
    bound: socket.socket,
    context: ssl.SSLContext | None,
    threads: int,
    on_ready: Callable[[Ready], None],
) -> None:
    if context is not None:
        raise ServingError("there is no HTTPS by waitress: put a reverse proxy with the certificate before it")
    from waitress import create_server

    failures: list[tuple[str, int]] = []

    def fail(error: BaseException) -> None:
        failures.append(_failure(error))
        _thread.interrupt_main()

    log = _log_in_lines()
    try:
        app = make_app()
    except Exception as error:
        raise ServingError(*_failure(error)) from error
    server = create_server(app, sockets=[bound], threads=threads, ident=None)
    try:
        threading.Thread(target=_announce, args=(app, on_ready, fail, log), daemon=True).start()
        server.run()  # which ends without a word at KeyboardInterrupt
    except KeyboardInterrupt:  # before it ran
        if not failures:
            raise
    finally:
        server.close()
    if failures:
        raise ServingError(*failures[0])


def _announce(
    app: Flask, on_ready: Callable[[Ready], None], fail: Callable[[BaseException], None], log: _InLines
) -> None:
    """Load the models and tell."""
    predictors = _predictors(app)
    try:
        for each in predictors:
            each.warm()
        devices = [each.describe() for each in predictors]
    except BaseException as error:
        fail(next((each.failure for each in predictors if each.failure is not None), error))
        return
    log.is_ready = True
    on_ready(Ready(devices))


def _predictors(app: Any) -> list[Predictor]:
    return app.extensions["omniops"].sessions.predictors if app not in (None, _unavailable) else []


def _unavailable(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """In place of an application that could not be made, until the server has ended."""
    start_response("503 Service Unavailable", [("Content-Length", "0")])
    return []


class _InLines(logging.Handler):
    """A line on stderr for whatever is logged, with its trace where nobody foresaw it."""

    is_ready = False
    """Until then nothing is told of models that cannot be loaded: the server ends, and tells."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        error = record.exc_info[1] if record.exc_info else None
        if not self.is_ready and record.name == "omniops.server.predictors":
            return
        words = record.getMessage() + (f": {_reason(error)}" if error else "")
        with suppress(OSError, ValueError):
            print(f"omniops: {words}", file=sys.stderr, flush=True)
            if error is not None and not _is_foreseen(error):
                traceback.print_exception(error)


def _log_in_lines() -> _InLines:
    """Have what is logged while it serves go to stderr."""
    handler = _InLines(logging.WARNING)
    log = logging.getLogger("omniops.server")
    log.propagate = False
    log.handlers = [handler]
    # Clients that stopped reading or writing, who are no error.
    logging.getLogger("gunicorn.error").addFilter(_is_no_stall)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    return handler


def _is_no_stall(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (TimeoutError, BlockingIOError))


def _failure(error: BaseException) -> tuple[str, int]:
    """Why the server could not start, and the exit status: of a model its own words, which browsers are not told."""
    while isinstance(error, ServerError) and error.__cause__ is not None:
        error = error.__cause__
    if not _is_foreseen(error):
        traceback.print_exception(error)
    return _reason(error), 2 if isinstance(error, FileNotFoundError) else 1


def _is_foreseen(error: BaseException) -> bool:
    from omniops.sam2.remote_predictor import RemoteError  # and PyTorch, which only the process that serves imports

    return isinstance(error, (OSError, ValueError, ImportError, RemoteError, ServerError))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error).strip().partition("\n")[0] or type(error).__name__


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


class _EncryptedError(Exception):
    """The key asks for a password."""


def _no_password() -> str:
    raise _EncryptedError
