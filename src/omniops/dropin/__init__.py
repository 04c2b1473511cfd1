"""Existing code on our kernels with one line: what ``omniops.enable`` and ``omniops.disable`` do.

There is one file a library, or for libraries that compile the same functions. Each library, a module, ``Changes`` or
an ``Extension``, has ``installed``, ``enable``, ``disable``, ``enabled`` and ``serving``, and is imported when that is
first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import RLock
from types import ModuleType

import torch

from omniops.dropin import (
    _dcn_v2,
    _deform_conv,
    _detectron2,
    _mmcv,
    _multi_scale_deform_attn,
    _sam2,
    _torchvision,
    _transformers,
)
from omniops.dropin._extension import Changes

EXTENSIONS = (
    _mmcv.mmcv,
    _sam2.sam2,
    _sam2.sam2_train,
    _sam2.efficient_track_anything,
    _multi_scale_deform_attn.MultiScaleDeformableAttention,
    _multi_scale_deform_attn.groundingdino,
    _multi_scale_deform_attn.detrex,
    _detectron2.detectron2,
    _deform_conv.deform_conv_ext,
    _deform_conv.deform_conv_cuda,
    _dcn_v2.DCNv2,
)
LIBRARIES: dict[str, ModuleType | Changes] = {
    "torchvision": _torchvision,
    "transformers": _transformers.transformers,
    **{extension.library: extension for extension in EXTENSIONS},
}
"""What can be enabled. torchvision is first, as the others use it."""
_BY_NAME_ALONE = "DCNv2"  # its module is called _ext, as those of others may be

_LOCK = RLock()


def enable(*libraries: str, devices: Sequence[str] | None = None) -> None:
    """Let code written for torchvision, transformers, mmcv, sam2 and others run on our kernels, unchanged.

    ``torchvision``: ``torchvision.ops.deform_conv2d`` and what uses it. ``transformers``: the multi-scale deformable
    attention of its models, Deformable DETR, RT-DETR, D-FINE, Grounding DINO, Mask2Former and all others that have it,
    and the connected components and the suppression of masks that SAM 3 skips on a video without a kernel for CUDA.
    Hugging Face's kernels for CUDA stay where they are loaded.
    ``mmcv``: ``mmcv.ops`` without mmcv's compiled extension. ``sam2``, ``sam2_train`` (MedSAM-2) and
    ``efficient_track_anything``: the connected components with which they fill holes, without their compiled extension.
    ``MultiScaleDeformableAttention``, the module that Deformable DETR, DINO, Mask2Former and others compile, and
    ``groundingdino`` and ``detrex``, which have the same functions. ``detectron2``: its deformable convolutions and
    rotated boxes, and all of it that needs no compiled function.
    ``deform_conv_ext``, the module that BasicSR and its copies compile, ``deform_conv_cuda``, its older name in EDVR,
    and ``DCNv2``, the module ``_ext`` of CenterNet, CenterTrack and FairMOT: their deformable convolutions run on every
    device then.

    It may be called before or after the library is imported, and again, when the last call's ``devices`` count.

    Args:
        libraries: names of the above; without names, those that are installed, but for ``DCNv2``.
            ``MultiScaleDeformableAttention``, ``deform_conv_ext``, ``deform_conv_cuda`` and ``DCNv2`` belong to no
            package and count as installed: they are served if something imports them.
        devices: types of devices, "cpu", "cuda", "mps" or another of PyTorch's, where our kernels replace the
            library's own, which are kept everywhere else. None, or a device not named: ours serve what the library
            lacks there.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a name that is none of these, or no type of device.
        ModuleNotFoundError: for a named library that is not installed.
        RuntimeError: if torchvision is installed but cannot be imported.

    Example:
        >>> omniops.enable()  # all that is installed
        >>> omniops.enable("torchvision", devices=("cuda", "cpu"))  # and there in place of torchvision's own kernels
        >>> omniops.disable()
    """
    _check_names(libraries)
    types = None if devices is None else _device_types(devices)
    for name in libraries:
        if not LIBRARIES[name].installed():
            raise ModuleNotFoundError(
                f"libraries must be installed to be enabled, got {name!r}, which is not: install it, or call "
                f"omniops.enable() for those that are",
                name=name,
            )
    with _LOCK:
        for name, library in LIBRARIES.items():
            if name in libraries or (not libraries and name != _BY_NAME_ALONE and library.installed()):
                library.enable(types)


def disable(*libraries: str) -> None:
    """Undo ``enable``: the libraries' own kernels serve again, and what they lack is lacking again.

    Args:
        libraries: names that ``enable`` takes; without names, all. One that is not enabled is left as it is.

    Raises:
        TypeError: for a name that is no str.
        ValueError: for a name that is none of these.

    Example:
        >>> omniops.enable("torchvision")
        >>> omniops.disable("torchvision")
    """
    _check_names(libraries)
    with _LOCK:
        for name in libraries or LIBRARIES:
            LIBRARIES[name].disable()


def _check_names(libraries: Iterable[str]) -> None:
    names = ", ".join(map(repr, LIBRARIES))
    for name in libraries:
        if not isinstance(name, str):
            raise TypeError(f"libraries must be names among {names}, each an argument of its own, got {name!r}")
        if name not in LIBRARIES:
            raise ValueError(f"libraries must be among {names}, got {name!r}")


def _device_types(devices: Sequence[str]) -> tuple[str, ...]:
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(f"devices must be a sequence of types of devices, as ('cuda', 'cpu'), got {devices!r}")
    for device_type in devices:
        if not isinstance(device_type, str):
            raise TypeError(f"devices must hold names of types of devices, as 'cuda', got {device_type!r}")
        try:
            known = torch.device(device_type).type
        except RuntimeError:
            known = None
        if known != device_type:
            instead = f", got {device_type!r}"
            if known is not None:
                instead += f": write {known!r}, which means every device of that type"
            raise ValueError(f"devices must hold types of devices such as 'cpu', 'cuda' and 'mps'{instead}")
    return tuple(devices)
