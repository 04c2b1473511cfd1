"""A part of a model that is written to a file of its own, with what its inputs and outputs are called and mean."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

DynamicShapes = tuple[dict[int, Any], ...]


@dataclass(frozen=True)
class Part:
    """A module, and all that a file of it needs to be made and used.

    Example:
        >>> from omniops.export.parts import Part
        >>> part = Part("double", torch.nn.Identity(), (torch.zeros(2),), ("x",), ("y",), None, "x as it came")
        >>> part.half().args[0].dtype
        torch.float32
    """

    name: str
    """Of the part among those of its model, and of its file: letters, digits and underscores."""
    module: nn.Module
    """In evaluation mode. It takes and returns tensors by position, and has the weights of the model that it is of."""
    args: tuple[Tensor, ...]
    """Inputs to export it with, on the CPU. Dynamic axes have 2 elements or more, each its own number of them."""
    input_names: tuple[str, ...]
    """Of each of ``args``."""
    output_names: tuple[str, ...]
    """Of each tensor that ``module`` returns."""
    dynamic_shapes: DynamicShapes | None
    """Of each of ``args`` the ``torch.export.Dim`` of every axis that may have other sizes; None where none may."""
    description: str
    """What the part does and, a line each, what every input and output is: name, dtype, shape, meaning."""

    def half(self) -> Part:
        """The part with weights in float16, of a copy of the module: its inputs and outputs are what they were."""
        return replace(self, module=copy.deepcopy(self.module).half())


def require_exportable(model: nn.Module) -> None:
    """Raise ValueError for a model that is not in evaluation mode, or not in float32 on the CPU."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"model must be in float32 on the CPU, got {parameter.dtype} on {parameter.device} ({name}): load it "
                "so, or call model.float().cpu(), and take Part.half() for float16"
            )
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
