"""The options of ``omniops detect-train`` that are no other command's."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.detect.options import Model


class Schedule(str, Enum):
    """How the learning rate falls."""

    STEP = "step"
    COSINE = "cosine"


class Precision(str, Enum):
    """What a network computes in while it is trained."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


TrainedModelOption = Annotated[
    Model, typer.Option("--model", help="Mask R-CNN gives masks as well, and needs one of every object.")
]
StartOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|URL|coco",
        help="What it starts from: coco, which OpenMMLab published, 200 MB, fetched once; a file of omniops "
        "detect-train; OpenMMLab's checkpoint or a state dict.",
    ),
]
RandomStartOption = Annotated[
    bool, typer.Option("--random-weights", help="Instead of --weights: train the whole network from the beginning.")
]
TrainingOutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The folder that last.pth, best.pth and history.json go to.")
]
ValImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--val-images", metavar="DIR", help="The folder of --val-annotations' pictures.", show_default="--images"
    ),
]
ValAnnotationsOption = Annotated[
    Path | None,
    typer.Option("--val-annotations", metavar="FILE.json", help="Annotations by which the AP is told of each epoch."),
]
HoldOutOption = Annotated[
    float,
    typer.Option(
        "--hold-out",
        metavar="SHARE",
        min=0.0,
        max=0.9,
        help="Without --val-annotations: the share of the pictures that tells the AP, and is not trained on.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from DIR/last.pth; where there is none, begin anew.")
]
EpochsOption = Annotated[
    int, typer.Option("--epochs", metavar="N", min=1, help="How often each picture is trained on.")
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures a step, of all processes together.")
]
LrOption = Annotated[
    float | None,
    typer.Option(
        "--lr",
        metavar="R",
        min=0.0,
        help="The learning rate after warm-up.",
        show_default="0.00125 for each picture of a step",
    ),
]
ScheduleOption = Annotated[
    Schedule,
    typer.Option("--schedule", help="step: to a tenth after 8/12 and 11/12 of the training; cosine: to 0."),
]
WarmupOption = Annotated[
    int | None,
    typer.Option(
        "--warmup",
        metavar="N",
        min=0,
        help="Steps over which the learning rate rises.",
        show_default="a tenth of all, at most 500",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--precision", help="What the network computes in; auto: what suits the device.", show_default="float32"
    ),
]
AmpOption = Annotated[bool, typer.Option("--amp", help="Mixed precision: as --precision auto.")]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Of the pictures' order and all that is drawn.")
]
FlipOption = Annotated[
    bool, typer.Option("--flip/--no-flip", help="Mirror half of the pictures; not where left and right differ.")
]
MinSizeOption = Annotated[
    int,
    typer.Option("--min-size", metavar="PX", min=32, max=4096, help="What pictures' shorter side is resized to."),
]
MaxSizeOption = Annotated[
    int,
    typer.Option("--max-size", metavar="PX", min=32, max=8192, help="What the longer side is at most resized to."),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Processes that read pictures, for each that trains.")
]
CheckpointStepsOption = Annotated[
    int,
    typer.Option(
        "--checkpoint-steps", metavar="N", min=1, help="Write last.pth after so many steps too, not after epochs alone."
    ),
]
