"""The formats, and how a module is written in one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from omniops.export import files
from omniops.export.errors import ExportError, shorten
from omniops.export.parts import Part
from omniops.export.program import (
    TensorSpec,
    inputs_of,
    outputs_of,
    parameter_names,
    trace,
    without_torchvisions_warning,
)
from omniops.export.request import Request
from omniops.export.wrapped import placed, prepare

FIRST_OPSET = 18
"""Of ONNX, that PyTorch's exporter writes."""


@dataclass(frozen=True)
class Format:
    """What a kind of file is.

    Example:
        >>> from omniops import export
        >>> export.FORMATS["openvino"].suffix
        '.xml'
    """

    title: str
    suffix: str
    module: str
    """Of ``omniops.export``, that writes and runs it."""
    packages: tuple[str, ...]
    """What has to be installed to write it, by the names that are imported."""
    install: str
    """What ``pip install`` takes for that; empty where PyTorch itself writes it."""
    runtime: str | None
    """What has to be installed to run it from Python; None where this package does not run it."""
    is_dynamic: bool = False
    """Whether sizes of inputs may be others than the example's."""
    has_half: bool = False
    """Whether the format itself makes weights float16; of the others the module is."""
    has_device: bool = False
    """Whether files run on the module's device; the others are of no device, and made of a copy on the CPU."""


FORMATS = {
    "onnx": Format(
        "ONNX", ".onnx", "onnx_file", ("onnx", "onnxscript"), "'omniops[export]'", "onnxruntime", is_dynamic=True
    ),
    "openvino": Format(
        "OpenVINO", ".xml", "openvino", ("openvino",), "openvino", "openvino", is_dynamic=True, has_half=True
    ),
    "executorch": Format("ExecuTorch", ".pte", "executorch", ("executorch",), "executorch", "executorch"),
    "torchscript": Format("TorchScript", ".pt", "torchscript", (), "", "torch", is_dynamic=True, has_device=True),
    "aoti": Format("AOTInductor", ".pt2", "aoti", (), "", "torch", is_dynamic=True, has_device=True),
    "coreml": Format("Core ML", ".mlpackage", "coreml", ("coremltools",), "coremltools", None, has_half=True),
}
"""By their names."""


@dataclass(frozen=True)
class Written:
    """A file that was written, and the tensors that it takes and returns, in their order.

    Example:
        >>> from omniops import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = export.write(nn.Flatten(), (torch.rand(2, 3, 4),), f"{folder}/flatten.pt")
        >>> print(*written.inputs, "->", *written.outputs)
        input float32 (2, 3, 4) -> output float32 (2, 12)
    """

    path: Path
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def write(
    module: nn.Module,
    args: Sequence[Any],
    path: str | PathLike[str],
    format: str | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write a module to a file that runs without omniops, in evaluation mode.

    omniops' operators become the format's own, or are decomposed into PyTorch's, of every operator in a program that
    ``torch.export`` traces. The file is there whole or not at all.

    Args:
        module: what is written. Its weights are in the file. Files of TorchScript and AOTInductor run on its device;
            for the other formats a copy of it is moved to the CPU.
        args: what it is called with; sizes, dtypes and values that are no tensors are taken from here.
        path: where to. It ends as the format's files do: .onnx, .xml (OpenVINO, with a .bin beside it), .pte
            (ExecuTorch), .pt (TorchScript), .pt2 (AOTInductor), .mlpackage (Core ML, a folder).
        format: a name of ``FORMATS``; the one of the path's ending, if None.
        dynamic_shapes: of each argument the dimensions that may have other sizes, as ``torch.export.export`` takes
            them: ``({0: torch.export.Dim.AUTO},)``. Files for ExecuTorch and Core ML have the example's.
        input_names, output_names: of the tensors; those of ``forward``, and output or output_0, output_1, ..., if None.
            ExecuTorch, TorchScript and AOTInductor know positions alone.
        opset_version: of ONNX alone, from 18 on; 20 if None. From 19 on it has deformable convolution.
        half: float16 for weights, and for what is computed where the format decides that: inputs and outputs stay what
            they are.
        overwrite: whether what has that name is replaced.

    Returns:
        What was written, with the names, dtypes and shapes of inputs and outputs.

    Raises:
        ValueError: for an unknown format, another ending of the path, another number of names than of tensors, a
            dimension that a tensor has not, an opset that is not written, or a module without values.
        TypeError: for a module or an opset that is none.
        ImportError: where a package of the format is not installed.
        FileExistsError, FileNotFoundError, PermissionError: where there is such a file, no such folder, or no right to
            write there.
        ExportError: where the module cannot be traced or the format cannot express it: connected components
            (``omniops.fill_holes``) have no place but in ONNX.

    Example:
        >>> from omniops import export
        >>> model, image = omniops.CARAFEPack(channels=8, scale_factor=2), torch.rand(1, 8, 6, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = export.write(model, (image,), f"{folder}/upsampler.pt")
        ...     print(torch.jit.load(written.path)(image).shape, written.path.name)
        torch.Size([1, 8, 12, 12]) upsampler.pt
    """
    name, path = _choose(format, Path(path))
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple of the module's arguments, got {type(args).__name__}")
    _require_possible(name, dynamic_shapes, opset_version)
    require_packages(name)
    files.require_new(path, FORMATS[name].suffix, overwrite)
    if input_names is None:
        input_names = parameter_names(module, args)
    title = type(module).__name__
    module, args, dynamic_shapes = prepare(module, args, dynamic_shapes, half and not FORMATS[name].has_half)
    module, args = placed(module, args, FORMATS[name].has_device)
    program = trace(module, args, dynamic_shapes, title)
    return _write_program(program, path, name, input_names, output_names, opset_version, half, overwrite)


def write_part(
    part: Part,
    path: str | PathLike[str],
    format: str | None = None,
    *,
    opset_version: int | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write a part of a model, with its names and, where the format has them, its dynamic sizes.

    Arguments, results and errors are those of ``write``.

    Example:
        >>> from omniops import export
        >>> part = export.Part("relu", nn.ReLU(), (torch.zeros(2),), ("x",), ("y",), None, "what is above zero")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(*export.write_part(part, f"{folder}/relu.pt").outputs)
        y float32 (2,)
    """
    name, path = _choose(format, Path(path))
    _require_possible(name, None, opset_version)
    require_packages(name)
    files.require_new(path, FORMATS[name].suffix, overwrite)
    written = part.half() if half and not FORMATS[name].has_half else part
    dynamic_shapes = written.dynamic_shapes if FORMATS[name].is_dynamic else None
    module, args = placed(written.module, written.args, FORMATS[name].has_device)
    program = trace(module, args, dynamic_shapes, part.name)
    return _write_program(program, path, name, part.input_names, part.output_names, opset_version, half, overwrite)


def require_packages(format: str) -> None:
    """Raise ImportError where a package that writes the format is not installed; says how to install it.

    Raises ValueError for an unknown format.

    Example:
        >>> from omniops import export
        >>> export.require_packages("torchscript")
    """
    require_format(format)
    for package in FORMATS[format].packages:
        if find_spec(package) is None:
            raise ImportError(
                f"format {format!r} needs {package}, which is not installed: pip install {FORMATS[format].install}"
            )


def _choose(format: str | None, path: Path) -> tuple[str, Path]:
    suffixes = {described.suffix: name for name, described in FORMATS.items()}
    name = suffixes.get(path.suffix.lower()) if format is None else format
    if name is None:
        raise ValueError(f"path must end with {', '.join(suffixes)}, or format be named; got {str(path)!r}")
    require_format(name)
    return name, path


def require_format(name: str) -> None:
    """Raise ValueError for the name of no format."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")


def _require_possible(format: str, dynamic_shapes: Any, opset_version: int | None) -> None:
    if dynamic_shapes is not None and not FORMATS[format].is_dynamic:
        raise ValueError(
            f"dynamic_shapes must be None for format {format!r}, whose files take the sizes of the example; write one "
            "for each size"
        )
    if opset_version is not None and format != "onnx":
        raise ValueError(f"opset_version is of ONNX, and must be None for format {format!r}; got {opset_version}")
    if opset_version is not None and (isinstance(opset_version, bool) or not isinstance(opset_version, int)):
        raise TypeError(f"opset_version must be a number, got {type(opset_version).__name__}")
    if opset_version is not None and opset_version < FIRST_OPSET:
        raise ValueError(
            f"opset_version must be {FIRST_OPSET} or later, which PyTorch's exporter writes; got {opset_version}"
        )


def _write_program(
    program: ExportedProgram,
    path: Path,
    format: str,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset_version: int | None,
    half: bool,
    overwrite: bool,
) -> Written:
    inputs, outputs = inputs_of(program, input_names), outputs_of(program, output_names)
    names = [spec.name for spec in inputs], [spec.name for spec in outputs]
    writer = import_module(f"omniops.export.{FORMATS[format].module}")
    with files.writing(path, overwrite) as temporary, without_torchvisions_warning():
        try:
            writer.write(program, Request(*names, half, opset_version), temporary)
        except (ExportError, OSError):
            raise
        except Exception as error:
            raise ExportError(f"{FORMATS[format].title} cannot take the model: {shorten(error)}") from error
    return Written(path, format, inputs, outputs)
