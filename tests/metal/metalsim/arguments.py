"""The argument rules of ``torch.mps.compile_shader``'s kernels, kept more strictly than PyTorch keeps them.

PyTorch copies a Python value's bytes to the kernel whatever type the kernel declares, takes True for the integer 1 and
lets a narrowing wrap round. Here each of these is an error, because on a GPU each would be a silently wrong result.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalsim.language import MAX_THREADS_PER_GROUP

MAX_INLINE_BYTES = 4096  # of Metal's setBytes

_CASTS = {"int32": "i", "int16": "h", "int8": "b", "uint8": "B", "fp16": "e", "bf16": "bf16"}
# struct's code -> the letter that the kernel's side uses for the same type.
_LETTERS = {"q": "l", "f": "f", "i": "i", "h": "s", "b": "c", "B": "C", "e": "h", "bf16": "B"}
_NAMES = {
    "b": "bool", "c": "char", "C": "uchar", "s": "short", "S": "ushort", "i": "int", "I": "uint",
    "l": "long", "L": "ulong", "h": "half", "B": "bfloat", "f": "float", "A": "atomic_uint", "?": "a struct",
}  # fmt: skip
# Which element types may stand for a tensor's: its own, and the other sign, since torch has hardly any unsigned type.
_TENSOR_ELEMENTS = {
    torch.float32: "f",
    torch.float16: "hA",
    torch.bfloat16: "BA",
    torch.int64: "lL",
    torch.int32: "iIA",
    torch.int16: "sS",
    torch.int8: "cC",
    torch.uint8: "cC",
    torch.bool: "bcC",
    torch.complex64: "f",
}


@dataclass(frozen=True)
class BufferType:
    """A buffer parameter as the compiler saw it."""

    name: str
    element: str  # one of _NAMES
    constant: bool
    writable: bool
    reference: bool
    size: int  # bytes of what it points or refers to

    def __str__(self) -> str:
        space = "constant" if self.constant else "device" if self.writable else "device const"
        count = self.size // _element_size(self.element)
        return f"{space} {_NAMES[self.element]}{count if count > 1 else ''}{'&' if self.reference else '*'} {self.name}"


def _element_size(letter: str) -> int:
    return 8 if letter in "lL" else 4 if letter in "iIfA" else 2 if letter in "sShB" else 1


@dataclass(frozen=True)
class Inline:
    """A Python value as the bytes that Metal's setBytes would copy."""

    data: bytes
    element: str


@dataclass(frozen=True)
class Dispatch:
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int]


def bind(
    kernel: str, args: Sequence[object], arg_casts: str | Mapping[int, str] | None, parameters: Sequence[BufferType]
) -> list[Tensor | Inline]:
    """Check the arguments against the kernel's buffers and narrow the Python values.

    Raises TypeError or ValueError that names the kernel and the argument.
    """
    if len(args) != len(parameters):
        raise TypeError(
            f"kernel {kernel}: {len(args)} arguments for {len(parameters)} buffers "
            f"({', '.join(str(p) for p in parameters)})"
        )
    if arg_casts is not None and not isinstance(arg_casts, (str, Mapping)):
        raise TypeError(f"kernel {kernel}: arg_casts must be a string or a dict, got {type(arg_casts).__name__}")
    bound: list[Tensor | Inline] = []
    for index, (value, parameter) in enumerate(zip(args, parameters, strict=True)):
        label = f"kernel {kernel}, argument {index} ({parameter})"
        if isinstance(value, Tensor):
            _check_tensor(label, value, parameter)
            bound.append(value)
        else:
            cast = arg_casts.get(index) if isinstance(arg_casts, Mapping) else arg_casts
            inline = _inline(label, value, cast)
            _check_inline(label, value, inline, parameter)
            bound.append(inline)
    if isinstance(arg_casts, Mapping):
        for index in arg_casts:
            if not 0 <= index < len(args) or isinstance(args[index], Tensor):
                raise ValueError(f"kernel {kernel}: arg_casts names argument {index}, which is no Python number")
    return bound


def _check_tensor(label: str, tensor: Tensor, parameter: BufferType) -> None:
    if tensor.dtype not in _TENSOR_ELEMENTS:
        raise TypeError(f"{label}: MPS has no {tensor.dtype}")
    if parameter.element not in _TENSOR_ELEMENTS[tensor.dtype]:
        raise TypeError(f"{label}: got a {tensor.dtype} tensor")
    if tensor.is_conj() or tensor.is_neg():
        raise TypeError(f"{label}: a lazily conjugated or negated tensor is not what its storage holds")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label}: got a {tensor.layout} tensor")
    if parameter.constant and tensor.storage_offset() * tensor.element_size() % 4:
        raise ValueError(f"{label}: a constant buffer has to begin at a multiple of 4 bytes")


def _inline(label: str, value: object, cast: str | None) -> Inline:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"{label}: got an empty list")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"{label}: Metal takes tensors, int, float and lists of them, got {type(item).__name__}")
    kinds = {int if isinstance(item, int) else float for item in values}
    if len(kinds) > 1:
        raise TypeError(f"{label}: got a list of both int and float")
    integer = kinds == {int}
    if cast is not None and cast not in _CASTS:
        raise ValueError(f"{label}: unknown arg_casts {cast!r}; known are {', '.join(_CASTS)}")
    code = _CASTS[cast] if cast else "q" if integer else "f"
    if not integer and code not in ("f", "e", "bf16"):
        raise TypeError(f"{label}: arg_casts {cast!r} would truncate the float {value}")
    try:
        data = b"".join(_pack(code, item) for item in values)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{label}: {value} does not fit into {cast or 'int64'}") from error
    if len(data) > MAX_INLINE_BYTES:
        raise ValueError(f"{label}: {len(data)} bytes, but Metal's setBytes takes at most {MAX_INLINE_BYTES}")
    return Inline(data, _LETTERS[code])


def _pack(code: str, value: float) -> bytes:
    if code == "bf16":
        return torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    if code == "f" and math.isfinite(value) and abs(value) > torch.finfo(torch.float32).max:
        raise OverflowError
    return struct.pack(f"<{code}", value)


def _check_inline(label: str, value: object, inline: Inline, parameter: BufferType) -> None:
    if not parameter.constant:
        raise TypeError(f"{label}: a Python value needs a constant parameter")
    if parameter.element != "?" and parameter.element != inline.element:
        raise TypeError(
            f"{label}: {value} arrives as {_NAMES[inline.element]}; "
            f"declare constant {_NAMES[inline.element]} or use arg_casts"
        )
    if len(inline.data) < parameter.size or (parameter.reference and len(inline.data) != parameter.size):
        raise TypeError(f"{label}: {value} has {len(inline.data)} bytes, the parameter has {parameter.size}")


def dispatch(
    kernel: str,
    args: Sequence[object],
    threads: int | Sequence[int] | None,
    group_size: int | Sequence[int] | None,
    max_threads: int | None,
) -> Dispatch:
    """The grid and the group in three axes, for a kernel of at most max_threads threads a group.

    Raises TypeError or ValueError that names the kernel.
    """
    if max_threads is None:
        raise ValueError(
            f"kernel {kernel}: it has no [[max_total_threads_per_threadgroup(n)]], so the compiler may give its "
            "pipeline room for fewer threads a group than it is launched with"
        )
    if threads is None:
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is None:
            raise ValueError(f"kernel {kernel}: threads is not given and there is no tensor to take it from")
        threads = first.numel()
    grid = _axes(kernel, "threads", threads)
    if group_size is None:
        wide = min(grid[0], max_threads) if len(grid) == 1 else max_threads
        group = (wide, *(1,) * (len(grid) - 1))
    else:
        group = _axes(kernel, "group_size", group_size)
    if len(group) != len(grid):
        raise ValueError(f"kernel {kernel}: group_size has {len(group)} axes, threads has {len(grid)}")
    if math.prod(group) > MAX_THREADS_PER_GROUP:
        raise ValueError(f"kernel {kernel}: group_size {group} is more than {MAX_THREADS_PER_GROUP} threads")
    if math.prod(group) > max_threads:
        raise ValueError(
            f"kernel {kernel}: group_size {group} is more than its max_total_threads_per_threadgroup({max_threads})"
        )
    padding = (1,) * (3 - len(grid))
    x, y, z = grid + padding
    gx, gy, gz = group + padding
    return Dispatch((x, y, z), (gx, gy, gz))


def _axes(kernel: str, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    axes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"kernel {kernel}: {name} must be ints, got {value!r}")
        if not 0 < axis < 2**32:
            raise ValueError(f"kernel {kernel}: {name} must be positive and below 2**32, got {value!r}")
    if not 1 <= len(axes) <= 3:
        raise ValueError(f"kernel {kernel}: {name} must have 1 to 3 axes, got {value!r}")
    return axes
