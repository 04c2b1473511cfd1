"""What torch.utils.flop_counter counts for an operator. Its module takes 0.1 s to import, as it imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from omniops.ops._at_import import at_import


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Have ``formula``, which is called with the arguments of an operator, say how many operations a call is."""

    def register_formula(counter: ModuleType) -> None:
        decorate = counter.register_flop_formula(operator.overloadpacket, get_raw=True)
        decorate(lambda *args, out_val: formula(*args))

    at_import("torch.utils.flop_counter", register_formula)
