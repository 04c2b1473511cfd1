"""A call of a PyTorch operator, as the rules of mps_rules.py ask about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor


def is_on_mps(tensor: Tensor) -> bool:
    """Whether it is, or pretends to be: see mps_device.py."""
    return tensor.device.type in ("mps", "meta")


def leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What an operator is called with, lists taken apart."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


class Schema(NamedTuple):
    """An operator's arguments."""

    names: list[str]
    defaults: list[Any]
    written: list[str]
    """Those that it writes, as ``out=`` or in place."""
    has_out: bool


@cache
def _schema(func: Any) -> Schema:
    arguments = func._schema.arguments
    return Schema(
        [argument.name for argument in arguments],
        [argument.default_value if argument.has_default_value() else None for argument in arguments],
        [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write],
        any(argument.is_out for argument in arguments),
    )


class Call:
    """An operator with its arguments, by their names in its schema."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.name = str(func._opname)
        self.schema = _schema(func)
        self._args, self._kwargs = args, kwargs
        self.tensors = [leaf for leaf in leaves(args, kwargs) if isinstance(leaf, Tensor) and is_on_mps(leaf)]
        """Those on MPS."""

    def __getitem__(self, name: str) -> Any:
        """An argument, None where the operator has none of that name."""
        if name in self._kwargs or name not in self.schema.names:
            return self._kwargs.get(name)
        index = self.schema.names.index(name)
        return self._args[index] if index < len(self._args) else self.schema.defaults[index]

    @property
    def numbers(self) -> list[float]:
        return [leaf for leaf in leaves(self._args, self._kwargs) if isinstance(leaf, float)]

    @property
    def outputs(self) -> list[Tensor]:
        written = [self[name] for name in self.schema.written]
        return [leaf for leaf in leaves(written, {}) if isinstance(leaf, Tensor)]

    @property
    def factors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes (..., M, K) and (..., K, N) of a matrix product."""
        if self.name == "linear":
            return self["input"].shape, self["weight"].shape[::-1]
        first, second = _FACTORS.get(self.name, ("self", "mat2"))
        return self[first].shape, self[second].shape


_FACTORS = {
    **dict.fromkeys(("addmm", "addmm_"), ("mat1", "mat2")),
    **dict.fromkeys(("baddbmm", "baddbmm_", "addbmm"), ("batch1", "batch2")),
}
