"""ExecuTorch: a .pte whose layers XNNPACK computes where it can, and ExecuTorch's portable kernels where not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export.program import decompose, quiet, require_known_sizes
from omniops.export.request import Request


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path``."""
    with quiet("torch.utils._pytree"):  # of an enumeration of torchao's
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    require_known_sizes(program, "ExecuTorch")
    program = _with_contiguous_constants(program)
    edge = to_edge_transform_and_lower(decompose(program), partitioner=[XnnpackPartitioner()])
    with path.open("wb") as file:
        edge.to_executorch().write_to_file(file)


def _with_contiguous_constants(program: ExportedProgram) -> ExportedProgram:
    """The program, traced again where a weight is not contiguous, whose strides ExecuTorch 1.5 takes for others."""
    values = (*program.state_dict.values(), *program.constants.values())
    if all(not isinstance(value, Tensor) or value.is_contiguous() for value in values):
        return program
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    module = copy.deepcopy(program.module())
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.contiguous()
        traced: ExportedProgram = torch.export.export(module, args, kwargs, strict=False)
        return traced


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file on the CPU."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = method.execute([tensor.contiguous() for tensor in inputs])
        return [tensor.clone() for tensor in found]

    return run
