"""``omniops serve``: SAM 2 in the browser."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omniops.cli.common import CommandError, missing_packages, print_lines, require_sam2
from omniops.cli.errors import say
from omniops.cli.segment.options import ImageSizeOption, RandomWeightsOption, require_image_size
from omniops.cli.serve.options import (
    PORT,
    THREADS,
    CertfileOption,
    DataOption,
    DebugOption,
    DevicesOption,
    FolderArgument,
    HostOption,
    HostsOption,
    InsecureOption,
    KeyfileOption,
    MaxSessionsOption,
    MaxStreamsOption,
    MaxUploadBytesOption,
    MaxUploadSecondsOption,
    ModelOption,
    OpenBrowserOption,
    OriginsOption,
    PortOption,
    SessionTimeoutOption,
    ThreadsOption,
    TokenOption,
)

if TYPE_CHECKING:
    from flask import Flask

    from omniops.server.settings import Settings
    from omniops.server.startup import Ready


def serve(
    folder: FolderArgument = None,
    model: ModelOption = None,
    random_weights: RandomWeightsOption = False,
    device: DevicesOption = None,
    image_size: ImageSizeOption = None,
    data: DataOption = None,
    open_browser: OpenBrowserOption = False,
    debug: DebugOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = PORT,
    token: TokenOption = None,
    insecure: InsecureOption = False,
    origins: OriginsOption = None,
    hosts: HostsOption = None,
    certfile: CertfileOption = None,
    keyfile: KeyfileOption = None,
    threads: ThreadsOption = THREADS,
    max_sessions: MaxSessionsOption = None,
    session_timeout: SessionTimeoutOption = None,
    max_streams: MaxStreamsOption = None,
    max_upload_bytes: MaxUploadBytesOption = None,
    max_upload_seconds: MaxUploadSecondsOption = None,
) -> None:
    """Serve SAM 2 in the browser: the API of its demo, a page, and sessions for several people at once.

    The page cuts objects out of pictures and tracks them through videos. The official demo's front end works with the
    server, too. Ctrl-C or SIGTERM ends it, with status 0.

    Only this machine is served, unless --host says otherwise. Then a --token is needed, or --insecure; and --certfile
    for what browsers allow pages of https alone, as decoding a video frame by frame.

    Variables of the environment, as OMNIOPS_TOKEN and OMNIOPS_MAX_SESSIONS, stand for options that are not given, and
    set what none does. docs/server.md lists them, and tells how to serve by gunicorn and behind a proxy.

    Example: omniops serve --random-weights --open

    Example: omniops serve clips/ --model sam2.1_hiera_tiny.pt --device mps

    Example: omniops serve --host 0.0.0.0 --token "$TOKEN" --certfile cert.pem --keyfile key.pem
    """
    require_image_size(image_size)
    options = {
        "model": model, "random_weights": random_weights or None, "device": device, "image_size": image_size,
        "token": token, "insecure": insecure or None, "debug": debug or None,
        "origins": None if origins is None else tuple(map(_origin, origins)),
        "hosts": None if hosts is None else tuple(hosts), "max_sessions": max_sessions,
        "session_timeout": session_timeout, "max_streams": max_streams, "max_upload_bytes": max_upload_bytes,
        "max_upload_video_duration": max_upload_seconds,
    }  # fmt: skip
    _require_packages()
    settings = _settings(options)
    _check_model(settings)
    if keyfile is not None and certfile is None:
        raise CommandError("--keyfile without --certfile: a key alone makes no HTTPS")
    gallery = None if folder is None else _gallery(folder)
    _serve(settings, gallery, data, host, port, certfile, keyfile, threads, open_browser)


def _serve(
    settings: Settings,
    gallery: Path | None,
    data: Path | None,
    host: str,
    port: int,
    certfile: Path | None,
    keyfile: Path | None,
    threads: int,
    open_browser: bool,
) -> None:
    """Listen, say so, and serve until the end."""
    from omniops.server import serving
    from omniops.server.startup import ServingError

    try:
        with ExitStack() as stack:
            context = None if certfile is None else serving.tls(certfile, keyfile)
            bound = stack.enter_context(serving.listen(host, port))
            is_loopback = serving.is_loopback(bound)
            _check_access(settings, host, is_loopback)
            kept = stack.enter_context(serving.data_folder(data))
            settings = replace(settings, data=kept, gallery=gallery or kept / "gallery")
            address = _address(host, bound.getsockname()[1], https=context is not None)
            _announce(settings, gallery, address, is_loopback, https=context is not None)
            serving.serve(
                lambda: _create_app(settings, with_sample=gallery is None),
                bound,
                context=context,
                threads=threads,
                patience=settings.send_timeout,
                on_ready=lambda ready: _announce_ready(ready, address if open_browser else None),
            )
    except ServingError as error:
        raise CommandError(str(error), error.status) from None


def _create_app(settings: Settings, with_sample: bool) -> Flask:
    """The application, in the process that serves."""
    from omniops.server import create_app, sample

    clip = settings.gallery / sample.NAME
    if with_sample and not clip.exists():
        clip.parent.mkdir(parents=True, exist_ok=True)
        sample.write_sample(clip)
    return create_app(settings)


def _settings(options: dict[str, Any]) -> Settings:
    """What options give that are not None, else the environment, else the defaults."""
    from omniops.server.settings import Settings

    # Not the official server's checkpoint, nor its address: URLs are of the address that the request came to.
    defaults = {"OMNIOPS_MODEL": os.environ.get("OMNIOPS_MODEL") or "tiny"}
    try:
        settings = Settings.from_environment({**os.environ, **defaults})
        changes = {name: value for name, value in options.items() if value is not None}
        settings = replace(settings, api_url=os.environ.get("API_URL", ""), **changes)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if settings.token is not None and not (settings.token.isascii() and settings.token.isprintable()):
        raise CommandError("--token must be of printable ASCII characters, as headers of HTTP are")
    if settings.token is not None and settings.insecure:
        raise CommandError("--token and --insecure contradict each other: give one")
    return settings


def _check_model(settings: Settings) -> None:
    from omniops.server.settings import MODEL_SIZES

    sizes = [size.replace("_", "-") for size in MODEL_SIZES]
    if settings.random_weights and settings.model.replace("_", "-") not in sizes:
        raise CommandError(f"random weights are of a size, --model {', '.join(sizes)}; got {settings.model!r}")
    is_file = settings.model.endswith((".pt", ".pth")) and "://" not in settings.model
    if is_file and not settings.random_weights and not Path(settings.model).is_file():
        raise CommandError(f"there is no checkpoint at {settings.model}")


def _check_access(settings: Settings, host: str, is_loopback: bool) -> None:
    if not is_loopback and settings.token is None and not settings.insecure:
        raise CommandError(
            f"--host {host} serves other machines: give a --token that the page asks for, or --insecure where anybody "
            "may use it"
        )


def _gallery(folder: Path) -> Path:
    """The folder of the videos; inside of one like the official server's DATA_PATH it is called gallery."""
    if not folder.exists():
        raise CommandError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise CommandError(f"{folder} is no folder: give the one that it is in")
    folder = folder.resolve()
    inner = folder / "gallery"
    found = inner if inner.is_dir() else folder
    if not os.access(found, os.R_OK | os.X_OK):
        raise CommandError(f"cannot read {found}: permission denied")
    return found


def _origin(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.netloc or url.path not in ("", "/"):
        raise CommandError(f"--origin must be as https://example.org or http://localhost:8080, got {text!r}")
    return f"{url.scheme}://{url.netloc}"


def _require_packages() -> None:
    """Raise before any work where a package of the extra is missing."""
    for package in missing_packages("server"):
        raise CommandError(
            f"the server needs {package}, which is not installed: pip install 'omniops[server]'", status=1
        )
    require_sam2()


def _address(host: str, port: int, https: bool) -> str:
    """What is typed into a browser on this machine."""
    name = {"0.0.0.0": "localhost", "::": "localhost", "": "localhost"}.get(host.strip("[]"), host.strip("[]"))
    return f"http{'s' if https else ''}://{f'[{name}]' if ':' in name else name}:{port}"


def _announce(settings: Settings, gallery: Path | None, address: str, is_loopback: bool, https: bool) -> None:
    print_lines(f"SAM 2 is served at {address} - Ctrl-C ends it")
    if not is_loopback:
        who = "who has the token" if settings.token is not None else "anybody, without a token"
        say(f"other machines are served by this one's address: {who}", "warning")
    if not is_loopback and not https:
        say(
            "without --certfile browsers on other machines decode no video frame by frame, and all is sent unencrypted",
            "warning",
        )
    if gallery is None:
        say("no FOLDER was given: the gallery shows a sample clip")
    elif not any(path.is_file() for path in gallery.rglob("*")):
        say(f"{gallery} is empty: what is put there appears in the gallery")
    means_nothing = ", with random weights: its masks mean nothing" if settings.random_weights else ""
    say(f"loading SAM 2, {settings.model}{means_nothing}")


def _announce_ready(ready: Ready, page: str | None) -> None:
    for loaded in ready.devices:
        print_lines(
            f"ready: {loaded['device']}, {loaded['dtype']}, SAM 2 {loaded['model']} at {loaded['image_size']} x "
            f"{loaded['image_size']}"
        )
    if page is not None:
        import webbrowser

        webbrowser.open(page)
