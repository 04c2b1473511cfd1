"""OpenVINO: an .xml with the graph and a .bin with the weights.

OpenVINO reads PyTorch's programs. It lacks torchvision's suppression of boxes there, which it has in ONNX: what it
cannot read goes by ONNX, in an opset without ``DeformConv``, which it lacks there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export import onnx_file
from omniops.export.errors import ExportError, shorten
from omniops.export.program import decompose, inputs_of
from omniops.export.request import Request

_OPSET = 18
"""Of ONNX between."""


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path`` and the .bin beside it; in half the weights are float16 in the file."""
    import openvino

    try:
        model = openvino.convert_model(decompose(program))
        shapes = [[-1 if size is None else size for size in spec.shape] for spec in inputs_of(program)]
        # It takes all sizes for dynamic where a module does with any.
        model.reshape({number: openvino.PartialShape(shape) for number, shape in enumerate(shapes)})
    except openvino.frontend.OpConversionFailure as error:
        model = _by_onnx(program, request, path, error)
    for value, name in zip(model.inputs, request.input_names, strict=True):
        value.get_tensor().set_names({name})
    for value, name in zip(model.outputs, request.output_names, strict=True):
        value.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=request.half)


def _by_onnx(program: ExportedProgram, request: Request, path: Path, error: Exception) -> Any:
    """The model by a file of ONNX beside ``path``, which is deleted; raises ``error`` where none can be written."""
    import openvino

    if find_spec("onnxscript") is None:
        raise ExportError(
            "OpenVINO cannot read the program, but may read it by ONNX: pip install 'omniops[export]'; it says: "
            f"{shorten(error)}"
        ) from error
    between = path.with_suffix(".onnx")
    onnx_file.write(program, replace(request, opset_version=_OPSET), between)
    model = openvino.convert_model(between)
    between.unlink()
    between.with_name(f"{between.name}.data").unlink(missing_ok=True)
    return model


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file on the CPU, in float32: the CPU would choose bfloat16 where it has that."""
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = compiled([tensor.numpy() for tensor in inputs])
        return [torch.from_numpy(found[number].copy()) for number in range(len(compiled.outputs))]

    return run
