"""How a frame's features look at memories, with fewer kernels than transformers' ``Sam2VideoMemoryAttention``.

The weights are its modules'. Its forward adds the memories to the encoding of their places in every layer, and lays out
the angles of the rotary encoding (Su et al., 2021, https://arxiv.org/abs/2104.09864) once for every memory and layer;
autocast casts the normalised features three times a layer and the memories twice. Here memories are added up and cast
once for all layers, features cast once for queries, keys and values, and the angles broadcast.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention, Sam2VideoRoPEAttention

from omniops.sam2.attention import scaled_dot_product_attention

# Where the values of memories are projected after the attention: weights that add up to 1 leave it the same, and the
# attention has a quarter of the channels to add up. Flash attention, of half precision and of the CPU, wants values as
# wide as keys.
_PROJECTED_AFTER = {("cuda", torch.float32)}


class _Angles(NamedTuple):
    """Of each place of the frame: channels 2i and 2i + 1 are turned by the same angle."""

    cos: Tensor
    """(N, D)"""
    sin: Tensor
    """(N, D/2)"""


def look_back(attention: Sam2VideoMemoryAttention, frame: Tensor, memory: Tensor, places: Tensor, still: int) -> Tensor:
    """The frame's features after their look at B objects' memories, (B, N, C).

    Args:
        attention: the model's.
        frame: (1, N, C), the features of N places with the encoding of these.
        memory: (B, R * N + still, M), R memories of every place of the frame, then tokens that have no place.
        places: (R * N + still, M), the encoding of where and when each is of.
        still: the number of tokens that have no place, and so are not turned.
    """
    angles = _angles(attention.rotary_emb, attention.position_ids)
    dtype = attention.layers[0].linear1.weight.dtype
    keys, values = (memory + places).to(dtype), memory.to(dtype)
    x = frame
    for layer in attention.layers:
        normed = layer.layer_norm1(x).to(dtype)
        x = x + _attend(layer.self_attn, normed, normed, normed, angles, 0)
        x = x + _attend(layer.cross_attn_image, layer.layer_norm2(x).to(dtype), keys, values, angles, still)
        x = x + layer.linear2(layer.activation(layer.linear1(layer.layer_norm3(x).to(dtype))))
    result: Tensor = attention.layer_norm(x)
    return result


@functools.lru_cache(maxsize=4)
def _angles(rotary: nn.Module, places: Tensor) -> _Angles:
    """Of the places of a model's frames, the same for all of them; those of four models are kept."""
    with torch.inference_mode(False):
        cos, sin = rotary(places, places)
        return _Angles(cos[0], sin[0, :, ::2].contiguous())


def _attend(
    attention: Sam2VideoRoPEAttention, query: Tensor, key: Tensor, value: Tensor, angles: _Angles, still: int
) -> Tensor:
    """(1 or B, N, C), (B, K, M) and (B, K, M) -> (B, N, C)."""
    heads = attention.num_attention_heads
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (attention.q_proj(query), attention.k_proj(key)))
    after = heads == 1 and value.shape[2] < k.shape[3] and (k.device.type, k.dtype) in _PROJECTED_AFTER
    v = (value if after else attention.v_proj(value)).unflatten(2, (heads, -1)).transpose(1, 2)
    q = _turned(q, angles).to(q.dtype)
    count = k.shape[2] - still
    k[:, :, :count] = _turned(k[:, :, :count], angles)
    attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    result: Tensor = attention.o_proj(attention.v_proj(attended) if after else attended)
    return result


def _turned(x: Tensor, angles: _Angles) -> Tensor:
    """(B, heads, R * N, D), each pair of channels turned by its angle, in float32."""
    x = x.float().unflatten(2, (-1, len(angles.cos)))
    turned = x * angles.cos
    turned[..., ::2].addcmul_(x[..., 1::2], angles.sin, value=-1)
    turned[..., 1::2].addcmul_(x[..., ::2], angles.sin)
    return turned.flatten(2, 3)
