"""AOTInductor: a .pt2 package of machine code, which PyTorch in C++ and in Python loads without omniops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops import _torch_private
from omniops.export.errors import ExportError
from omniops.export.program import decompose, has_computed_sizes
from omniops.export.request import Request


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path``, for the processor or the GPU that this machine has."""
    _require_known_maps(program)
    try:
        _torch_private.compile_ahead_of_time(decompose(program), path)
    except Exception as error:
        if _torch_private.is_missing_compiler(error):
            raise ExportError(
                "AOTInductor needs a C++ compiler, and none works here: install g++ or clang++, or name one in the "
                "environment variable CXX"
            ) from error
        raise


def _require_known_maps(program: ExportedProgram) -> None:
    """Raise ExportError for convolutions of maps whose size or number is computed: with PyTorch 2.15 they are wrong."""
    convolutions = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "").startswith("conv")
    ]
    if any(has_computed_sizes(node.args[0].meta["val"]) for node in convolutions):
        raise ExportError(
            "AOTInductor computes convolutions wrongly where the size or the number of maps is computed on the way, as "
            "in detectors that take images of any size: write the model for one size, with dynamic_shapes=None, "
            "detection.parts(model, dynamic=False, size=(H, W)) or omniops export --size H W"
        )


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file in this process."""
    module = _torch_private.load_ahead_of_time(path)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            # The code takes the example's strides for granted, and reads other tensors wrongly without a word.
            found = module(*(tensor.contiguous() for tensor in inputs))
        return [found] if isinstance(found, Tensor) else list(found)

    return run
