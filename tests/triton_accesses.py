"""Where kernels read and write in Triton's interpreter, and whether that is within tensors."""

from types import SimpleNamespace

import numpy as np
import torch


def bytes_of(tensor):
    """The first byte of a tensor, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (last + 1) * tensor.element_size() if tensor.numel() > 0 else 0
    return tensor.data_ptr(), tensor.data_ptr() + length


def within(accesses, *tensors):
    """Whether all addresses, and as many bytes from there on as are accessed, are of a tensor."""
    ranges = [bytes_of(tensor) for tensor in tensors]
    for addresses, size in accesses:
        inside = torch.zeros(addresses.shape, dtype=torch.bool)
        for first, end in ranges:
            inside |= (addresses >= first) & (addresses <= end - size)
        if not inside.all():
            return False
    return True


def record_accesses(patch):
    """The addresses that are read, written and added to from now on, and how many bytes there."""
    from triton.runtime import interpreter

    own = interpreter._interpreter
    accesses = SimpleNamespace(read=[], written=[], added=[])

    def addresses_of(pointers, mask):
        return torch.from_numpy(pointers[mask.astype(bool)].astype("int64"))

    def load(pointers, mask, other, dtype):
        accesses.read.append((addresses_of(pointers, mask), np.dtype(dtype).itemsize))
        return own.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        accesses.written.append((addresses_of(pointers, mask), value.dtype.itemsize))
        return own.store(pointers, value, mask)

    def atomic_rmw(operation, pointers, value, mask, order):
        accesses.added.append((addresses_of(pointers, mask), value.dtype.itemsize))
        return own.atomic_rmw(operation, pointers, value, mask, order)

    names = {name: getattr(own, name) for name in dir(own) if not name.startswith("__")}
    recording = {"load": load, "store": store, "atomic_rmw": atomic_rmw}
    patch.setattr(interpreter, "_interpreter", SimpleNamespace(**names | recording))
    return accesses
