"""Serves the application over HTTP: by gunicorn's threads on POSIX, by waitress' on Windows."""

from __future__ import annotations

import _thread
import ipaddress
import os
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omniops.server.startup import Ready, ServingError, failure, load_models, log_lines, reason

if TYPE_CHECKING:
    from flask import Flask

_BACKLOG = 512


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
        raise ServingError(f"{host} is no address of this machine: {reason(error)}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows it would take the port from whoever has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ServingError(f"cannot listen on {host}, port {port}: {reason(error)}") from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def tls(certfile: str | os.PathLike[str], keyfile: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """What a server with that certificate, and the key of another file or of the same, needs for HTTPS.

    Raises:
        ServingError: where a file is missing, is none of these, or the two do not fit.
    """
    for path in (certfile, keyfile):
        if path is not None and not Path(path).is_file():
            raise ServingError(f"no such file: {path}")
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
        raise ServingError(f"cannot read {files}: {reason(error)}") from None
    return context


@contextmanager
def data_folder(path: Path | None) -> Iterator[Path]:
    """Where uploads and posters go: the folder of that path, made where it is not there, or a temporary one.

    That is removed at the end by the process that made it, not by those forked from it.

    Raises:
        ServingError: where it cannot be made or written to.
    """
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ServingError(f"cannot write to {path}: {reason(error)}") from None
        yield path.resolve()
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
        from omniops.server import gunicorn_server

        gunicorn_server.serve(make_app, bound, context, threads, patience, on_ready)
    else:
        _serve_by_waitress(make_app, bound, context, threads, on_ready)


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
        failures.append(failure(error))
        _thread.interrupt_main()

    log = log_lines()
    try:
        app = make_app()
    except Exception as error:
        raise ServingError(*failure(error)) from error
    server = create_server(app, sockets=[bound], threads=threads, ident=None)
    try:
        threading.Thread(target=load_models, args=(app, on_ready, fail, log), daemon=True).start()
        server.run()  # which ends without a word at KeyboardInterrupt
    except KeyboardInterrupt:  # before it ran
        if not failures:
            raise
    finally:
        server.close()
    if failures:
        raise ServingError(*failures[0])


class _EncryptedError(Exception):
    """The key asks for a password."""


def _no_password() -> str:
    raise _EncryptedError
