"""The same values, laid out otherwise in memory; what lies beside them is NaN."""

import torch
from torch import Tensor


def sliced(tensor: Tensor) -> Tensor:
    """One element into a larger storage and with gaps between rows."""
    *others, last = tensor.shape
    return torch.full((*others, last + 3), torch.nan, dtype=tensor.dtype)[..., 1 : last + 1].copy_(tensor)


def shifted(tensor: Tensor, elements: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Dense, so many elements into a larger storage."""
    storage = torch.full((tensor.numel() + elements + 1,), torch.nan, dtype=tensor.dtype)
    strides = torch.empty_like(tensor, memory_format=layout).stride()
    return storage.as_strided(tensor.shape, strides, elements).copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def transposed(tensor: Tensor) -> Tensor:
    """The last two axes the other way round."""
    return tensor.mT.contiguous().mT


def expanded(tensor: Tensor) -> Tensor:
    """One channel and one column for all."""
    return tensor[:, :1, :, :1].expand(tensor.shape)
