"""The options of ``omniops export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class FormatName(str, Enum):
    """The formats, as ``omniops.export.FORMATS`` has them."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TORCHSCRIPT = "torchscript"
    AOTI = "aoti"
    COREML = "coreml"


class PartName(str, Enum):
    """The parts of SAM 2."""

    IMAGE_ENCODER = "image-encoder"
    MASK_DECODER = "mask-decoder"
    MEMORY_ATTENTION = "memory-attention"
    MEMORY_ENCODER = "memory-encoder"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A detector, mask-rcnn-r50-carafe or faster-rcnn-r50-carafe; SAM 2, by tiny, small, base-plus or large, "
        "Meta's .pt or its URL, a folder or a hub id; or module:function of yours.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option("--format", help="What is written.", show_default="by the ending of --out"),
]
OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Ends with .onnx, .xml (OpenVINO, with a .bin beside it), .pte (ExecuTorch), .pt (TorchScript), .pt2 "
        "(AOTInductor) or .mlpackage (Core ML). Of all parts of SAM 2 it is a folder.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|URL|coco",
        help="Of a detector: a file of omniops detect-train, OpenMMLab's checkpoint or a state dict; coco: the one "
        "that OpenMMLab published, 200 MB, fetched once.",
    ),
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="A detector or SAM 2 without weights, to see it run.")
]
PartOption = Annotated[PartName | None, typer.Option("--part", help="Of SAM 2.", show_default="each, into a folder")]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="N",
        help="Of SAM 2: the side of the square that the model sees, a multiple of 32.",
        show_default="1024, as the model was trained",
    ),
]
SizeOption = Annotated[
    tuple[int, int] | None,
    typer.Option(
        "--size",
        metavar="H W",
        help="Of a detector: the height and width of images, of which the file then takes no others.",
        show_default="any; 480 640 with --fixed-sizes",
    ),
]
FixedOption = Annotated[
    bool,
    typer.Option(
        "--fixed-sizes",
        help="All sizes are those of one example; some runtimes want that. For ExecuTorch and Core ML they are anyway.",
    ),
]
OpsetOption = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="Of ONNX, from 18 on.", show_default="20")
]
HalfOption = Annotated[
    bool, typer.Option("--half", help="Weights in float16: half the bytes. Inputs and outputs stay float32.")
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check", help="Run the file, and print how far it is from PyTorch; for that the format's runtime is needed."
    ),
]
