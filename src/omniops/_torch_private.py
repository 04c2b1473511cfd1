"""All that omniops uses of PyTorch's private interface, each with why there is nothing public for it.

Every name here was seen in PyTorch 2.7.0 (the oldest that omniops takes), 2.11.0 and 2.15.0; what may be missing in
another says so. This file imports nothing of omniops, so that everything, ``omniops.device`` too, may import it.
``tests/test_torch_private.py`` finds uses elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.nn.modules.utils import _pair
from torch.utils import _pytree

are_functorch_transforms_active = torch._C._are_functorch_transforms_active
"""Whether grad, vmap or another transform of torch.func is around the call: they hide which tensors want gradients, and
torch.func has no question for it. The function itself, as it is called for each call of an operator."""

BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView
"""A context manager in which the dispatcher leaves out the keys for autograd, of views and changes in place too. C++
kernels have it as at::AutoDispatchBelowADInplaceOrView; Python has no public name for it."""

AFTER_AUTOGRAD = torch._C._after_autograd_keyset
"""The dispatch keys behind those for autograd, for ``OpOverload.redispatch``."""

check = torch._check
"""What torch.export takes for true of a number that depends on data. PyTorch's documentation has it under this name."""

as_pair = _pair
"""A number twice, or a pair as it is: what the modules of torch.nn make of stride, padding and dilation, and those of
other packages of DCNv2 with them. torch.nn has no public name for it."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Those of nested tuples, named tuples, lists, dicts and what else PyTorch takes apart, in their order: what
    torch.export does with arguments has no public name."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same with what the function makes of each tensor."""
    return _pytree.tree_map_only(torch.Tensor, function, value)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. Only tensors can be asked in public whether they take part, each by
    a call that takes longer."""
    level: int = forward_ad._current_level
    return level >= 0


def forward_mode(enabled: bool) -> AbstractContextManager[Any]:
    """Forward-mode differentiation on or off within a level of it, as torch.set_grad_enabled has it for the reverse
    mode. torch.autograd.forward_ad has no public name for it."""
    context: AbstractContextManager[Any] = forward_ad._set_fwd_grad_enabled(enabled)
    return context


def at_one_level(name: str, **methods: Callable[..., Any]) -> Callable[..., Any]:
    """What applies an autograd.Function of that name, with forward, setup_context and backward, in the kernel of a key
    for autograd, which each transform of torch.func calls with tensors of its own level, as it does C++ kernels.
    The public ``apply`` is for code above the dispatcher: it would start with the transforms anew."""
    function: Any = FunctionMeta(
        name, (_SingleLevelFunction,), {key: staticmethod(method) for key, method in methods.items()}
    )

    def apply(*args: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(*args)

    return apply


def without_dead_wrappers(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors, without what a transform of torch.func that has ended wrapped around them, as vjp does around those
    that its function keeps. C++ kernels get them so; what asks a tensor in Python gets the wrapper's answer."""
    unwrapped: tuple[Any, ...] = unwrap_dead_wrappers(tensors)
    return unwrapped


def schema_of(operator: Any) -> Any:
    """The arguments and results of an operator with their names and types. torch.library takes them as a string."""
    return operator._schema


def register_sharding(operator: Any, shardings: Callable[..., Any]) -> None:
    """torch.distributed.tensor.experimental.register_sharding at the first call with a DTensor: in PyTorch 2.7 that
    module takes a second to import, of the rest of DTensor one hundredth. And it leaves lists out of what DTensor tells
    calls apart by, from whose first it knows what to do in the next ones."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = DTensor._op_dispatcher.sharding_propagator

    def at_first_call(op_schema: Any) -> Any:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(operator)(shardings)
        propagator.op_to_schema_info[operator] = every_argument
        return propagator.op_strategy_funcs[operator](op_schema)

    every_argument = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
    propagator.register_op_strategy(operator, at_first_call, every_argument)


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


def opset_of(evaluator: Any) -> int:
    """The version of ONNX's operators that torch.onnx.export writes, of what evaluates a translation of it (onnxscript
    has ``evaluator.default()`` for that). A translation is told of no version."""
    return int(evaluator.opset.version)
