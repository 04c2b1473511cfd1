"""TorchScript: a .pt that LibTorch and Python load without omniops.

It is the decomposed program, compiled by ``torch.jit.script``, so that sizes stay what they are in the program: a trace
would keep those of the example. A module with omniops' own kernels in it is scripted or traced by ``torch.jit`` itself,
and then whoever loads the file imports omniops first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export.program import decompose, scriptable
from omniops.export.request import Request


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, which is what was asked for
        torch.jit.script(scriptable(decompose(program))).save(str(path))


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = module(*inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    return run
