"""What PyTorch's own operators are known to get wrong on MPS, as rules that no call of ours may break.

Each rule says which operators it is about, what is wrong with a call, where that is reported, which versions of PyTorch
and macOS have it, and when the rule may go. ``check`` raises RuleError for a call that breaks one. mps_device.py has
every operator that reaches MPS checked. The reports were read in November 2026; where they only suspect a version or a
shape, the rule holds for it. Nothing was seen on Apple hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from mps_call import Call, leaves
from torch import Tensor


class RuleError(AssertionError):
    """A call that MPS gets wrong, or that ends the process there."""


@dataclass(frozen=True)
class Rule:
    """A fault of MPS."""

    name: str
    operators: tuple[str, ...]
    """Their names without namespace and overload; all where there are none."""
    wrong: Callable[[Call], str | None]
    """What is wrong with a call."""
    upstream: str
    versions: str
    until: str
    """When the rule may go."""


MATRIX_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "linear")
BATCHED = ("bmm", "baddbmm", "baddbmm_", "addbmm")
ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product_attention_math_for_mps")
POOLS = ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d")
NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm")
CONVOLUTIONS = ("convolution", "_convolution", "conv2d", "conv_transpose2d", "convolution_overrideable")
_OF_GRAPHS = {*MATRIX_PRODUCTS, *ATTENTION, *POOLS, *NORMS, *CONVOLUTIONS, "convolution_backward"}

MAX_SCORES = 2**28
"""Bytes of float32 scores that one attention may make; the process ends at 2**32, and memory before."""


def _long_reduction(call: Call) -> str | None:
    first, second = call.factors
    m, k, n = math.prod(first[:-1]), first[-1], second[-1]
    if k >= 32767 and m >= 16 and n >= 16:
        return f"a reduction over {k} elements, of ({m}, {k}) and ({k}, {n}), reads past its operands"
    return None


def _output_view(call: Call) -> str | None:
    if not (call.schema.has_out or call.name in MATRIX_PRODUCTS or call.name in ("index_add_",)):
        return None
    for out in call.outputs:
        if out.storage_offset() or not out.is_contiguous():
            return f"the result is a view, of strides {out.stride()} at offset {out.storage_offset()}: never written"
    return None


def _large_product(call: Call) -> str | None:
    first, second = call.factors
    strides = [stride for tensor in call.tensors if tensor.dim() > 1 for stride in tensor.stride()[-2:]]
    if max(*first[-2:], second[-1], *strides) > 32768:
        return f"a side or stride of more than 32768, of {tuple(first)} and {tuple(second)}"
    return f"a batch of {first[0]}, more than 65536" if call.name != "linear" and first[0] > 65536 else None


def _many_rows_with_bias(call: Call) -> str | None:
    rows = math.prod(call["input"].shape[:-2])
    return f"a bias and {rows} matrices, more than 65536" if call["bias"] is not None and rows > 65536 else None


def _row_with_bias(call: Call) -> str | None:
    input = call["input"]
    alone = input.shape[0] == 1 if input.dim() == 2 else input.dim() == 1 or input.shape[-2] == 1
    return (
        f"a bias and one row, of {tuple(input.shape)}: the bias is dropped"
        if call["bias"] is not None and alone
        else None
    )


def _repeated(call: Call) -> str | None:
    for tensor in call.tensors:
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            if call["bias"] is tensor:
                continue
            return f"an operand of shape {tuple(tensor.shape)} and strides {tensor.stride()}: expanded, not dense"
    return None


def _score_matrix(call: Call) -> str | None:
    query, key = call["query"], call["key"]
    scores = 4 * math.prod(query.shape[:-1]) * key.shape[-2]
    return (
        f"{scores / 2**20:.0f} MB of scores, of {tuple(query.shape)} and {tuple(key.shape)}"
        if scores > MAX_SCORES
        else None
    )


def _few_queries(call: Call) -> str | None:
    query, key, value = call["query"], call["key"], call["value"]
    if query.shape[-2] > 8 or query.shape[-1] not in (64, 96, 128, 256):
        return None
    if key.shape[-2] % 32 or not all(tensor.is_contiguous() for tensor in (query, key, value)):
        return f"{query.shape[-2]} queries of {query.shape[-1]} for {key.shape[-2]} keys: their kernel is wrong there"
    return None


def _value_width(call: Call) -> str | None:
    query, value = call["query"], call["value"]
    return (
        f"values of {value.shape[-1]} for queries of {query.shape[-1]}" if value.shape[-1] != query.shape[-1] else None
    )


def _cut_mask(call: Call) -> str | None:
    query = call["query"]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and query.shape[-2] > 3068 and (call["is_causal"] or call["attn_mask"] is not None):
        return f"{query.shape[-2]} queries in {query.dtype} with a mask, which is not cut as the queries are"
    return None


def looks_channels_last(tensor: Tensor) -> bool:
    """What PyTorch takes for channels_last by the order of the strides (c10's is_channels_last_strides_2d)."""
    sizes, strides = tensor.shape, tensor.stride()
    if len(sizes) != 4 or not strides[1]:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if not sizes[axis] or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


def _not_packed(call: Call) -> str | None:
    input = call["input"] if call["input"] is not None else call["self"]
    if looks_channels_last(input) and (
        input.storage_offset() or not input.is_contiguous(memory_format=torch.channels_last)
    ):
        return (
            f"an input of shape {tuple(input.shape)}, strides {input.stride()} and offset {input.storage_offset()}: "
            "taken for packed channels_last memory"
        )
    return None


def _strided_weight(call: Call) -> str | None:
    weight = call["weight"]
    return None if weight.is_contiguous() else f"a weight of strides {weight.stride()}, which are ignored"


def _channels_last_backward(call: Call) -> str | None:
    for tensor in call.tensors:
        if looks_channels_last(tensor) and not tensor.is_contiguous():
            return f"the gradient of a channels_last input, {tuple(tensor.shape)}"
    return None


def _strided(call: Call) -> str | None:
    return None if call["self"].is_contiguous() else f"an input of strides {call['self'].stride()}, which are ignored"


def _best_strided(call: Call) -> str | None:
    return _strided(call) if call["dim"] is None else None


def _many_axes(call: Call) -> str | None:
    return f"an input of {call['self'].dim()} axes" if call["self"].dim() >= 5 else None


def _nonzero_of_many(call: Call) -> str | None:
    masks = [call["self"]] if call["indices"] is None else call["indices"]
    for mask in masks:
        is_mask = mask is not None and (call["indices"] is None or mask.dtype == torch.bool)
        if is_mask and mask.numel() > 2**24:
            return f"{mask.numel()} elements, more than 2**24: their places go through float32"
    return None


def _wide_integers(call: Call) -> str | None:
    dtype = call["self"].dtype
    if dtype == torch.int64 or (call.name == "abs" and dtype == torch.int32):
        return f"{dtype}: values above 2**24 go through float32"
    return f"{dtype}: indices out of range" if dtype == torch.bool and "sort" in call.name else None


def _unaligned_bytes(call: Call) -> str | None:
    tensor = call["self"]
    if tensor.element_size() == 1 and tensor.storage_offset() % 4:
        return f"bytes from offset {tensor.storage_offset()} on: stores go to the multiple of four before"
    return None


def _not_waited_for(call: Call) -> str | None:
    return "non_blocking=True: the source may be gone when it is read" if call["non_blocking"] else None


def _tiny_number(call: Call) -> str | None:
    for number in call.numbers:
        if number and not float(f"{number:.6f}"):
            return f"the number {number:g}, which a graph's key rounds to 0"
    return None


_UNKNOWN_DTYPES = (torch.float64, torch.complex128, torch.uint16, torch.uint32, torch.uint64)


def _dtype(call: Call) -> str | None:
    moved = call["self"].dtype if call.name == "_to_copy" and call["dtype"] is None else call["dtype"]
    asked = [moved, *(tensor.dtype for tensor in call.tensors)]
    return next((f"{dtype}, which MPS does not have" for dtype in asked if dtype in _UNKNOWN_DTYPES), None)


# Views and copies of nothing launch nothing, and PyTorch's sources have the others look for elements first, as they do
# with what is computed element by element.
_TAKE_EMPTY = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like",
    "new_zeros", "full", "full_like", "new_full", "ones", "ones_like", "new_ones", "view", "view_as",
    "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "split",
    "split_with_sizes", "chunk", "unsqueeze", "squeeze", "as_strided", "detach", "alias", "unbind", "unfold",
    "diagonal", "stack", "_to_copy", "copy_", "clone", "cat", "fill_", "zero_", "lift_fresh", "mm", "addmm",
    "bmm", "linear", "nonzero", "index", "index_put", "index_put_", "numel", "sym_size", "is_same_size",
}  # fmt: skip


def _empty(call: Call) -> str | None:
    if call.name in _TAKE_EMPTY or call.func.namespace != "aten" or torch.Tag.pointwise in call.func.tags:
        return None
    for tensor in call.tensors:
        if not tensor.numel():
            return f"an operand without elements, {tuple(tensor.shape)}"
    return None


def _large_fill(call: Call) -> str | None:
    size, dtype = call["size"], call["dtype"] or torch.get_default_dtype()
    if call["self"] is not None and not call.name.startswith("new_"):
        size, dtype = call["self"].shape, call["dtype"] or call["self"].dtype
    count = math.prod(size) * dtype.itemsize
    return f"{count / 2**30:.1f} GiB: what lies beyond 4 is not filled" if count >= 2**32 else None


def _too_large(call: Call) -> str | None:
    for tensor in call.tensors:
        if tensor.numel() >= 2**31:
            return f"{tuple(tensor.shape)}, {tensor.numel()} elements of 2**31 at most"
        if call.name in _OF_GRAPHS and tensor.numel() * tensor.element_size() >= 2**32:
            return f"{tuple(tensor.shape)} of {tensor.dtype}, more than 4 GiB, which ends the process"
    return None


RULES = (
    Rule(
        "a long reduction",
        MATRIX_PRODUCTS,
        _long_reduction,
        "pytorch issues 195163 and 193487, pull requests 195012 (open) and 183535 (two dimensions, in 2.14)",
        "every torch; M1 and M2, macOS before 27",
        "195012 is in the oldest torch",
    ),
    Rule(
        "a result that is a view",
        (),
        _output_view,
        "pytorch pull requests 193385 and 187255, issues 104832 and 176159",
        "torch before 2.14 on macOS 14, strided results on 15 too",
        "torch 2.14 or macOS 15 is the oldest",
    ),
    Rule(
        "a large side of a product",
        (*BATCHED, "linear"),
        _large_product,
        "pytorch issues 116769, 111634, 122045, 197636 and pull request 117549, whose guard these have not",
        "every torch; macOS before 14.4 for sides, all for batches",
        "macOS 14.4 is the oldest, and 197636 is closed",
    ),
    Rule(
        "many matrices with a bias",
        ("linear",),
        _many_rows_with_bias,
        "pytorch issue 189495, pull request 189496",
        "torch before 2.14",
        "torch 2.14 is the oldest",
    ),
    Rule(
        "a single row with a bias",
        ("linear",),
        _row_with_bias,
        "pytorch issue 188438, pull request 188619",
        "torch before 2.14; M1, macOS 26",
        "torch 2.14 is the oldest",
    ),
    Rule(
        "an expanded operand",
        (*MATRIX_PRODUCTS, *ATTENTION),
        _repeated,
        "pytorch issues 180201 and 167154, pull request 180236 (mm alone, in 2.12)",
        "every torch; macOS 15.0 to 26.3, and the beta of 27",
        "180201's cause is mended in the oldest macOS",
    ),
    Rule(
        "a whole score matrix",
        ATTENTION,
        _score_matrix,
        "pytorch issue 149261 (open)",
        "every torch before 2.13; later where the width of a head has no kernel of its own",
        "torch 2.13 is the oldest, and its kernels take heads of 16 and 56",
    ),
    Rule(
        "few queries",
        ATTENTION,
        _few_queries,
        "pytorch issues 163597 and 181133, pull requests 169222 and 174861",
        "torch 2.8 to 2.11",
        "torch 2.12 is the oldest",
    ),
    Rule(
        "values of another width",
        ATTENTION,
        _value_width,
        "pytorch issue 176767",
        "torch before 2.12",
        "torch 2.12 is the oldest",
    ),
    Rule(
        "a mask for many queries in half precision",
        ATTENTION,
        _cut_mask,
        "sdpa_general_mps in PyTorch's Attention.mm; measured wrong with 2.10",
        "torch 2.10, others not known",
        "PyTorch cuts the mask too",
    ),
    Rule(
        "an input that only looks like channels_last",
        (*POOLS, *NORMS, *CONVOLUTIONS),
        _not_packed,
        "pytorch issues 180984 and 174345, pull requests 180992 and 157876",
        "torch before 2.13; max_pool2d before 2.9",
        "torch 2.13 is the oldest",
    ),
    Rule(
        "a convolution's strided weight",
        (*CONVOLUTIONS, "convolution_backward"),
        _strided_weight,
        "pytorch issue 192212, pull request 192303",
        "torch before 2.14; macOS 15 and later",
        "torch 2.14 is the oldest",
    ),
    Rule(
        "a channels_last gradient",
        ("native_batch_norm_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward"),
        _channels_last_backward,
        "pytorch issues 175189 and 175190, pull request 189233 (open)",
        "every torch for avg_pool2d, before 2.14 for batch_norm",
        "189233 is in the oldest torch",
    ),
    Rule(
        "a sort of what is not dense",
        ("sort", "argsort", "msort"),
        _strided,
        "pytorch issue 175187",
        "every torch",
        "175187 is closed",
    ),
    Rule(
        "a strided input of an activation",
        ("softplus", "selu", "_prelu_kernel", "threshold"),
        _strided,
        "pytorch issue 131736, pull request 197000",
        "torch before 2.15",
        "torch 2.15 is the oldest",
    ),
    Rule(
        "the best of all of a strided input",
        ("argmax", "argmin"),
        _best_strided,
        "pytorch issue 160740 (open)",
        "every torch",
        "160740 is closed",
    ),
    Rule(
        "the best of five axes",
        ("topk",),
        _many_axes,
        "pytorch issue 154890 (open)",
        "every torch",
        "154890 is closed",
    ),
    Rule(
        "a linear layer's strided weight",
        ("linear",),
        _strided_weight,
        "pytorch issues 162730 and 161640",
        "torch 2.8",
        "torch 2.9 is the oldest",
    ),
    Rule(
        "the places of many elements",
        ("nonzero", "masked_select", "index", "index_put", "index_put_"),
        _nonzero_of_many,
        "pytorch issues 122916 and 140570",
        "torch 2.4 and some later",
        "188816 is in the oldest torch",
    ),
    Rule(
        "integers through float32",
        ("abs", "sort", "argsort", "unique_dim", "_unique2", "unique_consecutive"),
        _wide_integers,
        "pytorch issues 190052, 195595 and pull request 184620",
        "torch before 2.14 and later",
        "195595's mend is in the oldest torch",
    ),
    Rule(
        "bytes filled from between words",
        ("fill_", "zero_"),
        _unaligned_bytes,
        "pytorch issue 183631, pull request 183790",
        "torch 2.12",
        "torch 2.13 is the oldest",
    ),
    Rule(
        "a copy that is not waited for",
        ("_to_copy", "copy_", "to"),
        _not_waited_for,
        "pytorch issues 189690 and 139550 (open)",
        "every torch",
        "both are closed",
    ),
    Rule(
        "a bound that rounds to zero",
        ("clamp", "clamp_", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "addmm", "baddbmm", *ATTENTION),
        _tiny_number,
        "pytorch issue 167767 (open); PyTorch's Attention.mm and LinearAlgebra.mm make keys alike",
        "every torch",
        "167767 is closed",
    ),
    Rule("a dtype that MPS has not", (), _dtype, "pytorch issues 122602 and 159076", "every torch", "Metal has it"),
    Rule(
        "an operand without elements",
        (),
        _empty,
        "pytorch issues 187399, 175902 and 139400",
        "torch before 2.14, others not known",
        "PyTorch tests its operators for it",
    ),
    Rule(
        "zeros of 4 GiB",
        ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like", "new_full"),
        _large_fill,
        "pytorch issue 161265, pull request 164108",
        "torch before 2.9, perhaps later; macOS 26",
        "164108 is in the oldest torch",
    ),
    Rule(
        "more elements than MPS can address",
        (),
        _too_large,
        "PyTorch's check 'MPSGraph does not support tensor dims larger than INT_MAX'; pytorch issue 197636",
        "every torch",
        "never",
    ),
)


@cache
def _rules(name: str) -> list[Rule]:
    return [rule for rule in RULES if not rule.operators or name in rule.operators]


def check_results(func: Any, results: Any) -> None:
    """Raise RuleError where an operator makes more elements than MPS can address."""
    for result in leaves(results if isinstance(results, (tuple, list)) else [results], {}):
        if isinstance(result, Tensor) and result.numel() >= 2**31:
            raise RuleError(f"{func}: more elements than MPS can address: a result of {tuple(result.shape)}")


def check(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise RuleError where an operator's call on MPS breaks a rule."""
    call = Call(func, args, kwargs)
    for rule in _rules(call.name):
        if wrong := rule.wrong(call):
            raise RuleError(f"{func}: {rule.name}: {wrong} ({rule.upstream}; {rule.versions})")
