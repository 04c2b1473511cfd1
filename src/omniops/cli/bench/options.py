"""The options of ``omniops bench`` and ``omniops bench sam2``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.common import DEVICE_NAMES

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them there: .png, .svg.")]

# Of omniops bench.
OperatorArgument = Annotated[str | None, typer.Argument(metavar="OP", help="One operator; all without it.")]
BesideOption = Annotated[
    Path | None,
    typer.Option("--beside", metavar="FILE", help="Times of another run, written by --json, to stand beside these."),
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", metavar="S", min=0.0, help="Time spent on each measurement.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="One tiny shape: does it run at all?")]
GoalsOption = Annotated[bool, typer.Option("--goals", hidden=True)]
"""The goals name an H200 and two CPU threads: benchmarks/ asks for them, on those machines."""

# Of omniops bench sam2.
PictureArgument = Annotated[
    Path | None, typer.Argument(metavar="IMAGE", help="Any picture; noise of 1800 x 1200 pixels without it.")
]
SizeOption = Annotated[
    str, typer.Option("--model", metavar="SIZE", help="tiny, small, base-plus or large; its weights are random.")
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="D,D,...",
        help=f"Of {DEVICE_NAMES}; speed-ups are over the first.",
        show_default="the CPU, and the GPU where there is one",
    ),
]
VideoOption = Annotated[
    Path | None, typer.Option("--video", metavar="FILE", help="Follow objects through this video as well.")
]
FramesOption = Annotated[
    int | None, typer.Option("--frames", metavar="N", min=2, help="How many frames of it.", show_default="16")
]
ObjectsOption = Annotated[
    int | None, typer.Option("--objects", metavar="N", min=1, help="How many objects, in one row.", show_default="1")
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Also with the image encoder compiled, which takes minutes.")
]
SecondsOfStepOption = Annotated[
    float, typer.Option("--seconds", metavar="S", min=0.0, help="Time spent on each measurement, or three runs.")
]
