"""mmcv: ``mmcv.ops`` on every device, with mmcv-lite and no compiler, or beside a compiled mmcv.

mmcv.ops calls the compiled module ``mmcv._ext``. mmcv-lite comes without it, so a stand-in takes its place whose
functions are those of :mod:`omniops.dropin.mmcv_ext`. Where mmcv is compiled, its own functions stay, and ours answer
for the devices that it was not compiled for.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

EXTENSION = "mmcv._ext"

# What a compiled mmcv says of a device that it has no kernel for.
_LACKING = re.compile(r"implementation for device \S+ not found|not compiled with GPU support")

_devices: tuple[str, ...] = ()
_undo: list[Callable[[], None]] = []


def installed() -> bool:
    """Whether mmcv, compiled or lite, can be imported."""
    return find_spec("mmcv") is not None


def enabled() -> bool:
    """Whether omniops serves mmcv now."""
    return bool(_undo)


def enable(devices: tuple[str, ...] | None) -> None:
    """Serve ``mmcv.ops``, whether it was imported before or not.

    Args:
        devices: the types of device, such as ``("cuda", "cpu")``, on which a compiled mmcv's own functions are
            replaced too; None for none. Without a compiled mmcv every device is served.
    """
    global _devices
    disable()
    _devices = devices or ()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    _undo.append(lambda: sys.meta_path.remove(finder))
    for name, change in _CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
    if not hasattr(pkgutil, "find_loader"):  # Python 3.14 removed what mmengine asks whether mmcv._ext is there
        pkgutil.find_loader = _find_loader  # type: ignore[assignment]
        _undo.append(lambda: delattr(pkgutil, "find_loader"))


def disable() -> None:
    """Leave ``mmcv.ops`` as it was. Modules of mmcv-lite that found the stand-in keep it, and its functions raise."""
    global _devices
    while _undo:
        _undo.pop()()
    _devices = ()


def serving() -> dict[str, str]:
    """For each type of device, who serves ``mmcv.ops`` there once enabled; empty where mmcv is not installed."""
    if not installed():
        return {}
    ours = "omniops" if find_spec("torchvision") else "omniops, without torchvision no nms and RoIAlign"
    if _compiled() is None:
        return dict.fromkeys(("cpu", "cuda", "mps", "any other"), ours)
    both = f"mmcv's compiled functions, {ours} for those that it lacks"
    return {device: ours if device in _devices else both for device in ("cpu", "cuda", "mps")}


class _StandIn(ModuleType):
    """What stands for ``mmcv._ext``: every name is there, and says at the call where it cannot be served."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        functions = importlib.import_module("omniops.dropin.mmcv_ext")
        return getattr(functions, name) if enabled() and name in functions.__all__ else _missing(name)


class _StandInLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _undo.append(lambda: _forget(module))


class _Finder(MetaPathFinder):
    """Finds the stand-in where there is no ``mmcv._ext``, and changes the modules of mmcv that have to be."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _CHANGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return ModuleSpec(fullname, _StandInLoader(), origin=__name__) if fullname == EXTENSION else None
        if spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _CHANGES[fullname](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _forget(module: ModuleType) -> None:
    if sys.modules.get(EXTENSION) is module:
        del sys.modules[EXTENSION]
        vars(sys.modules["mmcv"]).pop("_ext", None)


def _missing(name: str) -> Callable[..., Any]:
    def missing(*args: Any, **kwargs: Any) -> Any:
        if not enabled():
            raise NotImplementedError(
                f"mmcv-lite has no {name}, and omniops was told to serve mmcv no longer: omniops.enable('mmcv')"
            )
        raise NotImplementedError(
            f"omniops has no {name} for mmcv-lite: it takes the compiled mmcv (pip install mmcv, built for your "
            f"PyTorch), beside which omniops.enable('mmcv') works as well"
        )

    return missing


def _complete(compiled: ModuleType) -> None:
    """Let ours answer where the functions of a compiled ``mmcv._ext`` do not, and on the devices asked for."""
    functions = importlib.import_module("omniops.dropin.mmcv_ext")
    for name in functions.__all__:
        if hasattr(compiled, name):
            _replace(compiled, name, _either(getattr(compiled, name), getattr(functions, name)))


def _either(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the compiled mmcv; ours on the devices asked for, and on those that theirs lacks."""
    lacking: set[str] = set(_devices)

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next((value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if device in lacking:
            return ours(*args, **kwargs)
        try:
            return theirs(*args, **kwargs)
        except RuntimeError as error:
            if device is None or not _LACKING.search(str(error)):
                raise
        lacking.add(device)
        return ours(*args, **kwargs)

    return call


def _free_carafe_naive(module: ModuleType) -> None:
    """Take from carafe_naive's backward the assertion that it runs on CUDA; otherwise it is mmcv's."""
    function = module.CARAFENaiveFunction

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, masks = ctx.saved_tensors
        grads = torch.zeros_like(features), torch.zeros_like(masks)
        sizes = (ctx.kernel_size, ctx.group_size, ctx.scale_factor)
        module.ext_module.carafe_naive_backward(grad_output.contiguous(), features, masks, *grads, *sizes)
        return *grads, None, None, None

    _replace(function, "backward", staticmethod(backward))


def _complete_masked_conv(module: ModuleType) -> None:
    """Let masked_conv2d work without a bias, and refuse by name what it cannot take or would leave out."""
    theirs, modules_forward = module.MaskedConv2dFunction.forward, module.MaskedConv2d.forward

    def forward(
        ctx: Any, features: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None, *numbers: Any
    ) -> Tensor:
        shape = (1, *features.shape[2:])
        if features.dim() != 4 or len(features) != 1 or mask.shape != shape:
            raise ValueError(
                f"features and mask must have shapes (1, C, H, W) and (1, H, W), got {tuple(features.shape)} and "
                f"{tuple(mask.shape)}"
            )
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        result: Tensor = theirs(ctx, features, mask, weight, bias, *numbers)
        return result

    def forward_of_module(self: Any, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            for name, needed in (("stride", (1, 1)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
                if getattr(self, name) != needed:
                    raise ValueError(f"{name} must be {needed} for a masked convolution, got {getattr(self, name)}")
            if isinstance(self.padding, str):
                raise ValueError(f"padding must be numbers for a masked convolution, got {self.padding!r}")
        result: Tensor = modules_forward(self, input, mask)
        return result

    _replace(module.MaskedConv2dFunction, "forward", staticmethod(forward))
    _replace(module.MaskedConv2d, "forward", forward_of_module)


def _let_sync_bn_be_alone(module: ModuleType) -> None:
    """Let SyncBatchNorm be made where there is no process group: it is the one process then."""
    theirs = module.dist

    def get_world_size(group: Any = None) -> int:
        return theirs.get_world_size(group) if theirs.is_available() and theirs.is_initialized() else 1

    distributed = ModuleType(theirs.__name__, theirs.__doc__)
    vars(distributed).update(__getattr__=lambda name: getattr(theirs, name), get_world_size=get_world_size)
    _replace(module, "dist", distributed)


def _change_extension(module: ModuleType) -> None:
    if not isinstance(module, _StandIn):
        _complete(module)


def _replace(owner: Any, name: str, value: Any) -> None:
    before = vars(owner)[name]
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))


def _compiled() -> ModuleSpec | None:
    """The compiled extension, if mmcv has one; mmcv is not imported for that."""
    package = find_spec("mmcv")
    return PathFinder.find_spec(EXTENSION, package.submodule_search_locations) if package else None


def _find_loader(name: str) -> Any:
    """``pkgutil.find_loader`` as it was until Python 3.13."""
    spec = find_spec(name)
    return spec and spec.loader


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    EXTENSION: _change_extension,
    "mmcv.ops.carafe": _free_carafe_naive,
    "mmcv.ops.masked_conv": _complete_masked_conv,
    "mmcv.ops.sync_bn": _let_sync_bn_be_alone,
}
"""What is changed in which module, once it is imported."""
