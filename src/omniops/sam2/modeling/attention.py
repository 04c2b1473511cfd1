"""Scaled dot product attention, kept clear of what PyTorch's own gets wrong on MPS, and is slow at elsewhere.

On CPUs with instructions for bfloat16 (AVX512-BF16, AMX), matrix products in it are faster than PyTorch's attention,
which does not use them for all of its work.

On NVIDIA GPUs cuDNN's kernel takes 128 queries of a head on a multiprocessor, however many keys they attend to: the
4096 of a frame are on 32 of the 132 of an H200. So the keys are split among several.

What PyTorch's reports say, none of it seen on Apple hardware by us:

- Where no kernel is made for the width of a head, and before torch 2.13 everywhere, the whole matrix of scores is made
  (pytorch issue 149261): memory runs out, and at 4 GiB the process ends. So queries are taken in slices.
- An expanded query or key may be read wrongly (180201).
- The kernel for up to 8 queries is wrong on what is not contiguous (163597, 181133) and reads past the end of fewer
  than 32 keys (169222), in torch 2.8 to 2.11.
- torch 2.13's kernel for half precision on macOS 26 scrambles its result (191794).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops import device as devices
from omniops._torch_private import cudnn_attention
from omniops.ops._library import without_autocast

MAX_SCORES = 2**28
"""Bytes of float32 scores at once on MPS: what a chip's last cache and the smallest machines hold."""
_FEW_QUERIES = 8
_CPU_SCORES = 2**23
"""Bytes of bfloat16 scores at once on the CPU, for its caches."""
_CPU_MIN_QUERIES = 16
"""With fewer PyTorch's attention is as fast."""
_CPU_QUERIES_AT_ONCE = 256
"""So many at least, however many scores they have."""
_CUDNN_CAPABILITIES = {(9, 0)}
"""Compute capability of the GPUs on which splitting the keys was measured to be faster: Hopper's."""
_CUDNN_QUERIES = 128
"""Queries that one multiprocessor takes."""
_CUDNN_MIN_KEYS = 1024
"""Keys of a part, at least: with fewer, putting the parts together takes longer than the split saves."""


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of B batches, or of one query for all of them.

    Args:
        query: (B or 1, heads, Q, D)
        key: (B, heads, K, D)
        value: (B, heads, K, D)

    Returns:
        (B, heads, Q, D)
    """
    query = query.expand(key.shape[0], -1, -1, -1)  # not len(key), which torch.export takes for a constant
    if query.device.type != "mps":
        in_bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
        if (
            in_bfloat16
            and query.shape[2] >= _CPU_MIN_QUERIES
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            and devices.autocast_dtype(query.device) == torch.bfloat16  # else products in it are emulated, and slow
        ):
            return _in_bfloat16(query, key, value)
        if (parts := _cudnn_parts(query, key, value)) > 1:
            return _by_parts_of_keys(query, key, value, parts)
        return F.scaled_dot_product_attention(query, key, value)
    at_once = max(1, MAX_SCORES // (4 * query.shape[:2].numel() * key.shape[2]))
    slices = query.chunk(-(-query.shape[2] // at_once), dim=2)  # of about one size: few queries have their own kernel
    by_hand = slices[-1].shape[2] <= _FEW_QUERIES or (query.dtype != torch.float32 and _scrambles_half())
    attend = _by_hand if by_hand else F.scaled_dot_product_attention
    attended = [attend(queries.contiguous(), key, value) for queries in slices]
    return torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]


def _in_bfloat16(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With scores rounded to bfloat16; their softmax adds up in float32."""
    row_bytes = query.shape[:2].numel() * key.shape[2] * query.element_size()
    rows = max(_CPU_QUERIES_AT_ONCE, _CPU_SCORES // max(1, row_bytes))
    with without_autocast(query):  # which has softmax in float32
        transposed = key.transpose(2, 3)
        scaled = query * query.shape[3] ** -0.5
        attended = [(queries @ transposed).softmax(dim=3) @ value for queries in scaled.split(rows, dim=2)]
    return torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]


def _cudnn_parts(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Into how many parts the keys are split for cuDNN, so that all multiprocessors have work; 1 for no split."""
    if (
        query.device.type != "cuda"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not query.dtype == key.dtype == value.dtype
        or torch.cuda.get_device_capability(query.device) not in _CUDNN_CAPABILITIES
    ):
        return 1
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    parts = _number_of_parts(query.shape, key.shape[2], multiprocessors)
    if parts == 1:
        return 1
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    # It refuses float32, and what its version has no kernel for.
    return parts if torch.backends.cuda.can_use_cudnn_attention(params) else 1


def _number_of_parts(query_shape: Sequence[int], keys: int, multiprocessors: int) -> int:
    """The most parts of equal length for which there are multiprocessors and keys."""
    batch, heads, queries, _ = query_shape
    blocks = batch * heads * -(-queries // _CUDNN_QUERIES)
    if not blocks:
        return 1
    max_parts = min(multiprocessors // blocks, keys // _CUDNN_MIN_KEYS)
    return next((parts for parts in range(max_parts, 1, -1) if keys % parts == 0), 1)


def _by_parts_of_keys(query: Tensor, key: Tensor, value: Tensor, parts: int) -> Tensor:
    """Attention to each part of the keys, added up.

    Each counts by its share of the sum of the exponentials of all scores.
    """
    heads = key.shape[1]  # the kernel takes each part as a head of its own
    key, value = (tensor.unflatten(2, (parts, -1)).flatten(1, 2) for tensor in (key, value))
    query = query.unsqueeze(2).expand(-1, -1, parts, -1, -1).flatten(1, 2)
    attended, logsumexp = cudnn_attention(query, key, value)
    shares = logsumexp.unflatten(1, (heads, parts)).softmax(dim=2)
    of_all: Tensor = (attended.unflatten(1, (heads, parts)) * shares[..., None]).sum(dim=2)
    return of_all.to(query.dtype)


def _by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With scores in float32, as PyTorch's kernels have them."""
    with without_autocast(query):
        scores = (query.float() * query.shape[3] ** -0.5) @ key.float().transpose(2, 3)
        attended: Tensor = scores.softmax(dim=3).to(value.dtype) @ value
    return attended


@functools.cache
def _scrambles_half() -> bool:
    macos = platform.mac_ver()[0].partition(".")[0]
    return torch.__version__.startswith("2.13.") and macos.isdecimal() and int(macos) >= 26
