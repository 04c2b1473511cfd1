"""A file beside the module that it was written of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from omniops._torch_private import tensors_in
from omniops.export.errors import ExportError
from omniops.export.formats import FORMATS, Written, require_format
from omniops.export.program import evaluating


def load(written: Written) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A function that runs a file: of its input tensors, in their order, it makes the output tensors.

    It runs on the CPU, but TorchScript and AOTInductor on the device of the module that they were written of.

    Raises:
        ImportError: where what runs the format is not installed.
        ExportError: for Core ML, which this package does not run.

    Example:
        >>> from omniops import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = export.load(export.write(nn.ReLU(), (torch.zeros(2),), f"{folder}/relu.pt"))
        >>> run([torch.tensor([-1.0, 2.0])])
        [tensor([0., 2.])]
    """
    require_runtime(written.format)
    module = import_module(f"omniops.export.{FORMATS[written.format].module}")
    run: Callable[[Sequence[Tensor]], list[Tensor]] = module.load(written.path)
    return run


def require_runtime(format: str) -> None:
    """Raise, as ``load`` does, where files of a format cannot be run.

    Example:
        >>> from omniops import export
        >>> export.require_runtime("torchscript")
    """
    require_format(format)
    described = FORMATS[format]
    if described.runtime is None:
        raise ExportError(f"{described.title} files are not run here: only Apple's systems run them")
    if find_spec(described.runtime) is None:
        raise ImportError(
            f"{described.runtime}, which runs {described.title} files, is not installed: "
            f"pip install {described.runtime}"
        )


def largest_difference(written: Written, module: nn.Module, args: Sequence[Any]) -> float:
    """How far the file's results are from the module's: the largest difference, relative to the largest result.

    Of several output tensors it is the worst, and infinite where a result is not a finite number. Raises what ``load``
    does, and ExportError where shapes differ.

    Example:
        >>> from omniops import export
        >>> model, args = nn.Linear(3, 2), (torch.rand(4, 3),)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = export.write(model, args, f"{folder}/linear.pt")
        ...     print(export.largest_difference(written, model, args) < 1e-6)
        True
    """
    run = load(written)
    with evaluating(module), torch.no_grad():
        expected = tensors_in(module(*args))
    given = [tensor.detach() for tensor in tensors_in(args)]
    found = run(given if FORMATS[written.format].has_device else [tensor.cpu() for tensor in given])
    differences = [0.0]
    for spec, ours, theirs in zip(written.outputs, expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(f"{spec.name} has shape {tuple(theirs.shape)}, and the module's {tuple(ours.shape)}")
        differences.append(_difference(ours.cpu().double(), theirs.cpu().double()))
    return max(differences)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.numel() == 0:
        return 0.0
    difference = (ours - theirs).abs().max() / ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference) if bool(difference.isfinite()) else float("inf")
