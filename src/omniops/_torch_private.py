"""All that omniops uses of PyTorch's private interface, each with why there is nothing public for it.

Every name here was seen in PyTorch 2.7.0 (the oldest that omniops takes), 2.11.0 and 2.15.0; what may be missing in
another says so. This file imports nothing of omniops, so that everything, ``omniops.device`` too, may import it.
``tests/test_torch_private.py`` finds uses elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules.utils import _pair

are_functorch_transforms_active = torch._C._are_functorch_transforms_active
"""Whether grad, vmap or another transform of torch.func is around the call: they hide which tensors want gradients, and
torch.func has no question for it. The function itself, as it is called for each call of an operator."""

BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView
"""A context manager in which the dispatcher leaves out the keys for autograd, of views and changes in place too. C++
kernels have it as at::AutoDispatchBelowADInplaceOrView; Python has no public name for it."""

AFTER_AUTOGRAD = torch._C._after_autograd_keyset
"""The dispatch keys behind those for autograd, for ``OpOverload.redispatch``."""

as_pair = _pair
"""A number twice, or a pair as it is: what the modules of torch.nn make of stride, padding and dilation, and those of
other packages of DCNv2 with them. torch.nn has no public name for it."""


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. An operator without a derivative for it is taken for a constant
    there, and nothing public tells the operator."""
    return bool(forward_ad._current_level >= 0)


def operator_names() -> list[str]:
    """The operators of every library with their namespaces, as "omniops::carafe". torch.library makes operators, and
    has no list of them."""
    return list(torch._C._dispatch_get_all_op_names())


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key. torch.library registers kernels, and has no
    question for them."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def dispatch_key(device_type: str) -> str:
    """The dispatch key of a type of device: of "cuda" that is "CUDA". torch.library takes either where it registers."""
    return str(torch._C._dispatch_key_for_device(device_type))


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows with each change in place that PyTorch knows of. RuntimeError for tensors of inference mode,
    which have none. Autograd's errors speak of it, and nothing public gives it."""
    return int(tensor._version)


def destroy(library: torch.library.Library) -> None:
    """Take a library's kernels out of the dispatcher. Without it they stay until the object is collected."""
    library._destroy()


def is_in_bad_fork(module: Any) -> bool:
    """Whether the accelerator of torch.cuda, torch.xpu ... is lost, as this process was forked from one that used it.

    Anything public raises there instead. False for a device of another package that does not say.
    """
    return bool(getattr(module, "_is_in_bad_fork", bool)())


def x86_has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16, AVX512-BF16 or AMX, that PyTorch uses; False where a later
    PyTorch does not say."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def mkldnn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16, on x86 also where it emulates that."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cudnn_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention, and (B, heads, Q) the logarithm of the sum of the exponentials of each query's scores, which
    tells how much the attention to some of the keys counts beside that to others. Public functions do not give it."""
    attended, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    return attended, logsumexp.reshape(attended.shape[:3])


def compile_ahead_of_time(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write AOTInductor's package of a program, a .pt2 file: PyTorch's documentation has it, under this name alone."""
    import torch._inductor  # which is loaded when it is first used

    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_ahead_of_time(path: Path) -> Callable[..., Any]:
    """AOTInductor's package as a function of what the module took, which has no other name either."""
    import torch._inductor

    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return loaded


def is_missing_compiler(error: BaseException) -> bool:
    """Whether TorchInductor found no C++ compiler, for which it has errors of its own."""
    from torch._inductor.exc import InvalidCxxCompiler

    return isinstance(error, InvalidCxxCompiler)
