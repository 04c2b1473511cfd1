"""mmcv: ``mmcv.ops`` on every device, with mmcv-lite and no compiler, or beside a compiled mmcv.

mmcv.ops calls the compiled module ``mmcv._ext``. mmcv-lite comes without it, so a stand-in takes its place whose
functions are those of :mod:`omniops.dropin.mmcv_ext`. Where mmcv is compiled, its own functions stay, and ours answer
for the devices that it was not compiled for.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omniops.dropin import mmcv_ext
from omniops.dropin._extension import Extension, StandIn
from omniops.dropin.mmcv_ext.multi_scale_deform_attn import attend


class _Mmcv(Extension):
    def serving(self) -> dict[str, str]:
        """For each type of device who serves the functions there, or would if this were enabled."""
        ours = "omniops" if find_spec("torchvision") else "omniops, without torchvision no nms and RoIAlign"
        if not self.is_compiled():
            return dict.fromkeys(("cpu", "cuda", "mps", "any other"), ours)
        compiled = f"mmcv's compiled functions, {ours} for those that it lacks"
        return {device: ours if device in self.devices else compiled for device in ("cpu", "cuda", "mps")}


def _free_carafe_naive(extension: Extension, module: ModuleType) -> None:
    """Take from carafe_naive's backward the assertion that it runs on CUDA; otherwise it is mmcv's."""
    function = module.CARAFENaiveFunction

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, masks = ctx.saved_tensors
        grads = torch.zeros_like(features), torch.zeros_like(masks)
        sizes = (ctx.kernel_size, ctx.group_size, ctx.scale_factor)
        module.ext_module.carafe_naive_backward(grad_output.contiguous(), features, masks, *grads, *sizes)
        return *grads, None, None, None

    extension.replace(function, "backward", staticmethod(backward))


def _complete_masked_conv(extension: Extension, module: ModuleType) -> None:
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

    extension.replace(module.MaskedConv2dFunction, "forward", staticmethod(forward))
    extension.replace(module.MaskedConv2d, "forward", forward_of_module)


def _let_sync_bn_be_alone(extension: Extension, module: ModuleType) -> None:
    """Let SyncBatchNorm be made where there is no process group: it is the one process then."""
    theirs = module.dist

    def get_world_size(group: Any = None) -> int:
        return theirs.get_world_size(group) if theirs.is_available() and theirs.is_initialized() else 1

    distributed = ModuleType(theirs.__name__, theirs.__doc__)
    vars(distributed).update(__getattr__=lambda name: getattr(theirs, name), get_world_size=get_world_size)
    extension.replace(module, "dist", distributed)


def _attend_by_the_operator(extension: Extension, module: ModuleType) -> None:
    """Let multi-scale attention be our operator where mmcv composes it of grid_sample, and where its kernels are ours.

    mmcv's autograd function makes positions of half precision, and its derivative has none.
    """
    name = "multi_scale_deformable_attn_pytorch"
    composed, function = vars(module)[name], module.MultiScaleDeformableAttnFunction

    @functools.wraps(composed)
    def attend_anywhere(
        value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        # Who imported it by name has it after disable too.
        by_operator = attend if extension.enabled() else composed
        result: Tensor = by_operator(value, value_spatial_shapes, sampling_locations, attention_weights)
        return result

    def apply(cls: Any, *args: Any) -> Any:  # torch.compile fails on named arguments, in torch 2.15
        if cls is function and len(args) == 6:
            value, shapes, _, locations, weights, _ = args
            if isinstance(module.ext_module, StandIn) or value.device.type in extension.devices:
                return attend(value, shapes, locations, weights)
        return super(function, cls).apply(*args)

    extension.replace(function, "apply", classmethod(apply))
    for user in [candidate for candidate in sys.modules.values() if isinstance(candidate, ModuleType)]:
        if vars(user).get(name) is composed:
            extension.replace(user, name, attend_anywhere)


def _give_find_loader(extension: Extension, module: ModuleType) -> None:
    """Give pkgutil back what Python 3.14 removed, with which mmengine asks whether ``mmcv._ext`` is there."""
    if not hasattr(module, "find_loader"):
        extension.replace(module, "find_loader", _find_loader)


def _find_loader(name: str) -> Any:
    """``pkgutil.find_loader`` as it was until Python 3.13."""
    spec = find_spec(name)
    return spec and spec.loader


mmcv = _Mmcv(
    "mmcv._ext",
    {name: getattr(mmcv_ext, name) for name in mmcv_ext.__all__},
    {
        "mmcv.ops.carafe": _free_carafe_naive,
        "mmcv.ops.masked_conv": _complete_masked_conv,
        "mmcv.ops.multi_scale_deform_attn": _attend_by_the_operator,
        "mmcv.ops.sync_bn": _let_sync_bn_be_alone,
        pkgutil.__name__: _give_find_loader,
    },
    lacking=None,
    compiled_for=None,
    remedy="the compiled mmcv (pip install mmcv, built for your PyTorch)",
)
