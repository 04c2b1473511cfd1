"""Errors that name the argument, what came and what was expected, in the same words on every device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def tensor(**arguments: Any) -> None:
    """Raise TypeError for an argument that is not a dense tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            convert = "to_padded_tensor(0)" if value.is_nested else "to_dense()"
            raise TypeError(f"{name} must be a dense tensor, got a {layout} one: convert it with {name}.{convert}")


def an_int(**arguments: Any) -> list[int]:
    """The arguments as ints; TypeError for one that stands for none, as a bool or a float.

    Ints are what has ``__index__``, as NumPy's integers do, and what stands for an int while PyTorch traces.
    """
    numbers = []
    for name, value in arguments.items():
        if (number := _int(value)) is None:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        numbers.append(number)
    return numbers


def ints(name: str, values: Iterable[Any]) -> list[int]:
    """Several numbers as ints; TypeError as ``an_int``, ValueError for one that 64 bits cannot hold."""
    numbers = []
    for value in values:
        number = value if type(value) is int else _int(value)
        if number is None:
            raise TypeError(f"{name} must hold ints, got {type(value).__name__}")
        if type(number) is int and not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} must be at least 0 and below 2**63, got {number}")
        numbers.append(number)
    return numbers


def integer(**arguments: Any) -> list[int]:
    """The arguments as ints; TypeError as ``an_int``, ValueError for one below 1 or too large to be a size."""
    numbers = []
    for name, value in arguments.items():
        number = value if type(value) is int else an_int(**{name: value})[0]
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
        if number >= 2**63:
            raise ValueError(f"{name} must be below 2**63, got {number}")
        numbers.append(number)
    return numbers


def whole_number(**arguments: Any) -> list[int]:
    """``integer``, which takes a float that is a whole number too; ValueError for any other float."""
    numbers = {}
    for name, value in arguments.items():
        if isinstance(value, (float, np.floating)):
            if not float(value).is_integer():
                raise ValueError(f"{name} must be a whole number, got {value}")
            value = int(value)
        numbers[name] = value
    return integer(**numbers)


def boolean(**arguments: Any) -> list[bool]:
    """The arguments as bools; TypeError for one that is neither Python's nor NumPy's."""
    for name, value in arguments.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool, got {value!r}")
    return [bool(value) for value in arguments.values()]


def pair(name: str, value: Any) -> list[int]:
    """An int or two as two, also in an array of one dimension; TypeError for anything else."""
    if type(value) is int and -(2**31) < value < 2**31:  # first, as it nearly always is
        return [value, value]
    if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) == (2,):
        values = value.tolist()
    else:
        values = value if isinstance(value, (list, tuple)) else (value, value)
    numbers = []
    for item in values:
        if (number := _int(item)) is None:
            raise TypeError(f"{name} must be an int or two, got {value!r}")
        if not -(2**31) < number < 2**31:
            raise ValueError(f"{name} must be below 2**31 and not negative, got {value!r}")
        numbers.append(number)
    if len(numbers) != 2:
        raise ValueError(f"{name} must be an int or two, got {value!r}")
    return numbers


def _int(value: Any) -> int | None:
    """What ``operator.index`` gives, but None of what is no integer, and of bools and of arrays with dimensions."""
    if type(value) is int:  # first, as it nearly always is
        return value
    if isinstance(value, (bool, np.bool_)):  # NumPy 1 gives its bools an __index__
        return None
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, (Tensor, np.ndarray)):
        scalar = torch.as_tensor(value)
        return int(scalar) if scalar.dim() == 0 and scalar.dtype in INTEGERS and scalar.dtype != torch.bool else None
    # Dynamo traces this and not operator.index.
    return int(value.__index__()) if hasattr(value, "__index__") else None


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError for a tensor of another shape than expected; ``meaning`` has it in letters."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(value.shape)}")


def four_dimensional(**arguments: Tensor) -> None:
    """Raise ValueError for a tensor that is not (N, C, H, W)."""
    for name, value in arguments.items():
        if value.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {tuple(value.shape)}")


def alike(**arguments: Tensor) -> None:
    """Raise for tensors that are not of one supported floating dtype (TypeError) on one device (ValueError)."""
    (first_name, first), *others = arguments.items()
    if first.dtype not in FLOATING:
        raise TypeError(f"{first_name} must be float64, float32, float16 or bfloat16, got {dtype_name(first)}")
    for name, value in others:
        on_device_of(first_name, first, **{name: value})
        if value.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {dtype_name(first)}, got {dtype_name(value)}: "
                f"convert it with {name}.to({first_name}.dtype), or run under torch.autocast"
            )


def on_device_of(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Raise ValueError for one of the others that is not on the device of the first."""
    for name, value in others.items():
        if value.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {value.device}: "
                f"move it there with {name}.to({first_name}.device)"
            )


def not_none(**arguments: Tensor | None) -> dict[str, Tensor]:
    """Those that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def dtype_name(value: Tensor) -> str:
    """As PyTorch writes it, without its own name."""
    return str(value.dtype).removeprefix("torch.")
