"""What the batch is to an operator, so that torch.vmap can add to it and DTensor can shard it.

Every tensor of an operator has the batch as its first axis, but those that are shared by all of it, as a weight is. The
gradient of a shared tensor is a sum over the batch. An operator with shared tensors computes groups of channels
independently of each other, each with its part of the shared tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops import _torch_private
from omniops.ops._at_import import at_import


class Batch(NamedTuple):
    """What of an operator is not as most: each tensor of the batch, each result wanted."""

    shared: Collection[str] = ()
    """The names of arguments that the whole batch has in common."""
    sums: Collection[int] = ()
    """The positions of results that are sums over the batch, of the shape of a shared argument."""
    wanted: Callable[..., Sequence[bool]] | None = None
    """Called with the operator's arguments; says for each of several results whether it is more than no elements."""


PLAIN = Batch()
"""Every tensor has the batch as its first axis, every result too."""


def register(operator: Any, batch: Batch, library: torch.library.Library) -> None:
    """Give an operator its rules for torch.vmap and for DTensor."""
    torch.library.register_vmap(operator.name(), _vmap_rule(operator, batch), lib=library)
    at_import("torch.distributed.tensor", lambda module: _register_sharding(module, operator, batch))


def _wanted(operator: Any, batch: Batch, args: Sequence[Any]) -> list[bool]:
    if batch.wanted is None:
        return [True] * len(_torch_private.schema_of(operator).returns)
    return [bool(want) for want in batch.wanted(*args)]


def _vmap_rule(operator: Any, batch: Batch) -> Callable[..., tuple[Any, Any]]:
    """Make one call of many: the mapped axis becomes a part of the batch.

    Where a shared tensor is mapped, or a sum over the batch is asked for, it becomes a part of the channels instead,
    each its own groups.
    """
    shared = [argument.name in batch.shared for argument in _torch_private.schema_of(operator).arguments]

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        wanted = _wanted(operator, batch, args)
        channels = any(wanted[i] for i in batch.sums) or any(
            of_all and dim is not None for of_all, dim in zip(shared, in_dims, strict=True)
        )
        folded = [
            _fold(arg, dim, info.batch_size, channels and not of_all)
            if isinstance(arg, Tensor) and (channels or not of_all)
            else arg
            for arg, dim, of_all in zip(args, in_dims, shared, strict=True)
        ]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return _unfold(results, info.batch_size, channels), 0
        unfolded = [
            _unfold(result, info.batch_size, channels and i not in batch.sums) if wanted[i] else result
            for i, result in enumerate(results)
        ]
        return tuple(unfolded), tuple(0 if want else None for want in wanted)

    return rule


def _fold(tensor: Tensor, dim: int | None, size: int, second: bool) -> Tensor:
    """With the mapped axis ``dim`` as the slow part of the first axis, or of the second; repeated where it has none."""
    repeated = tensor.repeat(size, *[1] * tensor.dim()) if dim is None else tensor.movedim(dim, 0)
    return repeated.transpose(0, 1).flatten(1, 2) if second else repeated.flatten(0, 1)


def _unfold(tensor: Tensor, size: int, second: bool) -> Tensor:
    """The mapped axis in front again."""
    unfolded: Tensor = tensor.unflatten(int(second), (size, -1))
    return unfolded.transpose(0, 1) if second else unfolded


def _register_sharding(module: ModuleType, operator: Any, batch: Batch) -> None:
    """Let DTensor shard the batch, or have it replicate everything."""
    shard, replicate, partial = module.Shard(0), module.Replicate(), module.Partial()
    names = [
        argument.name if _is_tensor(argument) else None for argument in _torch_private.schema_of(operator).arguments
    ]

    def shardings(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        given = [name if arg is not None else None for name, arg in zip(names, args, strict=True)]
        replicated = [None if name is None else replicate for name in given]
        sharded = [None if name is None else replicate if name in batch.shared else shard for name in given]
        results = [
            (partial if i in batch.sums else shard) if want else replicate
            for i, want in enumerate(_wanted(operator, batch, args))
        ]
        return [([replicate] * len(results), replicated), (results, sharded)]

    _torch_private.register_sharding(operator, shardings)


def _is_tensor(argument: Any) -> bool:
    """Of a schema: whether it is a tensor, or one or None."""
    is_optional = isinstance(argument.type, torch.OptionalType)
    return isinstance(argument.type.getElementType() if is_optional else argument.type, torch.TensorType)
