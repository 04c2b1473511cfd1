"""Tensors in a safetensors file: written piece by piece and whole or not at all, read row by row and not trusted."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omniops.sam2.mask_store import StoredMask

Parts = Sequence[Tensor | StoredMask]
"""What makes a tensor one after the other, in its first dimension."""
_NAMES = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
"""How safetensors calls the dtypes."""
_MAX_HEADER_BYTES = 100_000_000
"""With more in it safetensors refuses a file."""


def write(path: Path, tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts; what was at the path is replaced once they are on the disk.

    safetensors' own function wants all tensors in memory, where old masks of a long video do not fit.

    Args:
        path: of the file.
        tensors: by name, one part or more each.
        metadata: texts by name.

    Raises:
        FileNotFoundError: where the folder is not there.
        IsADirectoryError: where the path is a folder.
        OSError: where the file cannot be written.
        ValueError: for more names and texts than a file can have.
    """
    if path.is_dir():
        raise IsADirectoryError(f"path must be of a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} in which {path.name} could be")
    # The widest dtypes first, so that every tensor begins at a multiple of its own.
    names = sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)
    header = _header({name: tensors[name] for name in names}, metadata)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                _write_parts(file, tensors[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, parts in tensors.items():
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        begin, end = end, end + parts[0].dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": _NAMES[parts[0].dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER_BYTES:
        raise ValueError(f"names and texts of a safetensors file take {_MAX_HEADER_BYTES} bytes, got {len(header)}")
    return header


def _write_parts(file: BinaryIO, parts: Parts) -> None:
    for part in parts:
        tensor = part.tensor() if isinstance(part, StoredMask) else part
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)


class TensorFile:
    """A safetensors file, of which tensors are read when they are asked for.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: where there is none.
        ImportError: without safetensors.
        ValueError: for another file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors ({error}): pip install 'omniops[sam2]'") from error
        if not path.is_file():
            raise FileNotFoundError(f"there is no file at {path}")
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")
            self.metadata: dict[str, str] = opened.metadata() or {}
            self._unread = set(opened.keys())
        except Exception as error:  # of several types, whatever the bytes of a file that is none happen to mean
            raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from None
        self._file = opened

    def close(self) -> None:
        """Let go of the file."""
        self._file.__exit__(None, None, None)

    def rows(self, name: str, shape: tuple[int | None, ...], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> Rows:
        """A tensor, which has yet to be read.

        Args:
            name: of the tensor.
            shape: which it must have; None for any size.
            dtypes: of which it must have one.

        Raises:
            ValueError: where it is not there, or has another shape or dtype.
        """
        expected = f"{' or '.join(_NAMES[dtype] for dtype in dtypes)} {shape}".replace("None", "any")
        if name not in self._unread:
            raise ValueError(f"the tensor {name} is missing, expected {expected}")
        self._unread.remove(name)
        tensor = self._file.get_slice(name)
        found = tuple(tensor.get_shape())
        is_of_shape = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
        if not is_of_shape or tensor.get_dtype() not in [_NAMES[dtype] for dtype in dtypes]:
            raise ValueError(f"the tensor {name} must be {expected}, got {tensor.get_dtype()} {found}")
        return Rows(tensor, found[0])

    def require_all_read(self) -> None:
        """Raise ValueError for tensors that nobody asked for."""
        if self._unread:
            raise ValueError(f"the tensors {', '.join(sorted(self._unread)[:4])} belong to nothing")


class Rows:
    """A tensor of a file: iteration reads it row by row, each (1, ...)."""

    def __init__(self, tensor: Any, count: int) -> None:
        self._tensor, self._count = tensor, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self._read(slice(i, i + 1)) for i in range(self._count))

    def read(self) -> Tensor:
        """All rows."""
        return self._read(slice(None))

    def _read(self, rows: slice) -> Tensor:
        tensor: Tensor = self._tensor[rows]
        return tensor.clone()  # aligned as any other: products may round by where their numbers lie
