"""ONNX, by PyTorch's exporter and the operators of ``omniops.onnx``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export.errors import ExportError
from omniops.export.program import quiet
from omniops.export.request import Request
from omniops.onnx import translations

_OPSET = 20
"""Where none is asked for: from 19 on there is ``DeformConv``."""
_MOST_BYTES = 2**31 - 2**24
"""Of weights in one file, which protobuf reads to 2 GB; more are in a second file beside it."""


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path``, and ``path``.data beside it where the weights are 2 GB or more."""
    with quiet("onnxscript.version_converter"):
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=request.input_names,
            output_names=request.output_names,
            opset_version=request.opset_version or _OPSET,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert onnx_program is not None
    found = onnx_program.model.opset_imports[""]
    if request.opset_version not in (None, found):
        raise ExportError(
            f"PyTorch's exporter writes no opset {request.opset_version} of this model: it wrote {found} instead. Ask "
            f"for that, or for {_OPSET}, which is what is written where none is asked for"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    onnx_program.save(path, external_data=size > _MOST_BYTES)


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file in onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        found: list[Any] = session.run(None, feed)
        return [torch.from_numpy(array) for array in found]

    return run
