"""Old masks on disk: those of all frames of a long video do not fit into memory."""

from __future__ import annotations

import tempfile
from typing import IO

import torch
from torch import Tensor


class MaskStore:
    """Tensors of one shape in a temporary file, which is deleted with this object; all have the dtype of the first.

    The file is a row of slots of one size. The slot of a tensor that nobody refers to any more is written to again.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._dtype = torch.float32
        self._slot_bytes = 0
        self._free_slots: list[int] = []
        self._num_slots = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors in it."""
        return self._dtype

    @property
    def num_slots(self) -> int:
        """How many tensors the file has room for."""
        return self._num_slots

    def put(self, tensor: Tensor) -> StoredMask:
        """Write a tensor. Its slot becomes free when the result is deleted."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the store
            self._dtype, self._slot_bytes = tensor.dtype, tensor.nbytes
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        self._file.seek(slot * self._slot_bytes)
        self._file.write(tensor.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes())
        return StoredMask(self, slot, tensor.shape)

    def read(self, slot: int, shape: torch.Size) -> Tensor:
        """The tensor of a slot, on the CPU."""
        assert self._file is not None
        self._file.seek(slot * self._slot_bytes)
        return torch.frombuffer(bytearray(self._file.read(self._slot_bytes)), dtype=self._dtype).view(shape)

    def free(self, slot: int) -> None:
        """Let the slot be written to again."""
        self._free_slots.append(slot)


class StoredMask:
    """A tensor in a ``MaskStore``, which made this object."""

    def __init__(self, store: MaskStore, slot: int, shape: torch.Size) -> None:
        self.store = store
        self._slot, self._shape = slot, shape

    @property
    def shape(self) -> torch.Size:
        """The tensor's."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.store.dtype

    def tensor(self) -> Tensor:
        """Read it, on the CPU."""
        return self.store.read(self._slot, self._shape)

    def __del__(self) -> None:
        self.store.free(self._slot)
