"""A library's compiled module: ours where it is missing, and beside it on the devices that it has no kernels for."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import MappingProxyType, ModuleType
from typing import Any

from torch import Tensor

Change = Callable[["Extension", ModuleType], None]

# What a compiled module says on CUDA if it was built without.
_BUILT_WITHOUT_CUDA = re.compile(r"not compiled with GPU support", re.IGNORECASE)
_NOTHING: Mapping[str, Change] = MappingProxyType({})


class Extension(MetaPathFinder):
    """What ``omniops.enable`` and ``omniops.disable`` do for one compiled module, whose kernels are for CUDA alone.

    Where the module is not found, or was built for another PyTorch, the import finds a stand-in with our functions.
    Where it is found, its functions go on to serve CUDA, and ours serve the rest. Nothing is imported to enable it.

    Args:
        name: the module's full name. One that begins with a dot is a module of whatever package, or of none, as of
            sources that projects copy.
        functions: ours by their names in the module, with its functions' arguments.
        changes: what has to be done to this and other modules once they are imported, by their names, which may begin
            with a dot too. A change registers what undoes it, by ``undo`` or ``replace``.
        of_stand_in: what the stand-in has beyond these, and of a compiled module is left alone.
        lacking: what else the compiled module has, which the stand-in refuses when it is called.
        homes: the full names under which the compiled module is looked for, to say who serves; ``name`` by default.
    """

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Callable[..., Any]],
        changes: Mapping[str, Change] = _NOTHING,
        *,
        of_stand_in: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        lacking: Sequence[str] = (),
        homes: Sequence[str] = (),
    ) -> None:
        self.name = name.removeprefix(".")
        package = self.name.rpartition(".")[0]
        self.package = package
        """The package around the module; empty for a module of none, or of any."""
        self.library = package or self.name
        self.functions: Mapping[str, Callable[..., Any]] = {
            **{name: self._refusal(name) for name in lacking},
            **of_stand_in,
            **functions,
        }
        self._ours = functions
        self._pattern, self._changes, self._homes = name, changes, homes or (name,)
        self._devices: frozenset[str] = frozenset()
        self._undo: list[Callable[[], None]] = []

    def installed(self) -> bool:
        """Whether the package around the module is installed, which a folder of its name is not.

        A module of no package is always served: nothing but an import of it tells that a project needs it.
        """
        return not self.package or _is_file(_located(self.package))

    def enabled(self) -> bool:
        """Whether ours serve."""
        return self in sys.meta_path

    def enable(self, devices: tuple[str, ...] | None) -> None:
        """Serve the module, whether it or what imports it has been imported or not.

        On CUDA a compiled module goes on to serve, unless "cuda" is among ``devices``.
        """
        self._devices = frozenset(devices or ())
        if self.enabled():
            return
        sys.meta_path.insert(0, self)
        for name in [name for name in sys.modules if _matches(name, self._pattern)]:
            self._complete(sys.modules[name])
        for name, module in list(sys.modules.items()):
            if change := self._change(name):
                change(self, module)

    def disable(self) -> None:
        """Leave the module as it was, or missing. Who holds a stand-in gets an error by name from it."""
        if self.enabled():
            sys.meta_path.remove(self)
        for name in [name for name, module in sys.modules.items() if self._is_stand_in(module)]:
            parent, _, attribute = name.rpartition(".")
            del sys.modules[name]
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(attribute, None)
        while self._undo:
            self._undo.pop()()
        self._devices = frozenset()

    def serving(self) -> dict[str, str]:
        """For each type of device who serves the functions there, or would if this were enabled."""
        compiled = "cuda" not in self._devices and any(_is_file(_located(home)) for home in self._homes)
        servers = dict.fromkeys(("cpu", "cuda", "mps", "any other"), "omniops")
        return {**servers, "cuda": self.library} if compiled else servers

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module, and those that have to be changed; nothing of all others."""
        if _matches(fullname, self._pattern):
            theirs = _found(fullname, path)
            theirs = theirs if _is_file(theirs) else None
            return ModuleSpec(fullname, _ExtensionLoader(self, theirs), origin=theirs.origin if theirs else __file__)
        change = self._change(fullname)
        spec = _found(fullname, path) if change else None
        if change and spec and spec.loader:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                change(self, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def undo(self, step: Callable[[], None]) -> None:
        """Have something done when this is disabled."""
        self._undo.append(step)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute until this is disabled."""
        if name in vars(owner):
            before = vars(owner)[name]
            self._undo.append(lambda: setattr(owner, name, before))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def _change(self, fullname: str) -> Change | None:
        return next((change for name, change in self._changes.items() if _matches(fullname, name)), None)

    def _is_stand_in(self, module: object) -> bool:
        return isinstance(module, StandIn) and module._extension is self

    def _refusal(self, name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"omniops has no {name} for {self.library}: it takes the compiled {self.name}, beside which "
                f"omniops.enable({self.library!r}) works as well"
            )

        return refuse

    def _complete(self, compiled: ModuleType) -> None:
        for name, ours in self._ours.items():
            if name in vars(compiled):
                self.replace(compiled, name, self._either(vars(compiled)[name], ours))

    def _either(self, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function on CUDA, unless it was built without or ours is asked for; ours elsewhere."""
        built_with_cuda = True

        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal built_with_cuda
            tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if tensor is None:
                return theirs(*args, **kwargs)
            if tensor.device.type == "cuda" and built_with_cuda and "cuda" not in self._devices:
                try:
                    return theirs(*args, **kwargs)
                except RuntimeError as error:
                    if not _BUILT_WITHOUT_CUDA.search(str(error)):
                        raise
                built_with_cuda = False
            return ours(*args, **kwargs)

        return call


class StandIn(ModuleType):
    """What stands for a compiled module: our functions while they are enabled, and an error by name for all else."""

    def __init__(self, name: str, extension: Extension) -> None:
        super().__init__(name, f"omniops in place of the compiled module {name}.")
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        library, functions = self._extension.library, self._extension.functions
        says = f"module {self.__name__!r} has no attribute {name!r}"
        if name.startswith("__"):
            raise AttributeError(says)
        if not self._extension.enabled():
            raise AttributeError(f"{says}: omniops was told to serve it no longer; omniops.enable({library!r})")
        if name not in functions:
            raise AttributeError(
                f"{says}: it is omniops' stand-in for the compiled module and has {', '.join(functions)}"
            )
        return functions[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._extension.functions]


class _ExtensionLoader(Loader):
    def __init__(self, extension: Extension, theirs: ModuleSpec | None) -> None:
        self._extension, self._theirs = extension, theirs

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The compiled module; the stand-in where there is none, or one that was built for another PyTorch."""
        if self._theirs is not None and self._theirs.loader is not None:
            try:
                compiled = module_from_spec(self._theirs)
                self._theirs.loader.exec_module(compiled)
            except ImportError:
                pass
            else:
                return compiled
        return StandIn(spec.name, self._extension)

    def exec_module(self, module: ModuleType) -> None:
        """Complete the compiled module, which has been executed."""
        if not isinstance(module, StandIn):
            module.__spec__ = self._theirs
            self._extension._complete(module)
        if change := self._extension._change(module.__name__):
            change(self._extension, module)


def _matches(fullname: str, name: str) -> bool:
    return f".{fullname}".endswith(name) if name.startswith(".") else fullname == name


def _is_file(spec: ModuleSpec | None) -> bool:
    """Whether it is a module or package, and no mere folder of that name."""
    return spec is not None and spec.origin is not None


def _found(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """What all others find."""
    for finder in sys.meta_path:
        if not isinstance(finder, Extension) and (spec := finder.find_spec(fullname, path, None)):
            return spec
    return None


def _located(fullname: str) -> ModuleSpec | None:
    """Where a module lies, found without the import of the packages around it."""
    names = fullname.removeprefix(".").split(".")
    spec = _found(names[0], None)
    for i in range(1, len(names)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(names[: i + 1]), spec.submodule_search_locations)
    return spec
