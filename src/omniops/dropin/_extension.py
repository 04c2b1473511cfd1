"""A library's compiled module: ours where it is missing, and beside it on the devices that it has no kernels for.

``Changes`` is what that shares with libraries that have no compiled module: changes to modules as they are imported.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import MappingProxyType, ModuleType
from typing import Any

from torch import Tensor

Change = Callable[[Any, ModuleType], None]
"""What is done to a module, given the ``Changes`` or ``Extension`` that it belongs to."""

# What a compiled module says on CUDA if it was built without, and mmcv's of any device that it has no kernel for.
_LACKING = re.compile(r"not compiled with GPU support|implementation for device \S+ not found", re.IGNORECASE)
_NOTHING: Mapping[str, Change] = MappingProxyType({})


class Changes(MetaPathFinder):
    """What ``omniops.enable`` and ``omniops.disable`` do to modules of a library, which are not imported for it.

    Args:
        package: the package that has to be installed; empty if none has to be.
        changes: what has to be done to modules once they are imported, by their full names. A name that begins with a
            dot is a module of whatever package, and "*" in it stands for anything. A change registers what undoes it,
            by ``undo`` or ``replace``.
        library: its name for ``omniops.enable``; that of the package by default.
    """

    def __init__(self, package: str, changes: Mapping[str, Change], *, library: str = "") -> None:
        self.package = package
        """The package around the modules; empty for modules of none, or of any."""
        self.library = library or package
        self._changes = changes
        self.devices: frozenset[str] = frozenset()
        """The types of devices where ours serve in place of the library's own kernels too."""
        self._undo: list[Callable[[], None]] = []

    def installed(self) -> bool:
        """Whether the package is installed, which a folder of its name is not.

        A module of no package is always served: nothing but an import of it tells that a project needs it.
        """
        return not self.package or _is_file(_located(self.package))

    def enabled(self) -> bool:
        """Whether ours serve."""
        return self in sys.meta_path

    def enable(self, devices: tuple[str, ...] | None) -> None:
        """Change the modules, whether they have been imported or not.

        The library's own kernels go on to serve where they did, but for ``devices``.
        """
        self.devices = frozenset(devices or ())
        if self.enabled():
            return
        sys.meta_path.insert(0, self)
        # A module that its user forbids is there as None.
        imported = [(name, module) for name, module in sys.modules.items() if isinstance(module, ModuleType)]
        self._change_imported(imported)

    def disable(self) -> None:
        """Leave the modules as they were."""
        if self.enabled():
            sys.meta_path.remove(self)
        while self._undo:
            self._undo.pop()()
        self.devices = frozenset()

    def serving(self) -> dict[str, str]:
        """For each type of device who serves the library there, or would if this were enabled."""
        return dict.fromkeys(("cpu", "cuda", "mps", "any other"), "omniops")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The modules that have to be changed; nothing of all others."""
        change = self._change(fullname)
        spec = _found(fullname, path, self) if change else None
        if change and spec and spec.loader:
            spec.loader = _ChangingLoader(self, change, spec.loader)
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

    def _change_imported(self, imported: Sequence[tuple[str, ModuleType]]) -> None:
        for name, module in imported:
            if change := self._change(name):
                change(self, module)

    def _change(self, fullname: str) -> Change | None:
        return next((change for name, change in self._changes.items() if _matches(fullname, name)), None)


class Extension(Changes):
    """What ``omniops.enable`` and ``omniops.disable`` do for one compiled module.

    Where the module is not found, or was built for another PyTorch, the import finds a stand-in with our functions.
    Where it is found, its functions go on to serve the devices that it was compiled for, and ours serve the rest.
    Nothing is imported to enable it.

    Args:
        name: the module's full name. One that begins with a dot is a module of whatever package, or of none, as of
            sources that projects copy.
        functions: ours by their names in the module, with its functions' arguments.
        changes: what has to be done to this and other modules once they are imported, as for ``Changes``.
        of_stand_in: what the stand-in has beyond these, and of a compiled module is left alone.
        lacking: what else the compiled module has, which the stand-in refuses when it is called; None for whatever else
            is asked for.
        homes: the full names under which the compiled module is looked for, to say who serves; ``name`` by default.
        compiled_for: the types of devices that the compiled module serves; None where it has to say so itself, function
            by function.
        library: its name for ``omniops.enable``; that of the package, or of a module of none, by default.
        remedy: where a function that is lacking comes from; the compiled module by default.
    """

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Callable[..., Any]],
        changes: Mapping[str, Change] = _NOTHING,
        *,
        of_stand_in: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        lacking: Sequence[str] | None = (),
        homes: Sequence[str] = (),
        compiled_for: Sequence[str] | None = ("cuda",),
        library: str = "",
        remedy: str = "",
    ) -> None:
        self.name = name.removeprefix(".")
        package = self.name.rpartition(".")[0]
        super().__init__(package, changes, library=library or package or self.name)
        self._remedy = remedy or f"the compiled {self.name}"
        self.functions: Mapping[str, Callable[..., Any]] = {
            **{name: self.refusal(name) for name in lacking or ()},
            **of_stand_in,
            **functions,
        }
        self.has_every_name = lacking is None
        """Whether the stand-in has all other names too, and refuses them when they are called."""
        self._ours, self._compiled_for = functions, compiled_for
        self._pattern, self._homes = name, homes or (name,)

    def disable(self) -> None:
        """Leave the module as it was, or missing. Who holds a stand-in gets an error by name from it."""
        super().disable()
        for name in [name for name, module in sys.modules.items() if self._is_stand_in(module)]:
            parent, _, attribute = name.rpartition(".")
            del sys.modules[name]
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(attribute, None)

    def serving(self) -> dict[str, str]:
        """For each type of device who serves the functions there, or would if this were enabled."""
        servers = dict.fromkeys(("cpu", "cuda", "mps", "any other"), "omniops")
        compiled_for = set(self._compiled_for or ()) - self.devices if self.is_compiled() else ()
        return {**servers, **dict.fromkeys(compiled_for, self.library)}

    def is_compiled(self) -> bool:
        """Whether there is a compiled module, which is not imported for that."""
        return any(_is_file(_located(home)) for home in self._homes)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module, and those that have to be changed; nothing of all others."""
        if _matches(fullname, self._pattern):
            theirs = _found(fullname, path, self)
            theirs = theirs if _is_file(theirs) else None
            return ModuleSpec(fullname, _ExtensionLoader(self, theirs), origin=theirs.origin if theirs else __file__)
        return super().find_spec(fullname, path, target)

    def _change_imported(self, imported: Sequence[tuple[str, ModuleType]]) -> None:
        for name, module in imported:
            if _matches(name, self._pattern):
                self._complete(module)
        super()._change_imported(imported)

    def _is_stand_in(self, module: object) -> bool:
        return isinstance(module, StandIn) and module._extension is self

    def refusal(self, name: str) -> Callable[..., Any]:
        """A function that says what would serve it."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"omniops has no {name} for {self.library}: it takes {self._remedy}, beside which "
                f"omniops.enable({self.library!r}) works as well"
            )

        return refuse

    def _complete(self, compiled: ModuleType) -> None:
        for name, ours in self._ours.items():
            if name in vars(compiled):
                self.replace(compiled, name, self._either(vars(compiled)[name], ours))

    def _either(self, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function where it serves; ours on other devices, on those asked for, and on those it lacks."""
        lacking: set[str] = set()

        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            device = next((value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if device is None:
                return theirs(*args, **kwargs)
            compiled = self._compiled_for is None or device in self._compiled_for
            if compiled and device not in lacking and device not in self.devices:
                try:
                    return theirs(*args, **kwargs)
                except RuntimeError as error:
                    if not _LACKING.search(str(error)):
                        raise
                lacking.add(device)
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
        if name in functions:
            return functions[name]
        if self._extension.has_every_name:
            return self._extension.refusal(name)
        raise AttributeError(f"{says}: it is omniops' stand-in for the compiled module and has {', '.join(functions)}")

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


class _ChangingLoader(Loader):
    """Another finder's loader, after which a module is changed; the module keeps nothing of this one."""

    def __init__(self, changes: Changes, change: Change, theirs: Loader) -> None:
        self._changes, self._change, self._theirs = changes, change, theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """What the other loader makes."""
        return self._theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and change it unless that was disabled meanwhile."""
        module.__loader__ = self._theirs
        if module.__spec__ is not None:
            module.__spec__.loader = self._theirs
        self._theirs.exec_module(module)
        if self._changes.enabled():
            self._change(self._changes, module)


def _matches(fullname: str, name: str) -> bool:
    if "*" in name:
        return fnmatchcase(fullname, name)
    return f".{fullname}".endswith(name) if name.startswith(".") else fullname == name


def _is_file(spec: ModuleSpec | None) -> bool:
    """Whether it is a module or package, and no mere folder of that name."""
    return spec is not None and spec.origin is not None


def _found(fullname: str, path: Sequence[str] | None, after: Changes | None = None) -> ModuleSpec | None:
    """What the finders after an extension find, of which others change modules too; or all that change none."""
    finders = list(sys.meta_path)
    if after in finders:
        finders = finders[finders.index(after) + 1 :]
    else:
        finders = [finder for finder in finders if not isinstance(finder, Changes)]
    return next(filter(None, (finder.find_spec(fullname, path, None) for finder in finders)), None)


def _located(fullname: str) -> ModuleSpec | None:
    """Where a module lies, found without the import of the packages around it."""
    names = fullname.removeprefix(".").split(".")
    spec = _found(names[0], None)
    for i in range(1, len(names)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(names[: i + 1]), spec.submodule_search_locations)
    return spec
