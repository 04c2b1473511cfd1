"""``omniops serve``: SAM 2 in the browser."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from omniops.cli.common import CommandError, missing_packages, print_lines, require_sam2
from omniops.cli.errors import say
from omniops.cli.segment_parts import ImageSizeOption, RandomWeightsOption, require_image_size

if TYPE_CHECKING:
    from flask import Flask

    from omniops.server.serving import Ready
    from omniops.server.settings import Settings

_PORT = 7263
_THREADS = 64
_LIMITS = "Limits"
_NETWORK = "Who is served"


def serve(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="What the gallery shows: the .mp4 and pictures in it and its folders. The official DATA_PATH will do.",
            show_default="a sample clip",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="M",
            help="tiny, small, base-plus or large, which are fetched once; Meta's .pt or its URL, a folder, a hub id.",
            show_default="tiny",
        ),
    ] = None,
    random_weights: RandomWeightsOption = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="D[,D...]",
            help="auto, cpu, mps, cuda, ...; of several, as cuda:0,cuda:1, each has a model, and sessions share them.",
            show_default="the GPU where there is one",
        ),
    ] = None,
    image_size: ImageSizeOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Where uploads and posters are kept.",
            show_default="a temporary folder, removed at the end",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="For developers: GraphiQL and introspection at /graphql.")
    ] = False,
    host: Annotated[
        str,
        typer.Option("--host", metavar="H", help="The address to listen on.", rich_help_panel=_NETWORK),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="P", min=0, max=65535, help="0: a free one.", rich_help_panel=_NETWORK)
    ] = _PORT,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="T",
            help="What the page asks for. Others on this machine see it among the processes: OMNIOPS_TOKEN hides it.",
            show_default=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without a token.", rich_help_panel=_NETWORK)
    ] = False,
    origins: Annotated[
        list[str] | None,
        typer.Option(
            "--origin",
            metavar="URL",
            help="A page elsewhere that may use the API, as https://example.org. May be repeated.",
            show_default="the official front end's, http://localhost:7262",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A name that browsers know the server by, as behind a proxy. May be repeated.",
            show_default="localhost and addresses",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    certfile: Annotated[
        Path | None,
        typer.Option("--certfile", metavar="FILE", help="A certificate, PEM: serve HTTPS.", rich_help_panel=_NETWORK),
    ] = None,
    keyfile: Annotated[
        Path | None,
        typer.Option(
            "--keyfile",
            metavar="FILE",
            help="The certificate's key, PEM.",
            show_default="in the certificate's file",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", metavar="N", min=2, help="Requests that are answered at once.", rich_help_panel=_LIMITS
        ),
    ] = _THREADS,
    max_sessions: Annotated[
        int | None,
        typer.Option(
            "--max-sessions",
            metavar="N",
            min=1,
            help="Videos that are open at once.",
            show_default="32",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    session_timeout: Annotated[
        float | None,
        typer.Option(
            "--session-timeout",
            metavar="S",
            min=1,
            help="Seconds without use until a session ends.",
            show_default="1800",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_streams: Annotated[
        int | None,
        typer.Option(
            "--max-streams",
            metavar="N",
            min=1,
            help="Sessions that are tracked at once.",
            show_default="4",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_upload_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-upload-bytes",
            metavar="N",
            min=1,
            help="Of a file that is uploaded.",
            show_default="500000000",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_upload_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-upload-seconds",
            metavar="S",
            min=0.1,
            help="What of an uploaded video is kept.",
            show_default="10",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
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
    given = {
        "model": model,
        "random_weights": random_weights or None,
        "device": device,
        "image_size": image_size,
        "token": token,
        "insecure": insecure or None,
        "origins": None if origins is None else tuple(map(_origin, origins)),
        "hosts": None if hosts is None else tuple(hosts),
        "debug": debug or None,
        "max_sessions": max_sessions,
        "session_timeout": session_timeout,
        "max_streams": max_streams,
        "max_upload_bytes": max_upload_bytes,
        "max_upload_video_duration": max_upload_seconds,
    }
    _require_packages()
    settings = _settings({name: value for name, value in given.items() if value is not None})
    _check_model(settings)
    if keyfile is not None and certfile is None:
        raise CommandError("--keyfile without --certfile: a key alone makes no HTTPS")
    gallery = None if folder is None else _gallery(folder)
    from omniops.server import serving

    try:
        with ExitStack() as stack:
            context = None if certfile is None else serving.tls(certfile, keyfile)
            bound = stack.enter_context(serving.listen(host, port))
            _check_access(settings, host, serving.is_loopback(bound))
            kept = stack.enter_context(serving.data_folder(data))
            settings = replace(settings, data=kept, gallery=gallery or kept / "gallery")
            address = _address(host, bound.getsockname()[1], https=context is not None)
            _tell(settings, gallery, address, serving.is_loopback(bound), https=context is not None)
            serving.serve(
                lambda: _made(settings, is_sample=gallery is None),
                bound,
                context=context,
                threads=threads,
                patience=settings.send_timeout,
                on_ready=lambda ready: _tell_ready(ready, address if open_browser else None),
            )
    except serving.ServingError as error:
        raise CommandError(str(error), error.status) from None


def _made(settings: Settings, is_sample: bool) -> Flask:
    """The application, in the process that serves."""
    from omniops.server import create_app, sample

    clip = settings.gallery / sample.NAME
    if is_sample and not clip.exists():
        clip.parent.mkdir(parents=True, exist_ok=True)
        sample.write_sample(clip)
    return create_app(settings)


def _settings(given: dict[str, Any]) -> Settings:
    """What options give, else the environment, else the defaults."""
    from omniops.server.settings import Settings

    # Not the official server's checkpoint, nor its address: here a page is told that by which it came.
    defaults = {"OMNIOPS_MODEL": os.environ.get("OMNIOPS_MODEL") or "tiny"}
    try:
        settings = Settings.from_environment({**os.environ, **defaults})
        settings = replace(settings, api_url=os.environ.get("API_URL", ""), **given)
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
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
        raise CommandError(f"--origin must be as https://example.org or http://localhost:8080, got {text!r}")
    return f"{parts.scheme}://{parts.netloc}"


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


def _tell(settings: Settings, gallery: Path | None, address: str, is_loopback: bool, https: bool) -> None:
    print_lines(f"SAM 2 is served at {address} - Ctrl-C ends it")
    if not is_loopback:
        who = "who has the token" if settings.token is not None else "anybody, without a token"
        say(f"other machines are served by this one's address: {who}")
    if not is_loopback and not https:
        say("without --certfile browsers on other machines decode no video frame by frame, and all is sent unencrypted")
    if gallery is None:
        say("no FOLDER was given: the gallery shows a sample clip")
    elif not any(each.is_file() for each in gallery.rglob("*")):
        say(f"{gallery} is empty: what is put there appears in the gallery")
    means_nothing = ", with random weights: its masks mean nothing" if settings.random_weights else ""
    say(f"loading SAM 2, {settings.model}{means_nothing}")


def _tell_ready(ready: Ready, page: str | None) -> None:
    for each in ready.devices:
        print_lines(
            f"ready: {each['device']}, {each['dtype']}, SAM 2 {each['model']} at {each['image_size']} x "
            f"{each['image_size']}"
        )
    if page is not None:
        import webbrowser

        webbrowser.open(page)
