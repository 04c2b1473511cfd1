"""The options of ``omniops serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omniops.cli.segment.options import MODELS

PORT = 7263
THREADS = 64
_LIMITS = "Limits"
_NETWORK = "Who is served"


def _limit(option: str, metavar: str, minimum: float, text: str, default: str) -> Any:
    """An option that the environment may set too, whose ``default`` is of ``omniops.server.settings``."""
    return typer.Option(option, metavar=metavar, min=minimum, help=text, show_default=default, rich_help_panel=_LIMITS)


FolderArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="FOLDER",
        help="What the gallery shows: the .mp4 and pictures in it and its folders. The official DATA_PATH will do.",
        show_default="a sample clip",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="M",
        help=MODELS,
        show_default="tiny",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="D[,D...]",
        help="auto, cpu, mps, cuda, ...; of several, as cuda:0,cuda:1, each has a model, and sessions share them.",
        show_default="the GPU where there is one",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Where uploads and posters are kept.",
        show_default="a temporary folder, removed at the end",
    ),
]
OpenBrowserOption = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="For developers: GraphiQL and introspection at /graphql.")]
HostOption = Annotated[
    str,
    typer.Option("--host", metavar="H", help="The address to listen on.", rich_help_panel=_NETWORK),
]
PortOption = Annotated[
    int, typer.Option("--port", metavar="P", min=0, max=65535, help="0: a free one.", rich_help_panel=_NETWORK)
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="T",
        help="What the page asks for. Others on this machine see it among the processes: OMNIOPS_TOKEN hides it.",
        show_default=False,
        rich_help_panel=_NETWORK,
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Serve other machines without a token.", rich_help_panel=_NETWORK)
]
OriginsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--origin",
        metavar="URL",
        help="A page elsewhere that may use the API, as https://example.org. May be repeated.",
        show_default="the official front end's, http://localhost:7262",
        rich_help_panel=_NETWORK,
    ),
]
HostsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="A name that browsers know the server by, as behind a proxy. May be repeated.",
        show_default="localhost and addresses",
        rich_help_panel=_NETWORK,
    ),
]
CertfileOption = Annotated[
    Path | None,
    typer.Option("--certfile", metavar="FILE", help="A certificate, PEM: serve HTTPS.", rich_help_panel=_NETWORK),
]
KeyfileOption = Annotated[
    Path | None,
    typer.Option(
        "--keyfile",
        metavar="FILE",
        help="The certificate's key, PEM.",
        show_default="in the certificate's file",
        rich_help_panel=_NETWORK,
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option("--threads", metavar="N", min=2, help="Requests that are answered at once.", rich_help_panel=_LIMITS),
]
MaxSessionsOption = Annotated[int | None, _limit("--max-sessions", "N", 1, "Videos that are open at once.", "32")]
SessionTimeoutOption = Annotated[
    float | None, _limit("--session-timeout", "S", 1, "Seconds without use until a session ends.", "1800")
]
MaxStreamsOption = Annotated[int | None, _limit("--max-streams", "N", 1, "Sessions that are tracked at once.", "4")]
MaxUploadBytesOption = Annotated[
    int | None, _limit("--max-upload-bytes", "N", 1, "Of a file that is uploaded.", "500000000")
]
MaxUploadSecondsOption = Annotated[
    float | None, _limit("--max-upload-seconds", "S", 0.1, "What of an uploaded video is kept.", "10")
]
