"""Memory attention: a frame's features attend to the memory bank of each object.

As in the paper, with fewer kernels: the memories and the encoding of their positions are added up and cast once for all
layers, the features once for queries, keys and values, and the rotary encoding is broadcast over memories.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.attention import scaled_dot_product_attention
from omniops.sam2.modeling.layers import Linear
from omniops.sam2.modeling.position_encoding import AxialRotation, compute_axial_rotation

# Where the values of memories are projected after the attention: weights that add up to 1 leave it the same, and the
# attention has a quarter of the channels to add up. Flash attention, of half precision and of the CPU, wants values as
# wide as keys.
_PROJECTED_AFTER = {("cuda", torch.float32)}


class RoPEAttention(nn.Module):
    """Attention of one head with rotary encoding of queries and keys.

    Args:
        embedding_dim: channels C of queries and result.
        kv_in_dim: channels M of keys and values; those of queries by default.
    """

    def __init__(self, embedding_dim: int, kv_in_dim: int | None = None) -> None:
        super().__init__()
        kv_in_dim = embedding_dim if kv_in_dim is None else kv_in_dim
        self.q_proj = Linear(embedding_dim, embedding_dim)
        self.k_proj = Linear(kv_in_dim, embedding_dim)
        self.v_proj = Linear(kv_in_dim, embedding_dim)
        self.out_proj = Linear(embedding_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: AxialRotation, num_k_exclude_rope: int = 0) -> Tensor:
        """(1 or B, N, C), (B, K, M) and (B, K, M) -> (B, N, C).

        Args:
            q, k, v: not yet projected.
            rotation: of the N pixels, which K repeats but for its last keys.
            num_k_exclude_rope: how many of the last keys are not rotated.
        """
        q, k = self.q_proj(q)[:, None], self.k_proj(k)[:, None]
        project_after = v.shape[2] < k.shape[3] and (k.device.type, k.dtype) in _PROJECTED_AFTER
        v = (v if project_after else self.v_proj(v))[:, None]
        q = rotation.rotate(q).to(q.dtype)
        rotated = k.shape[2] - num_k_exclude_rope
        k[:, :, :rotated] = rotation.rotate(k[:, :, :rotated])
        attended = scaled_dot_product_attention(q, k, v)[:, 0]
        result: Tensor = self.out_proj(self.v_proj(attended) if project_after else attended)
        return result


class MemoryAttentionLayer(nn.Module):
    """Self-attention of the frame, its attention to memories, and a perceptron."""

    def __init__(self, d_model: int, dim_feedforward: int, memory_dim: int) -> None:
        super().__init__()
        self.self_attn = RoPEAttention(d_model)
        self.cross_attn_image = RoPEAttention(d_model, memory_dim)
        self.linear1 = Linear(d_model, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, rotation: AxialRotation, num_obj_ptr_tokens: int
    ) -> Tensor:
        """(1 or B, N, C) and B objects' memories, (B, K, M) -> (B, N, C)."""
        dtype = self.linear1.weight.dtype
        normed = self.norm1(x).to(dtype)
        x = x + self.self_attn(normed, normed, normed, rotation)
        x = x + self.cross_attn_image(self.norm2(x).to(dtype), keys, values, rotation, num_obj_ptr_tokens)
        hidden = F.relu(self.linear1(self.norm3(x).to(dtype)))
        mlp: Tensor = self.linear2(hidden)
        return x + mlp


class MemoryAttention(nn.Module):
    """Four layers and a norm."""

    def __init__(self, d_model: int, memory_dim: int, num_layers: int = 4, dim_feedforward: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MemoryAttentionLayer(d_model, dim_feedforward, memory_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.d_model = d_model
        self._rotations: dict[tuple[int, int, torch.device], AxialRotation] = {}

    def forward(
        self, curr: Tensor, memory: Tensor, memory_pos: Tensor, feat_size: tuple[int, int], num_obj_ptr_tokens: int
    ) -> Tensor:
        """The frame's features after their attention to B objects' memories, (B, N, C).

        Args:
            curr: (1, N, C), the features of the N pixels of a map with the encoding of their positions.
            memory: (B, R * N + num_obj_ptr_tokens, M), R memories of every pixel, then tokens of object pointers.
            memory_pos: (R * N + num_obj_ptr_tokens, M), the encoding of the position and time of each.
            feat_size: the height and the width of the map.
            num_obj_ptr_tokens: how many tokens at the end have no position in the map, and so are not rotated.
        """
        rotation = self._rotation(*feat_size, curr.device)
        dtype: torch.dtype = self.layers[0].linear1.weight.dtype  # type: ignore[assignment, union-attr]
        keys, values = (memory + memory_pos).to(dtype), memory.to(dtype)
        x = curr
        for layer in self.layers:
            x = layer(x, keys, values, rotation, num_obj_ptr_tokens)
        result: Tensor = self.norm(x)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Without the rotations: a copy or a file of the module may be for another device."""
        return {**super().__getstate__(), "_rotations": {}}  # type: ignore[no-untyped-call]

    @torch.inference_mode(False)
    def _rotation(self, height: int, width: int, device: torch.device) -> AxialRotation:
        key = (height, width, device)
        if key not in self._rotations:
            self._rotations[key] = compute_axial_rotation(self.d_model, height, width, device)
        return self._rotations[key]
