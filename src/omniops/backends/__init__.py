"""The kernels, one folder a device, one file an operator: a file of the same name holds its kernels in each folder.

A folder says in its ``__init__`` which dispatch key it serves (DISPATCH_KEY), in which dtypes (DTYPES), what it is
(TITLE), whether it can serve on this machine (AVAILABLE) and, where it cannot, what would change that (REMEDY). Its
kernels get checked arguments that are not empty, return new tensors with the strides that ``empty`` gives, and are
imported when first called. A kernel is a function, or one in two steps (``prepared``).
"""

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

from omniops.backends import cpu, cuda, mps, reference

BACKENDS = (reference, cpu, cuda, mps)


class prepared:  # noqa: N801  # a decorator
    """A kernel in two steps, for calls that cost little besides the first of their kind.

    What is decorated gets the operator's arguments, looks only at what is equal for all calls of a kind (the shapes,
    strides, dtypes, devices and alignment to 16 bytes of tensors, and the numbers), and returns the function that runs
    on the arguments of any of them. That one is kept: it may hold no tensor, and asks for the state of PyTorch (the
    current stream, TF32, deterministic algorithms, the number of threads) each time.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]]) -> None:
        self.prepare = prepare
        update_wrapper(self, prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run at once, keeping nothing."""
        return self.prepare(*args, **kwargs)(*args, **kwargs)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A result of the given shape, with the dtype, device and memory format of ``like``; its contents are undefined."""
    layout = memory_format(like) if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def strides(shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    """Those of a new tensor of this shape and memory format."""
    return torch.empty(tuple(shape), device="meta", memory_format=layout).stride()


def finish(result: Tensor, like: Tensor) -> Tensor:
    """The result in the dtype and memory format of ``like``; itself where it has them."""
    return result.to(like.dtype).contiguous(memory_format=memory_format(like))


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over ``tensor`` are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def accumulated(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums over it are kept in; itself where it has it."""
    return tensor.to(accumulator(tensor))


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_signed(integers: Tensor) -> Tensor:
    """The bits of an integer or bool tensor as signed integers, which every device can compute with.

    PyTorch has no uint16, uint32 and uint64 in many operators: ``torch.where`` is one that lacks them on CUDA.
    """
    return integers.view(_SIGNED[integers.element_size()])


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is stored so and not otherwise, else contiguous."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
