"""What crosses between a process and its caller: pickles for plain data, shared memory for arrays and tensors.

The caller started the process, from its own interpreter, search path and user, and nobody else can write to the socket
between them. So the process unpickles whatever it is sent. The caller unpickles less: numbers, strings, and tuples,
lists, dicts and sets of them, which import and call nothing; arrays and tensors are rebuilt from their bytes. An
exception crosses as the name of its class, which the caller imports, and the plain data that the class is called with.
"""

from __future__ import annotations

import io
import os
import pickle
import pkgutil
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniops.remote.errors import RemoteError

SERVED = 0
"""The number of the object that the process serves; those that its methods leave there follow."""


class Reference:
    """Stands for an object that stays in the process: in a message it is the object's number there."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number


class RemoteTraceback(Exception):  # noqa: N818 what it is, and what concurrent.futures calls its own
    """The cause of an exception that came from the process: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def shared_memory() -> io.FileIO:
    """A file in memory for two processes that take turns. It has no name, so nothing is left when both have ended."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("omniops"), "r+b", buffering=0)
    # macOS has no memfd. Little of a file that lives briefly is ever written to the disk.
    return tempfile.TemporaryFile(buffering=0)


def encode(value: Any, memory: io.FileIO, *, plain: bool = False) -> bytes:
    """The message for a value, whose arrays and tensors are written to the shared memory.

    Args:
        value: what is sent.
        memory: of ``shared_memory()``; the bytes of the message before are overwritten.
        plain: refuse what the caller would not read.

    Raises:
        TypeError: for arrays without bytes of their own, as of Python objects; with ``plain``, for whatever is neither
            an array, a tensor nor plain data.
        Exception: whatever pickle raises for what cannot be pickled.
    """
    message = io.BytesIO()
    (_PlainWriter if plain else _Writer)(message, memory).dump(value)
    return message.getvalue()


def decode(message: bytes, memory: io.FileIO, objects: Mapping[int, Any] | None = None) -> Any:
    """The value of a message.

    Args:
        message: of ``encode``.
        memory: the one that the message was encoded with.
        objects: in the process, those that stay there, by number. In the caller None: then only plain data, arrays
            and tensors are read.

    Raises:
        pickle.UnpicklingError: for anything else in a message from the process.
        EOFError: where the shared memory ends early.
    """
    return _Reader(io.BytesIO(message), memory, objects).load()


def can_cross(value: Any, memory: io.FileIO) -> bool:
    """Whether a value can be sent to the caller."""
    try:
        encode(value, memory, plain=True)
    except TypeError:
        return False
    return True


def encode_error(error: BaseException, memory: io.FileIO) -> bytes:
    """The message ``("error", ...)`` for an exception of the process; ``rebuild_error`` takes what follows."""
    cls = type(error)
    names, message = (cls.__module__, cls.__qualname__), str(error)
    trace = "".join(traceback.format_exception(error))
    try:
        # The args attribute of an OSError lacks the file name; what it is pickled with has it.
        return encode(("error", (*names, error.__reduce__()[1], message, trace)), memory, plain=True)
    except Exception:  # arguments that are no plain data
        return encode(("error", (*names, (message,), message, trace)), memory, plain=True)


def rebuild_error(module: str, name: str, args: tuple[Any, ...], message: str, trace: str) -> Exception:
    """The exception that the process raised, or RemoteError where its class cannot be imported or made again here."""
    error: Exception = RemoteError(f"{module}.{name}: {message}")
    with suppress(Exception):
        cls = pkgutil.resolve_name(f"{module}:{name}")
        if isinstance(cls, type) and issubclass(cls, Exception):
            error = cls(*args)
    error.__cause__ = RemoteTraceback(trace)
    return error


class _Writer(pickle.Pickler):
    """Writes arrays and tensors to shared memory, one after the other, and the rest to the pickle."""

    def __init__(self, message: io.BytesIO, memory: io.FileIO) -> None:
        super().__init__(message, protocol=5)
        self._memory = memory
        self._end = memory.seek(0)

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            # Not reshape, which keeps the stride of a single element, whose bytes cannot be viewed then.
            flat = tensor.as_strided((tensor.numel(),), (1,))
            start = self._write(flat.view(torch.uint8).numpy())
            return "tensor", _dtype_name(value.dtype), tuple(value.shape), start
        if type(value) is np.ndarray or isinstance(value, np.generic):
            array = np.asarray(value)
            if array.dtype.hasobject or array.dtype.kind == "V":
                raise TypeError(f"an array of {array.dtype} does not pass between processes")
            kind = "array" if type(value) is np.ndarray else "scalar"
            start = self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            return kind, array.dtype.str, array.shape, start
        if isinstance(value, torch.dtype):
            return "dtype", _dtype_name(value)
        if isinstance(value, torch.device):
            return "device", str(value)
        if isinstance(value, Reference):
            return "object", value._number
        return None

    def _write(self, data: NDArray[np.uint8]) -> int:
        start = self._end
        unwritten = data.data
        while unwritten:  # an operating system writes 2 GiB at most at once
            unwritten = unwritten[self._memory.write(unwritten) :]
        self._end += len(data)
        return start


class _PlainWriter(_Writer):
    """Refuses what the caller would not read."""

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        raise TypeError(
            f"a {cls.__module__}.{cls.__qualname__} stays in the process of the remote object: only arrays, tensors "
            "and plain data pass"
        )


class _Reader(pickle.Unpickler):
    def __init__(self, message: io.BytesIO, memory: io.FileIO, objects: Mapping[int, Any] | None) -> None:
        super().__init__(message)
        self._memory = memory
        self._objects = objects

    def find_class(self, module: str, name: str) -> Any:
        if self._objects is None:
            raise pickle.UnpicklingError(
                f"expected plain data from the process of the remote object, got {module}.{name}"
            )
        return super().find_class(module, name)

    def persistent_load(self, persistent: tuple[Any, ...]) -> Any:
        kind, *details = persistent
        if kind == "tensor":
            dtype, shape, start = details
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._read(tensor.reshape(-1).view(torch.uint8).numpy(), start)
            return tensor
        if kind in ("array", "scalar"):
            dtype, shape, start = details
            array = np.empty(shape, dtype)
            self._read(array.reshape(-1).view(np.uint8), start)
            return array if kind == "array" else array[()]
        (name,) = details
        if kind == "dtype":
            return getattr(torch, name)
        if kind == "device":
            return torch.device(name)
        return (self._objects or {})[name]

    def _read(self, data: NDArray[np.uint8], start: int) -> None:
        self._memory.seek(start)
        unread = data.data
        while unread:
            count = self._memory.readinto(unread)
            if not count:
                raise EOFError("the shared memory ends early")
            unread = unread[count:]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
