"""The two-way transformer of the mask decoder: tokens attend to the image, the image to tokens."""

from __future__ import annotations

from torch import Tensor, nn

from omniops.sam2.modeling.attention import scaled_dot_product_attention
from omniops.sam2.modeling.layers import MLP, Linear


class Attention(nn.Module):
    """Attention whose heads may have fewer channels than the embedding.

    Args:
        embedding_dim: channels C of queries, keys, values and result.
        num_heads: of the attention.
        downsample_rate: by which the channels are divided within.
    """

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        internal_dim = embedding_dim // downsample_rate
        self.q_proj = Linear(embedding_dim, internal_dim)
        self.k_proj = Linear(embedding_dim, internal_dim)
        self.v_proj = Linear(embedding_dim, internal_dim)
        self.out_proj = Linear(internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Q, C), (B, K, C) and (B, K, C) -> (B, Q, C)."""
        q, k, v = (
            rows.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for rows in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out_proj(attended)
        return result


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, a perceptron, image to tokens.

    Args:
        embedding_dim: channels C.
        num_heads: of each attention.
        mlp_dim: hidden channels of the perceptron.
        skip_first_layer_pe: tokens attend to each other without the encoding of their positions, and are replaced.
    """

    def __init__(self, embedding_dim: int, num_heads: int, mlp_dim: int, skip_first_layer_pe: bool) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, downsample_rate=2)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLP(embedding_dim, mlp_dim, embedding_dim, num_layers=2)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, downsample_rate=2)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pixels (B, K, C), and the encodings of their positions -> both."""
        if self.skip_first_layer_pe:
            attended = self.self_attn(queries, queries, queries)
        else:
            with_pe = queries + query_pe
            attended = queries + self.self_attn(with_pe, with_pe, queries)
        tokens = self.norm1(attended)
        pixels_with_pe = keys + key_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + query_pe, pixels_with_pe, keys))
        tokens = self.norm3(tokens + self.mlp(tokens))
        pixels = self.norm4(keys + self.cross_attn_image_to_token(pixels_with_pe, tokens + query_pe, tokens))
        return tokens, pixels


class TwoWayTransformer(nn.Module):
    """Two blocks, and a last attention of tokens to the image."""

    def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(embedding_dim, num_heads, mlp_dim, skip_first_layer_pe=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, downsample_rate=2)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), the encoding of their positions (1, C, H, W) and tokens (B, T, C).

        Returns:
            The tokens, (B, T, C), and the images, (B, H * W, C), after their attention to each other.
        """
        keys, key_pe = (maps.flatten(2).transpose(1, 2) for maps in (image_embedding, image_pe))
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe)
        queries = queries + self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        return self.norm_final_attn(queries), keys
