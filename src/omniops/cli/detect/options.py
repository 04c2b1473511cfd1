"""The options of ``omniops detect`` and ``omniops detect-eval``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from omniops.cli.common import CommandError


class Model(str, Enum):
    """The detectors, as ``--model`` names them."""

    MASK = "mask-rcnn-r50-carafe"
    FASTER = "faster-rcnn-r50-carafe"

    @property
    def architecture(self) -> str:
        """The function of ``omniops.detection`` that builds it."""
        return {Model.MASK: "mask_rcnn_resnet50_fpn_carafe", Model.FASTER: "faster_rcnn_resnet50_fpn_carafe"}[self]

    @classmethod
    def of(cls, architecture: str) -> Model:
        """The one that a function of ``omniops.detection`` builds."""
        return next(model for model in cls if model.architecture == architecture)


ModelOption = Annotated[
    Model,
    typer.Option(
        "--model", help="Mask R-CNN gives masks as well. What omniops detect-train wrote says itself what it is."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|URL|coco",
        help="A file of omniops detect-train, OpenMMLab's checkpoint or a state dict; coco: the one that OpenMMLab "
        "published, 200 MB, fetched once.",
    ),
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Instead of --weights: to see it run. It finds nothing real.")
]

# Of omniops detect.
PicturesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE",
        help="Pictures, folders of them, or patterns in quotes, as 'photos/**/*.jpg'; - is a picture from stdin.",
        show_default=False,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        help="How many pictures are detected at once. Of them those that are padded to one size go through the model "
        "together, so that what is found is that of --batch 1 but for rounding.",
        show_default="4 on a CUDA GPU, else 1",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")]
ThresholdOption = Annotated[
    float, typer.Option("--threshold", metavar="T", min=0.0, max=1.0, help="The lowest score that is drawn.")
]

# Of omniops detect-eval.
FolderOption = Annotated[Path, typer.Option("--images", metavar="DIR", help="The folder of the pictures.")]
AnnotationsOption = Annotated[
    Path, typer.Option("--annotations", metavar="FILE.json", help="COCO's annotations of instances in them.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")]


def require_weights(weights: str | None, random_weights: bool, purpose: str = "shows how it runs") -> None:
    """Raise where there is not one of the two; ``purpose`` says what random weights do."""
    if weights is None and not random_weights:
        raise CommandError(
            "no weights: --weights coco fetches those that OpenMMLab published; a file of them or their URL will do "
            "as well, and --random-weights " + purpose
        )
    if weights is not None and random_weights:
        raise CommandError("--weights and --random-weights exclude each other")
