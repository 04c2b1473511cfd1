"""OpenVINO: an .xml with the graph and a .bin with the weights, without ONNX between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export.program import decompose
from omniops.export.request import Request


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path`` and the .bin beside it; in half the weights are float16 in the file."""
    import openvino

    model = openvino.convert_model(decompose(program))
    for value, name in zip(model.inputs, request.input_names, strict=True):
        value.get_tensor().set_names({name})
    for value, name in zip(model.outputs, request.output_names, strict=True):
        value.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=request.half)


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file on the CPU, in float32: the CPU would choose bfloat16 where it has that."""
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = compiled([tensor.numpy() for tensor in inputs])
        return [torch.from_numpy(found[number].copy()) for number in range(len(compiled.outputs))]

    return run
