"""What is done with a module of PyTorch's once somebody imports it, as importing it takes long and few programs do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_WAITING: dict[str, list[Callable[[ModuleType], None]]] = {}


def at_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call ``function`` with the module of that name: now if it has been imported, else as soon as it has run."""
    if name in sys.modules:
        function(import_module(name))  # imported to its end
        return
    if not _WAITING:
        sys.meta_path.insert(0, _Finder())
    _WAITING.setdefault(name, []).append(function)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as all others do, and calls the functions once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        functions = _WAITING.get(fullname)
        if functions is None:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            for function in functions:
                function(module)

        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
