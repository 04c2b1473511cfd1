"""What torch.utils.flop_counter counts for an operator.

Its module takes 0.1 s to import, as it imports Triton, and few programs count: formulas wait until somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[Any, Callable[..., int]] = {}


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Have ``formula``, which is called with the arguments of an operator, say how many operations a call is."""
    _FORMULAS[operator.overloadpacket] = formula
    if _COUNTER in sys.modules:
        _register_formula(import_module(_COUNTER), operator.overloadpacket)  # imported to its end


def _register_formula(counter: ModuleType, packet: Any) -> None:
    formula = _FORMULAS[packet]
    counter.register_flop_formula(packet, get_raw=True)(lambda *args, out_val: formula(*args))


class _AtImport(MetaPathFinder):
    """Finds the counter as all others do, and registers the formulas once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            for packet in _FORMULAS:
                _register_formula(module, packet)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtImport())
