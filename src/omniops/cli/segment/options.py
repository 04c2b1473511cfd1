"""The options of ``omniops segment``, some of which other commands with SAM 2 take as well."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.common import CommandError

GRID, GRID_OF_RANDOM_WEIGHTS = 32, 4
IMAGE_SIZE_OF_RANDOM_WEIGHTS = 256
"""With ``--everything``: random weights show something soon."""
MODELS = "tiny, small, base-plus or large, which are fetched once; Meta's .pt or its URL, a folder, a hub id."
"""What ``--model`` takes."""


class Precision(str, Enum):
    """What the model computes in, as ``omniops.sam2.load`` takes it."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


PrecisionOption = Annotated[
    Precision, typer.Option("--dtype", help="What is computed in; auto: the one that suits the device.")
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="To see it run without any: its masks mean nothing.")
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="N",
        help="The side of the square that the model sees, a multiple of 32: less is faster and coarser.",
        show_default="1024, as the model was trained",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="M",
        help=MODELS,
    ),
]
SourceArgument = Annotated[
    Path, typer.Argument(metavar="IMAGE|VIDEO", help="A picture, a video, or a folder of a video's frames.")
]
PointsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        metavar="X,Y[,LABEL][@FRAME][#OBJECT]",
        help="A place in pixels from the top left; LABEL 1, of the object, or 0, not of it. May be repeated.",
        show_default=False,
    ),
]
BoxesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--box",
        metavar="X0,Y0,X1,Y1[@FRAME][#OBJECT]",
        help="Around an object, from the top left corner to the bottom right one. May be repeated.",
        show_default=False,
    ),
]
EverythingOption = Annotated[
    bool, typer.Option("--everything", help="Instead of prompts: every mask that a grid of points finds.")
]
GridOption = Annotated[
    int | None,
    typer.Option(
        "--grid",
        metavar="N",
        min=1,
        help="The points along a side of the grid of --everything: half as many take a quarter of the time.",
        show_default=f"{GRID}; with random weights {GRID_OF_RANDOM_WEIGHTS}",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="What to write: a .png of a picture, a .mp4 of a video.",
        show_default="omniops-mask.png, omniops-video.mp4",
    ),
]


def require_image_size(image_size: int | None) -> None:
    """Raise for a side that no model has."""
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise CommandError(f"--image-size must be a positive multiple of 32, got {image_size}")
