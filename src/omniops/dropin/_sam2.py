"""sam2: its compiled extension ``sam2._C``, whose one function labels the connected components that sam2 fills."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from torch import Tensor

from omniops.ops.connected_components import connected_components

_PACKAGE, _ATTRIBUTE = "sam2", "_C"
_NAME = f"{_PACKAGE}.{_ATTRIBUTE}"


class _Finder(MetaPathFinder, Loader):
    """Finds ``sam2._C``, and makes it: our function, before that of the compiled extension where there is one."""

    def __init__(self) -> None:
        self.devices: frozenset[str] = frozenset()
        """Where our function replaces that of the extension."""
        self.extension: ModuleType | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(_NAME, self, origin=__file__) if fullname == _NAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.extension is None:
            self.extension = _load_extension()
        extension = self.extension

        def get_connected_componnets(mask: Tensor) -> tuple[Tensor, Tensor]:
            """8-connected components of (N, 1, H, W), uint8 or bool: labels and counts, both int32."""
            # The extension has a kernel for CUDA alone.
            if extension is not None and mask.device.type == "cuda" and "cuda" not in self.devices:
                labels, counts = extension.get_connected_componnets(mask)
                return labels, counts
            return connected_components(mask)

        vars(module)["get_connected_componnets"] = get_connected_componnets


_finder = _Finder()


def installed() -> bool:
    """Whether sam2 is installed. A folder of that name, as a clone of its repository is, is not the package."""
    spec = find_spec(_PACKAGE)
    return spec is not None and spec.origin is not None


def enabled() -> bool:
    """Whether ``sam2._C`` is ours."""
    return _finder in sys.meta_path


def enable(devices: tuple[str, ...] | None) -> None:
    """Be what ``from sam2 import _C`` finds, whether sam2 has been imported or not.

    On CUDA a compiled extension goes on to serve, unless "cuda" is among ``devices``; it has no other kernels.
    """
    _finder.devices = frozenset(devices or ())
    if not enabled():
        _finder.extension = _replace(None)
        sys.meta_path.insert(0, _finder)


def disable() -> None:
    """Leave ``sam2._C`` to the extension, or missing where that is not compiled."""
    if enabled():
        sys.meta_path.remove(_finder)
        _replace(_finder.extension)
        _finder.extension, _finder.devices = None, frozenset()


def serving() -> dict[str, str]:
    """For each type of device who finds the connected components there, or would if this were enabled."""
    theirs = _extension_spec() is not None and "cuda" not in _finder.devices
    return {"cpu": "omniops", "cuda": "sam2" if theirs else "omniops", "mps": "omniops", "any other": "omniops"}


def _replace(module: ModuleType | None) -> ModuleType | None:
    """Make a module ``sam2._C``; without one the next import looks for it. Returns the module that was."""
    former = sys.modules.pop(_NAME, None)
    package = vars(sys.modules[_PACKAGE]) if _PACKAGE in sys.modules else {}
    package.pop(_ATTRIBUTE, None)
    if module is not None:
        sys.modules[_NAME] = package[_ATTRIBUTE] = module
    return former


def _extension_spec() -> ModuleSpec | None:
    """Where the compiled extension lies."""
    package = find_spec(_PACKAGE)
    return package and PathFinder.find_spec(_NAME, package.submodule_search_locations)


def _load_extension() -> ModuleType | None:
    """The compiled extension; None where there is none, or one that was built for another PyTorch."""
    spec = _extension_spec()
    if spec is None or spec.loader is None:
        return None
    try:
        extension = module_from_spec(spec)
        spec.loader.exec_module(extension)
    except ImportError:
        return None
    return extension
