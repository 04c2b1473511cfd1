"""torchvision: its operator ``deform_conv2d`` and that one's backward, served by our kernels through the dispatcher.

The rest stays torchvision's: the Python function, the fake kernels, and autograd, which calls the backward through the
dispatcher too and allows first-order gradients alone. ``omniops.deform_conv2d`` has gradients of any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from omniops import device as devices_here
from omniops._torch_private import destroy, dispatch_key, has_kernel
from omniops.ops._library import AUTOCAST_KEYS, under_autocast

_FORWARD, _BACKWARD = "deform_conv2d", "_deform_conv2d_backward"

_library: torch.library.Library | None = None
_named: frozenset[str] = frozenset()
"""The types of devices where our kernels replace torchvision's."""


def installed() -> bool:
    """Whether torchvision is installed."""
    return find_spec("torchvision") is not None


def enabled() -> bool:
    """Whether our kernels are registered."""
    return _library is not None


def enable(devices: tuple[str, ...] | None) -> None:
    """Register our kernels wherever torchvision has none, and on the named types of devices.

    CompositeExplicitAutograd is the dispatcher's own way to fill gaps: it serves each of the two operators on each
    device that has no kernel of its own. So Apple GPUs keep torchvision's forward and get our backward, whatever device
    comes is served, and a kernel that torchvision comes to have takes over by itself. Autocast casts as our operators'
    does where our forward serves, and stays torchvision's elsewhere, whose kernels do not have every dtype.

    Raises:
        RuntimeError: if torchvision is installed but cannot be imported.
    """
    global _library, _named
    _import()
    named = frozenset(devices or ())
    if enabled() and named == _named:
        return
    disable()
    _library, _named = torch.library.Library("torchvision", "IMPL"), named
    forward = torch.ops.torchvision.deform_conv2d.default
    autocast = [device_type for device_type in AUTOCAST_KEYS if _serves(_FORWARD, device_type)]
    with _overriding():
        for key in ("CompositeExplicitAutograd", *map(dispatch_key, named)):
            _library.impl(_FORWARD, _deform_conv2d, key)
            _library.impl(_BACKWARD, _deform_conv2d_backward, key)
        for device_type in autocast:
            _library.impl(_FORWARD, under_autocast(forward, device_type, casts=True), AUTOCAST_KEYS[device_type])


def disable() -> None:
    """Take our kernels back: what they replaced serves again."""
    global _library, _named
    if _library is not None:
        destroy(_library)
    _library, _named = None, frozenset()


def serving() -> dict[str, str]:
    """For each type of device who serves ``deform_conv2d`` there, or would if this were enabled.

    Raises:
        RuntimeError: if torchvision is installed but cannot be imported.
    """
    _import()
    types = dict.fromkeys(["cpu", "cuda", "mps", *(device.type for device in devices_here.found())])
    return {**{device_type: _server(device_type) for device_type in types}, "any other": "omniops"}


def _server(device_type: str) -> str:
    forward, backward = (
        "omniops" if _serves(operator, device_type) else "torchvision" for operator in (_FORWARD, _BACKWARD)
    )
    return forward if forward == backward else f"forward {forward}, backward {backward}"


def _import() -> None:
    """torchvision's kernels have to be registered before ours: of two the dispatcher takes the later."""
    try:
        import_module("torchvision")
    except Exception as error:
        raise RuntimeError(
            f"torchvision is installed but cannot be imported: {error}\n"
            f"Install the torchvision that belongs to PyTorch {torch.__version__}, or name the other libraries: "
            f"omniops.enable('mmcv')"
        ) from error


def _serves(operator: str, device_type: str) -> bool:
    """Whether an operator is ours on a type of device: one that was named, or one without a kernel of its own."""
    key = dispatch_key(device_type)
    return device_type in _named or not has_kernel(f"torchvision::{operator}", key)


@contextmanager
def _overriding() -> Iterator[None]:
    """Without PyTorch's warning that a kernel is overridden, which is given once a process and stays to be given."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"[\s\S]*Overriding a previously registered kernel")
            yield
    finally:
        torch.set_warn_always(always)


def _deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    result: Tensor = torch.ops.omniops.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        mask if use_mask else None,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
    )
    # torchvision's function infers these two from the shapes as ours does; who calls the operator itself may differ.
    for name, value, inferred in (
        ("groups", groups, input.shape[1] // weight.shape[1]),
        ("offset_groups", offset_groups, offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])),
    ):
        if value != inferred:
            raise ValueError(f"{name} must be {inferred}, which the shapes say, got {value}")
    # The fake kernels are torchvision's, and say that all results are so.
    return result.contiguous()


def _deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> tuple[Tensor, ...]:
    used = mask if use_mask else None
    numbers = [stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w]
    by_input, by_offset, by_weight, by_bias, by_mask = torch.ops.omniops.deform_conv2d_backward(
        grad, input, offset, weight, used, *numbers, [True, True, True, True, use_mask]
    )
    results = by_input, by_weight, by_offset, by_mask if use_mask else torch.zeros_like(mask), by_bias
    return tuple(result.contiguous() for result in results)
