"""Every operator that a model calls on a device, checked where it is called.

While a model runs, each call of a PyTorch operator is followed by the same call on the CPU in float64, with the inputs
that the device was given, in values and strides. So errors do not accumulate: what is wrong is the operator itself, and
the first of them is named with the module that it is part of and the line that called it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from omniops.formatting import dtype_name

STAGE_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest error of one operator, relative to the largest value of the right result, by the lowest precision among
its inputs and results. Results of integers are exact. The largest errors seen on CPUs and an H200 were 1.3e-5, 9.7e-4
and 7.5e-3; what is broken is wrong by a tenth and more."""

_MAX_TIMES_CPU_ERROR = 16
"""An operator may be so many times less exact than the CPU in the same dtype, where that is more than the tolerance:
where a result is the small difference of large numbers."""

# What returns nothing that could be compared: numbers of Python, memory that nobody wrote, random numbers.
_NOT_COMPARED = {
    "bernoulli", "data_ptr", "device", "empty", "empty_like", "empty_strided", "item", "new_empty", "numpy",
    "pin_memory", "rand", "randint", "randn", "requires_grad_", "resize_", "set_", "storage", "tolist",
    "untyped_storage",
}  # fmt: skip
_OPERATORS = ("torch.", "torchvision.ops.", "omniops.ops.", "contextlib.", f"{__name__}.")
# Where float64 may decide otherwise than the dtype of the device: these are compared with the CPU in that dtype.
_IN_OWN_DTYPE = {"nms", "roi_align"}
_DUNDER_IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}
# Equal values may be in another order: indices are judged by the values that they select.
_INDICES = {"argmax", "argmin", "argsort"}
_COMPARISONS = {"gt", "ge", "lt", "le", "eq", "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__"}
_VALUES_AND_INDICES = {"max", "min", "sort", "topk", "median", "kthvalue", "mode", "cummax", "cummin"}


@dataclass
class Stage:
    """One operator at one line of a module, and its worst error over all calls."""

    module: str
    """By its name in the model; empty between modules."""
    operator: str
    place: str
    """The Python module, line and function that called it."""
    dtype: str = ""
    """The lowest precision among inputs and results."""
    calls: int = 0
    error: float = 0.0
    tolerance: float = 0.0
    right: bool = True
    inputs: str = ""
    """Of the worst call."""

    @property
    def name(self) -> str:
        """As a report calls it."""
        return f"{self.module + ', ' if self.module else ''}{self.operator} at {self.place}"

    @property
    def excess(self) -> float:
        """By how much it is over its tolerance."""
        return _excess(self.error, self.tolerance)

    def add(self, error: float, tolerance: float, right: bool, dtype: str, inputs: Callable[[], str]) -> None:
        """Keep the worst call."""
        if not self.calls or (not right, _excess(error, tolerance)) > (not self.right, self.excess):
            self.error, self.tolerance, self.right, self.dtype, self.inputs = error, tolerance, right, dtype, inputs()
        self.calls += 1


def _excess(error: float, tolerance: float) -> float:
    return error / tolerance if tolerance else float("inf") if error else 0.0


@dataclass
class OperatorsReport:
    """What became of a model's operators."""

    stages: dict[tuple[str, str, str], Stage] = field(default_factory=dict)
    """In the order of their first calls."""
    first_wrong: Stage | None = None
    raising: Stage | None = None
    """The operator whose exception ended the run."""
    unchecked: Counter[str] = field(default_factory=Counter)
    """Operators whose right result is not known, and why."""

    @property
    def worst(self) -> Stage | None:
        """The stage that is most above its tolerance, or closest to it."""
        return max(self.stages.values(), key=lambda stage: (not stage.right, stage.excess), default=None)


@contextmanager
def check_operators(model: nn.Module) -> Iterator[OperatorsReport]:
    """Check the operators that are called inside, by a model or around it."""
    modules = _RunningModules(model)
    mode = _CheckingMode(modules)
    hooks = (
        register_module_forward_pre_hook(modules.enter),
        # Also where a module raises, which another may catch.
        register_module_forward_hook(modules.leave, always_call=True),
    )
    try:
        with mode:
            yield mode.report
        mode.ended(None)
    except Exception as error:
        mode.ended(error)
        raise
    finally:
        for hook in hooks:
            hook.remove()


class _RunningModules:
    """Which module is running, by its name in the model."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        lists = (nn.ModuleList, nn.ModuleDict)
        self._lists = {name for name, module in model.named_modules() if isinstance(module, lists)}
        self._running: list[str] = []
        self._last = ""

    def enter(self, module: nn.Module, _args: Any) -> None:
        self._running.append(self._names.get(id(module), ""))

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._last = self._running.pop()

    @property
    def now(self) -> str:
        """The innermost that runs; between two of them the one that the last of them is part of."""
        name = next((name for name in reversed(self._running) if name), "")
        if self._last.startswith(name):
            # Of a module that is used by its parts, and never called itself.
            parent = self._last.rpartition(".")[0]
            while parent in self._lists:
                parent = parent.rpartition(".")[0]
            return max(name, parent, key=len)
        return name


class _CheckingMode(TorchFunctionMode):
    """Follows every call by that of the oracle."""

    def __init__(self, modules: _RunningModules) -> None:
        super().__init__()
        self.report = OperatorsReport()
        self._modules = modules
        self._weights: dict[tuple[int, torch.dtype | None], tuple[Tensor, Tensor]] = {}
        self._raised: Exception | None = None
        """By the stage ``report.raising``."""
        self._read_error: Exception | None = None
        """What a device raised last where a tensor was read back from it."""

    def ended(self, error: Exception | None) -> None:
        """Forget the stage that raised, unless its exception is the one that ended the run."""
        if error is not self._raised:
            self.report.raising = None
        self._raised = self._read_error = None  # they hold the tensors of the frames that they passed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _NOT_COMPARED or name == "__get__" or (name == "view" and _has_dtype((args[1:], kwargs))):
            return func(*args, **kwargs)
        try:
            return self._call(name, func, args, kwargs)
        except Exception as error:
            self._raised, self.report.raising = error, self._stage(name)
            raise

    def _call(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call, which is compared."""
        changed, before = _written_tensor(name, args, kwargs), None
        if changed is not None:
            with self._comparing(name):
                before = self._oracles((args, kwargs), name)
        result = func(*args, **kwargs)
        if changed is not None and before is None:
            return result
        with self._comparing(name), torch.inference_mode():
            tensors = _tensors(result)
            results = [*tensors, *([] if changed is None else [changed])]
            if results and (changed is not None or not _are_views(tensors, _tensors((args, kwargs)))):
                exact_args, exact_kwargs = before or self._oracles((args, kwargs), name)
                self._compare(name, func, args, kwargs, exact_args, exact_kwargs, results)
        return result

    @contextmanager
    def _comparing(self, name: str) -> Iterator[None]:
        """What comparing raises is counted, and not the model's; what a device raises where it is read is."""
        try:
            yield
        except Exception as error:
            if error is self._read_error:
                raise
            self.report.unchecked[f"{name}: comparing it raised {type_and_first_line(error)}"] += 1

    def _oracles(self, values: Any, name: str) -> Any:
        return self._on_cpu(values, None if name in _IN_OWN_DTYPE else torch.float64)

    def _on_cpu(self, value: Any, dtype: torch.dtype | None) -> Any:
        """Arguments as the oracle gets them: copies on the CPU with their strides, floating ones in ``dtype`` if there
        is one."""
        if isinstance(value, nn.Parameter):
            if (id(value), dtype) not in self._weights:
                self._weights[id(value), dtype] = value, self._copy(value, dtype)
            return self._weights[id(value), dtype][1]
        if isinstance(value, Tensor):
            return self._copy(value, dtype)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.dtype):
            return dtype if dtype is not None and value.is_floating_point else value
        if isinstance(value, str) and value.partition(":")[0] in ("cuda", "mps", "xpu"):
            return "cpu"
        if isinstance(value, Mapping):
            return {name: self._on_cpu(item, dtype) for name, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            make = getattr(value, "_make", type(value))  # a named tuple's class takes its fields one by one
            return make([self._on_cpu(item, dtype) for item in value])
        return value

    def _copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, with the same strides: its whole storage is copied, because to copy a view is an
        operator of the device, which may be wrong too, and what it leaves behind may change later ones."""
        storage = tensor.untyped_storage()
        try:
            memory = storage.cpu()
        except Exception as error:
            self._read_error = error
            raise
        flat = torch.empty(0, dtype=tensor.dtype).set_(memory)
        if dtype is not None and flat.is_floating_point():
            flat = flat.to(dtype)
        if flat.untyped_storage().data_ptr() == storage.data_ptr():
            flat = flat.clone()
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _stage(self, name: str) -> Stage:
        key = self._modules.now, name, _calling_line()
        return self.report.stages.setdefault(key, Stage(*key))

    def _compare(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        exact_args: tuple[Any, ...],
        exact_kwargs: dict[str, Any],
        results: list[Tensor],
    ) -> None:
        stage = self._stage(name)
        source = self._copy(args[0]) if name in _INDICES | _VALUES_AND_INDICES and isinstance(args[0], Tensor) else None
        try:
            exact_result = func(*exact_args, **exact_kwargs)
        except Exception as lacking:  # the CPU has no such operator, or none of float64
            self.report.unchecked[f"{name}: {type_and_first_line(lacking)}"] += 1
            return
        changed = _written_tensor(name, exact_args, exact_kwargs)
        exact = [*_tensors(exact_result), *([] if changed is None else [changed])]
        floating = [tensor for tensor in (*_tensors((args, kwargs)), *results) if tensor.is_floating_point()]
        dtype = max((tensor.dtype for tensor in floating), key=lambda tensor: torch.finfo(tensor).eps, default=None)
        copies = [self._copy(result) for result in results]
        if source is not None:
            copies, exact = (_values_at_indices(name, source, tensors, args, kwargs) for tensors in (copies, exact))
        error = relative_error(copies, exact)
        are_floating = any(tensor.is_floating_point() for tensor in exact)
        tolerance = STAGE_TOLERANCES[dtype] if dtype is not None and are_floating else 0.0
        right = error <= tolerance
        if not right and name in _COMPARISONS:  # a number of Python's is rounded before, or not
            own_args, own_kwargs = self._on_cpu((args, kwargs), None)
            error = relative_error(copies, _tensors(func(*own_args, **own_kwargs)))
            right = not error
        elif not right and tolerance and not _is_on_cpu(results[0]):
            allowed = _MAX_TIMES_CPU_ERROR * self._cpu_error(func, args, kwargs, exact, name)
            if error <= allowed:
                right, tolerance = True, allowed
        stage.add(
            error, tolerance, right, dtype_name(dtype or results[0].dtype), lambda: _describe_tensors((args, kwargs))
        )
        if not right and self.report.first_wrong is None:
            self.report.first_wrong = stage

    def _cpu_error(self, func: Callable[..., Any], args: Any, kwargs: Any, exact: list[Tensor], name: str) -> float:
        """That of the same call on the CPU in the same dtype; 0 where it does not know."""
        if _written_tensor(name, args, kwargs) is not None:
            return 0.0  # the inputs are gone
        try:
            own_args, own_kwargs = self._on_cpu((args, kwargs), None)
            return relative_error(_tensors(func(*own_args, **own_kwargs)), exact)
        except Exception:
            return 0.0


def type_and_first_line(error: Exception) -> str:
    """The type of an exception, and the first line of what it says."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def _name(func: Callable[..., Any]) -> str:
    name = str(getattr(func, "__name__", func))
    if getattr(func, "__module__", None) and str(func.__module__).startswith("torch._ops"):
        return name.removesuffix(".default")
    return name


def _calling_line() -> str:
    """The innermost line of a caller that is no operator's own: neither of PyTorch, nor of this module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not f"{module}.".startswith(_OPERATORS):
            return f"{module}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "?"


def _written_tensor(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a call writes into, if it does."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    in_place = name in _DUNDER_IN_PLACE if name.startswith("__") else name.endswith("_")
    in_place = in_place or kwargs.get("inplace") is True
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


def _tensors(value: Any) -> list[Tensor]:
    """All those in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _has_dtype(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return isinstance(value, torch.dtype)
    return any(_has_dtype(item) for item in value)


def _are_views(results: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether the results are the memory of the inputs: nothing was computed."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return all(tensor.untyped_storage().data_ptr() in memory for tensor in results)


def _values_at_indices(
    name: str, source: Tensor, results: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """The values that indices among the results select from the source."""
    indices = results[-1]
    if indices.is_floating_point() or (name in _VALUES_AND_INDICES and len(results) < 2):
        return results
    default = None if name in ("argmax", "argmin") else -1
    dim = kwargs.get("dim", next((argument for argument in args[1:] if isinstance(argument, int)), default))
    if name == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    if dim is None:
        return [source.flatten()[indices]]
    keeps = indices.dim() == source.dim()
    return [*results[:-1], source.take_along_dim(indices if keeps else indices.unsqueeze(dim), dim)]


def relative_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error, relative to the largest right value; infinite for other shapes and for what is no number."""
    if [tensor.shape for tensor in results] != [tensor.shape for tensor in exact]:
        return float("inf")
    return max((_error(*pair) for pair in zip(results, exact, strict=True)), default=0.0)


def _error(found: Tensor, right: Tensor) -> float:
    if found.is_floating_point() != right.is_floating_point():
        return float("inf")
    if not found.numel():
        return 0.0
    found, right = found.double(), right.double()
    error, largest = float((found - right).abs().max()), float(right.abs().max())
    if error == error and largest < float("inf"):
        return error / largest if largest else error and float("inf")
    alike = (found == right) | (found.isnan() & right.isnan())
    if alike.all():
        return 0.0
    if not found[~alike].isfinite().all() or not right[~alike].isfinite().all():
        return float("inf")
    return float((found - right)[~alike].abs().max() / right[right.isfinite()].abs().max())


def _describe_tensors(value: Any) -> str:
    """The tensors of a call in words."""
    return "; ".join(
        f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        + ("" if tensor.is_contiguous() else f" with strides {tensor.stride()}")
        + (f" from element {tensor.storage_offset()}" if tensor.storage_offset() else "")
        for tensor in _tensors(value)
    )
