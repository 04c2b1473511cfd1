"""Make the upsampling layers of a model content-aware."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from omniops.nn.carafe import CARAFEPack, CARAFEPacks
from omniops.ops import _checks


class Changed(NamedTuple):
    """A layer that ``replace_upsampling`` replaced: its name in the model, what it was and what it is."""

    name: str
    old: str
    new: str


class Left(NamedTuple):
    """A layer, or the calls of ``F.interpolate`` in the module ``name``, that ``replace_upsampling`` left, and why."""

    name: str
    old: str
    reason: str


class UpsamplingReport(NamedTuple):
    """What ``replace_upsampling`` changed and what it left; ``str`` of it says so in a line each.

    Example:
        >>> report = replace_upsampling(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Upsample(scale_factor=2)))
        >>> [change.name for change in report.changed], report.left
        (['1'], [])
    """

    changed: list[Changed]
    left: list[Left]

    def __str__(self) -> str:
        return "\n".join(
            [
                *(f"changed {name}: {old} -> {new}" for name, old, new in self.changed),
                *(f"left {name}: {old}: {reason}" for name, old, reason in self.left),
            ]
            or ["no upsampling found"]
        )


def replace_upsampling(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    up_kernel: int = 5,
    compressed_channels: int = 64,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
) -> UpsamplingReport:
    """Replace upsampling layers by ``CARAFEPack``, in place; every output keeps its shape.

    - ``nn.Upsample`` of any mode becomes a ``CARAFEPack``. Its channels are those that it is called with on
      ``example_inputs``, else those of the layers beside it in an ``nn.Sequential``. One that is called with several
      numbers of channels, as at the levels of YOLOX's neck, becomes a ``CARAFEPack`` for each (``CARAFEPacks``); calls
      with the same number of channels share one, as nothing that a layer is given tells them apart. One that the
      model has in several places becomes a layer for each place.
    - ``nn.ConvTranspose2d`` with kernel = stride becomes a ``CARAFEPack``, behind a 1x1 convolution where its numbers
      of channels differ.
    - ``nn.Conv2d`` and ``nn.PixelShuffle`` in succession in an ``nn.Sequential`` become a convolution with as many
      channels as the result, and a ``CARAFEPack``.

    Factors must be integers, the same for both axes. The new convolutions start from the mean of the kernels that
    they replace; all else is ``CARAFEPack``'s initialisation, so the model has to be trained again. New layers
    have the device, dtype and training mode of their surroundings. Make the optimizer after this, not before.

    Other layers with several names are left, as their parameters are shared, and so are calls of ``F.interpolate``,
    which are no layers: these are seen on ``example_inputs`` alone. Hooks and parametrizations of a replaced layer are
    gone with it.

        >>> decoder = nn.Sequential(nn.Conv2d(64, 32, 3), nn.Upsample(scale_factor=2))
        >>> print(replace_upsampling(decoder))
        changed 1: Upsample(scale_factor=2.0, mode='nearest') -> CARAFEPack(channels=32, scale_factor=2)

    Args:
        model: the model, which is changed.
        example_inputs: what the model is called with, once, in evaluation mode and without gradients, to see the
            channels: a tuple of arguments, or the only argument.
        up_kernel: the side of the reassembly kernel of each ``CARAFEPack``, odd.
        compressed_channels: the channels that each predictor of masks sees, at most those of its input.
        include: the names of the layers to replace, as ``model.named_modules()`` has them, with the wildcards of
            ``fnmatch``: one or several.
        exclude: the names of layers to leave, likewise.

    Returns:
        What was changed and what was left and why: print it.

    Raises:
        TypeError, ValueError: for arguments that cannot be; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    up_kernel, compressed_channels = _checks.integer(up_kernel=up_kernel, compressed_channels=compressed_channels)
    included, excluded = _patterns(include=include, exclude=exclude)

    def pack(channels: int, scale_factor: int) -> CARAFEPack:
        return CARAFEPack(channels, scale_factor, up_kernel, compressed_channels=min(compressed_channels, channels))

    return _replace(model, example_inputs, included, excluded, pack)


def _patterns(**arguments: Any) -> list[list[str]]:
    """The names that each argument has, one or several."""
    for argument, names in arguments.items():
        if not isinstance(names, Iterable):
            raise TypeError(f"{argument} must be a name or several, got {type(names).__name__}")
    return [[names] if isinstance(names, str) else list(names) for names in arguments.values()]


def _replace(
    model: nn.Module,
    example_inputs: Any,
    included: list[str],
    excluded: list[str],
    pack: Callable[[int, int], CARAFEPack],
) -> UpsamplingReport:
    """Replace the layers, and say which; the model is as it was where that raises."""
    separated = _separate(model)
    try:
        report, replacements, interpolations = _plan(model, example_inputs, included, excluded, pack)
    except BaseException:
        for name, module in separated.items():
            model.set_submodule(name, module)
        raise
    for name, new in {**separated, **replacements}.items():
        model.set_submodule(name, new)
    report.left.extend(
        Left(name, f"{count} x F.interpolate", "no layer: write a CARAFEPack in its place, or use FPNCarafe")
        for name, count in interpolations.items()
    )
    return report


def _separate(model: nn.Module) -> dict[str, nn.Module]:
    """Put a copy in each further place of an nn.Upsample, to see each one's calls; returns what was there, by name."""
    names_of_modules: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Upsample) and name:
            parent, _, child = name.rpartition(".")
            # A parent with several names is one place.
            names_of_modules.setdefault(module, {}).setdefault((model.get_submodule(parent), child), name)
    further = {name: module for module, names in names_of_modules.items() for name in list(names.values())[1:]}
    for name, module in further.items():
        model.set_submodule(name, copy.deepcopy(module))
    return further


def _plan(
    model: nn.Module,
    example_inputs: Any,
    included: list[str],
    excluded: list[str],
    pack: Callable[[int, int], CARAFEPack],
) -> tuple[UpsamplingReport, dict[str, nn.Module], Counter[str]]:
    """The report, the new layers by name, and which modules call F.interpolate how often."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    calls, interpolations = ({}, Counter[str]()) if example_inputs is None else _trace(model, example_inputs, names)
    report = UpsamplingReport([], [])
    replacements: dict[str, nn.Module] = {}
    for module, (name, *others) in names.items():
        if not isinstance(module, _UPSAMPLING):
            continue
        try:
            if not any(fnmatchcase(name, pattern) for pattern in included):
                raise _LeftError("not included")
            if any(fnmatchcase(name, pattern) for pattern in excluded):
                raise _LeftError("excluded")
            if others and not isinstance(module, nn.Upsample):
                raise _LeftError(f"shared, also at {', '.join(others)}")
            if not name:
                raise _LeftError("it is the model itself: make a CARAFEPack instead")
            module_calls = calls.get(module, [])
            if reasons := [reason for *_, reason in module_calls if reason]:
                raise _LeftError(reasons[0])
            found = _replacement(model, name, module, {channels for channels, *_ in module_calls}, names, pack)
        except _LeftError as error:
            report.left.append(Left(name, repr(module), str(error)))
            continue
        device, dtype = _device_and_dtype(model, next(iter(found)))
        for replaced, new in found.items():
            new.to(device=module_calls[0][1] if module_calls else device, dtype=dtype).train(module.training)
            if isinstance(new, CARAFEPacks):
                for channels, call_device, _ in module_calls:
                    new[str(channels)].to(device=call_device)
            replacements[replaced] = new
        counts = Counter(channels for channels, *_ in module_calls)
        report.changed.append(
            Changed(
                name,
                " + ".join(repr(model.get_submodule(replaced)) for replaced in found),
                " + ".join(_described(new, name, counts) for new in found.values()),
            )
        )
    return report, replacements, interpolations


_UPSAMPLING = (nn.Upsample, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.PixelShuffle)
_KEEPS_CHANNELS = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Upsample,
)  # fmt: skip


class _LeftError(Exception):
    """Why a layer is left."""


def _replacement(
    model: nn.Module,
    name: str,
    module: nn.Module,
    traced_channels: set[int],
    names: dict[nn.Module, list[str]],
    pack: Callable[[int, int], CARAFEPack],
) -> dict[str, nn.Module]:
    """Names and modules to put there; the first takes what the last gave before."""
    if isinstance(module, nn.Upsample):
        _check_kind(module, nn.Upsample)
        if module.mode in ("linear", "trilinear"):
            raise _LeftError("not of two dimensions")
        if module.scale_factor is None:
            raise _LeftError("it has a size, not a scale_factor")
        factor = _factor(module.scale_factor)
        channels = traced_channels or _channels_beside(model, name)
        if not channels:
            raise _LeftError("its channels are not known: give example_inputs with which it is called")
        packs = [pack(number, factor) for number in sorted(channels)]
        return {name: packs[0] if len(packs) == 1 else CARAFEPacks(packs)}
    if isinstance(module, nn.ConvTranspose2d):
        _check_kind(module, nn.ConvTranspose2d)
        if module.kernel_size != module.stride:
            raise _LeftError(f"its kernel, {module.kernel_size}, is not its stride, {module.stride}")
        factor = _factor(module.stride)
        if (module.padding, module.output_padding) != ((0, 0), (0, 0)):
            raise _LeftError("it has a padding")
        if (module.groups, module.dilation) != (1, (1, 1)):
            raise _LeftError("it has groups or a dilation")
        upsample = pack(module.out_channels, factor)
        if module.in_channels == module.out_channels:
            return {name: upsample}
        conv = nn.Conv2d(module.in_channels, module.out_channels, 1, bias=module.bias is not None)
        _start(conv, module.weight.mean((2, 3), keepdim=True).transpose(0, 1), module.bias)
        return {name: nn.Sequential(OrderedDict(conv=conv, upsample=upsample))}
    if isinstance(module, nn.PixelShuffle):
        _check_kind(module, nn.PixelShuffle)
        factor = _factor(module.upscale_factor)
        before, conv_name = _neighbour(model, name, -1)
        if not isinstance(before, nn.Conv2d) or len(names[before]) > 1:
            raise _LeftError("there is no Conv2d right before it in an nn.Sequential, used there alone")
        _check_kind(before, nn.Conv2d)
        if before.groups != 1:
            raise _LeftError("the Conv2d before it has groups")
        if before.out_channels % factor**2:
            raise _LeftError(f"the Conv2d before it has {before.out_channels} channels, no multiple of {factor**2}")
        kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        conv = nn.Conv2d(
            before.in_channels,
            before.out_channels // factor**2,
            bias=before.bias is not None,
            **{name: getattr(before, name) for name in kept},
        )
        # Channel c * factor**2 + i of the old is pixel i of each block of channel c of the new.
        bias = None if before.bias is None else before.bias.unflatten(0, (-1, factor**2)).mean(1)
        _start(conv, before.weight.unflatten(0, (-1, factor**2)).mean(1), bias)
        return {conv_name: conv, name: pack(conv.out_channels, factor)}
    raise _LeftError("not of two dimensions")


def _check_kind(module: nn.Module, kind: type[nn.Module]) -> None:
    if isinstance(module, LazyModuleMixin):
        raise _LeftError("it or the layer before it is not initialised yet: give example_inputs")
    if type(module).forward is not kind.forward:
        raise _LeftError(f"its forward is not that of {kind.__name__}")


def _factor(scale_factor: float | tuple[float, ...]) -> int:
    factors = {*scale_factor} if isinstance(scale_factor, tuple) else {scale_factor}
    if len(factors) != 1:
        raise _LeftError(f"its factors differ, {scale_factor}")
    factor = factors.pop()
    if not float(factor).is_integer() or factor < 2:
        raise _LeftError(f"its factor must be an integer from 2 on, it is {factor}")
    return int(factor)


def _start(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    conv.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())


def _neighbour(model: nn.Module, name: str, step: int) -> tuple[nn.Module | None, str]:
    """The module ``step`` places further in the nn.Sequential that holds this one, if there is, and its name."""
    prefix, _, child = name.rpartition(".")
    parent = model.get_submodule(prefix)
    if type(parent).forward is not nn.Sequential.forward:
        return None, ""
    # named_children() leaves out what it has had already.
    children = [name for name, _ in parent.named_modules(remove_duplicate=False) if name and "." not in name]
    index = children.index(child) + step
    if not 0 <= index < len(children):
        return None, ""
    other = f"{prefix}.{children[index]}" if prefix else children[index]
    return model.get_submodule(other), other


def _channels_beside(model: nn.Module, name: str) -> set[int]:
    """Of the nearest layer before or behind in an nn.Sequential that says it, else none."""
    for step in (-1, 1):
        module, other = _neighbour(model, name, step)
        while isinstance(module, _KEEPS_CHANNELS):
            module, other = _neighbour(model, other, step)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            return {module.out_channels if step < 0 else module.in_channels} - {0}  # of lazy ones
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            return {module.num_features} - {0}
    return set()


def _device_and_dtype(model: nn.Module, name: str) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the nearest floating parameter around a module, its own first."""
    while True:
        for parameter in model.get_submodule(name).parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        if not name:
            return None, None
        name = name.rpartition(".")[0]


def _described(module: nn.Module, name: str, calls: Counter[int]) -> str:
    if isinstance(module, CARAFEPacks):
        packs = cast("dict[str, CARAFEPack]", dict(module))
        return " + ".join(f"{_described(pack, '', calls)} at {name}.{key}" for key, pack in packs.items())
    if isinstance(module, CARAFEPack):
        shared = f" for {calls[module.channels]} calls" if calls[module.channels] > 1 else ""
        return f"CARAFEPack(channels={module.channels}, scale_factor={module.scale_factor}){shared}"
    if isinstance(module, nn.Sequential):
        return " + ".join(_described(layer, name, calls) for layer in module)
    return repr(module)


_Calls = dict[nn.Module, list[tuple[int, torch.device, str]]]
"""Of each upsampling layer: channels and device of each call's input, and why it could not be a CARAFEPack's."""


def _trace(model: nn.Module, example_inputs: Any, names: dict[nn.Module, list[str]]) -> tuple[_Calls, Counter[str]]:
    """Call the model once; how its upsampling layers were called, and which modules call F.interpolate how often."""
    calls: _Calls = {}
    inside: list[nn.Module] = []
    interpolations: Counter[str] = Counter()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside.append(module)
        if isinstance(module, _UPSAMPLING):
            values = [*args, *kwargs.values()]
            x = kwargs.get("input", values[0])
            reason = ""
            if len(values) > 1:
                reason = "it is called with more than its input"
            elif x.dim() != 4:
                reason = f"it is called with shape {tuple(x.shape)}, not (N, C, H, W)"
            elif not x.is_floating_point():
                reason = f"it is called with {_checks.dtype_name(x)}"
            calls.setdefault(module, []).append((x.shape[1], x.device, reason))

    def leave(*_: Any) -> None:
        inside.pop()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is F.interpolate and inside and not isinstance(inside[-1], nn.Upsample):
                x = args[0] if args else (kwargs or {})["input"]
                if result.numel() > x.numel():
                    interpolations[names[inside[-1]][0] or "the model"] += 1
            return result

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave))
        training = {module: module.training for module in names}
        model.eval()
        try:
            with torch.no_grad(), Watch():
                model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)
        finally:
            for module, mode in training.items():
                module.training = mode
    return calls, interpolations
