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


class Save(str, Enum):
    """What is written; from ``coco`` on by ``omniops.annotations``."""

    MASK = "mask"
    OVERLAY = "overlay"
    JSON = "json"
    JSONL = "jsonl"
    COCO = "coco"
    COCO_POLYGONS = "coco-polygons"
    YOLO = "yolo"
    MASKS = "masks"
    LABELS = "labels"
    CUTOUTS = "cutouts"
    LABELME = "labelme"


class Upsampling(str, Enum):
    """How masks come to the size of the picture, as the predictors take it."""

    BILINEAR = "bilinear"
    GUIDED = "guided"


class WhenFull(str, Enum):
    """What becomes of frames that come faster than they are tracked, as ``LiveFrames`` takes it."""

    WAIT = "wait"
    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"


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
SourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE]...",
        help="Pictures, videos, folders, patterns as 'photos/*.jpg', or the URL of one live video, or - for stdin.",
        show_default=False,
    ),
]
PicturesOption = Annotated[
    bool,
    typer.Option("--pictures", help="The files of a folder are pictures by themselves, and not the frames of a video."),
]
CameraOption = Annotated[
    int | None,
    typer.Option(
        "--camera", metavar="N", min=0, help="A camera by its number, from 0 on, as live video.", show_default=False
    ),
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
PredIouThreshOption = Annotated[
    float | None,
    typer.Option(
        "--pred-iou-thresh",
        metavar="X",
        min=0,
        max=1,
        help="With --everything: masks of which the model expects a lower IoU are left out.",
        show_default="0.8; with random weights 0",
    ),
]
StabilityScoreThreshOption = Annotated[
    float | None,
    typer.Option(
        "--stability-score-thresh",
        metavar="X",
        min=0,
        max=1,
        help="With --everything: masks that change more with the threshold of their logits are left out.",
        show_default="0.95; with random weights 0",
    ),
]
CropsOption = Annotated[
    int,
    typer.Option(
        "--crops",
        metavar="N",
        min=0,
        max=4,
        help="With --everything: look again at 4 crops of the picture, with 2 at 16 smaller ones too, and so on.",
    ),
]
MinAreaOption = Annotated[
    int,
    typer.Option(
        "--min-area",
        metavar="PIXELS",
        min=0,
        help="With --everything: fill holes and remove parts of masks that are smaller.",
    ),
]
UpsamplingOption = Annotated[
    Upsampling,
    typer.Option("--upsampling", help="guided: the edges of masks follow those of the picture."),
]
SaveOption = Annotated[
    list[Save] | None,
    typer.Option(
        "--save",
        help="Write this and what else is so named alone. Of a video: overlay, json, jsonl, labels; of a live one "
        "overlay and jsonl.",
        show_default="mask, overlay and json; of a live video overlay and jsonl",
    ),
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="NAME[#OBJECT]",
        help="The class of an object, or of all, in the formats that have classes. May be repeated.",
        show_default="object",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where an earlier run of the same command was interrupted: what it finished stays as it is, and "
        "what it did not is replaced.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE|DIR",
        help="What to write: a .png of a picture, a .mp4 of a video, a folder of several.",
        show_default="omniops-mask.png, omniops-video.mp4, omniops-masks",
    ),
]
ShowOption = Annotated[bool, typer.Option("--show", help="Show a live video in a window; so it is without --out.")]
WhenFullOption = Annotated[
    WhenFull | None,
    typer.Option(
        "--when-full",
        help="What becomes of the frames of a live video that come too fast: wait has the source wait.",
        show_default="drop_oldest; wait for a pipe",
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option("--frames", metavar="N", min=1, help="End a live video after so many frames.", show_default=False),
]


def require_image_size(image_size: int | None) -> None:
    """Raise for a side that no model has."""
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise CommandError(f"--image-size must be a positive multiple of 32, got {image_size}")
