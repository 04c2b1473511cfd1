"""The options of ``omniops selftest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.cases import CASES
from omniops.cli.common import DEVICE_NAMES
from omniops.cli.selftest.models import models

GROUPS = ("operators", "models")

DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="D", help=DEVICE_NAMES, show_default="every device found")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="operators, models, or one by its name: "
        + ", ".join([*(case.NAME for case in CASES), *(model.name for model in models(128))])
        + ". May be given several times.",
        show_default="all",
    ),
]
ImageSizeOption = Annotated[
    int,
    typer.Option(
        "--image-size",
        metavar="S",
        min=32,
        help="The side that SAM 2 resizes pictures to, a multiple of 32. People use 1024, which takes minutes and "
        "gigabytes here.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, to attach to a report.")
]
