"""A module that takes tensors alone, and the same in float16: what a file of it takes and returns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniops import _torch_private


def prepare(
    module: nn.Module, args: Sequence[Any], dynamic_shapes: Any, half: bool
) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """What is traced: the module, its arguments but for numbers, which files do not take, and their dynamic shapes."""
    is_fixed = [arg is None or isinstance(arg, bool | int | float | str) for arg in args]
    if isinstance(dynamic_shapes, dict):
        names = inspect.signature(module.forward).bind(*args).arguments
        of_args = [dynamic_shapes.get(name) for name in names]
    else:
        of_args = [None] * len(args) if dynamic_shapes is None else list(dynamic_shapes)
    _require_dimensions(args, of_args)
    if not half and not any(is_fixed):
        return module, tuple(args), dynamic_shapes
    if dynamic_shapes is not None:
        if len(of_args) != len(args):
            raise ValueError(f"dynamic_shapes must have an entry for each of {len(args)} args, got {len(of_args)}")
        pairs = zip(of_args, is_fixed, strict=True)
        dynamic_shapes = (tuple(shape for shape, fixed in pairs if not fixed),)  # of the one argument *args
    wrapped = _Wrapped(module, args, is_fixed, half)
    return wrapped, tuple(arg for arg, fixed in zip(args, is_fixed, strict=True) if not fixed), dynamic_shapes


def _require_dimensions(args: Sequence[Any], dynamic_shapes: Sequence[Any]) -> None:
    """Raise ValueError for a dimension that a tensor has not, which torch.export passes over."""
    for number, (arg, shape) in enumerate(zip(args, dynamic_shapes, strict=False)):
        if isinstance(arg, Tensor) and isinstance(shape, dict):
            beyond = [dimension for dimension in shape if dimension not in range(arg.dim())]
            if beyond:
                raise ValueError(
                    f"dynamic_shapes must name dimensions from 0 to {arg.dim() - 1} of argument {number}, of shape "
                    f"{tuple(arg.shape)}; got {beyond[0]}"
                )


def placed(module: nn.Module, args: Sequence[Any], has_device: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module and its arguments where a file is written of them: a copy on the CPU, if the format has no device.

    Raises:
        ValueError: for a module or arguments without values.
    """
    named = *module.named_parameters(), *module.named_buffers(), *(("args", x) for x in _torch_private.tensors_in(args))
    for name, tensor in named:
        if tensor.is_meta:
            raise ValueError(
                f"module and args must have values, and {name} is on the device meta: load the weights first"
            )
    if has_device or all(tensor.is_cpu for _, tensor in named):
        return module, tuple(args)
    return copy.deepcopy(module).cpu(), _torch_private.map_tensors(Tensor.cpu, tuple(args))


class _Wrapped(nn.Module):
    """A module with some of its arguments as they were; in half a copy with weights in float16.

    It takes and returns the dtypes that the module does.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], is_fixed: Sequence[bool], half: bool) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half() if half else module
        self.fixed = {position: args[position] for position, fixed in enumerate(is_fixed) if fixed}
        self.count, self.half_precision = len(args), half

    def forward(self, *args: Any) -> Any:
        """Of the arguments that are not fixed."""
        given = iter(args)
        values = [self.fixed[position] if position in self.fixed else next(given) for position in range(self.count)]
        if not self.half_precision:
            return self.module(*values)
        return _torch_private.map_tensors(_widened, self.module(*_torch_private.map_tensors(_halved, values)))


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
