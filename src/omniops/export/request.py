"""What a file of a format is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What the writer of a format is told beside the program."""

    input_names: Sequence[str]
    """Of each tensor that the program takes."""
    output_names: Sequence[str]
    """Of each tensor that it returns."""
    half: bool
    """Whether weights are to be float16. Where the format has no way of its own, the program is in float16 already."""
    opset_version: int | None
    """Of ONNX; None for the one that suits."""
