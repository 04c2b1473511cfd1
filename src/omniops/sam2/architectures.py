"""SAM 2's four sizes, as transformers' ``Sam2VideoModel``: how each is built, and how its tensors tell which it is."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

from omniops.sam2.arguments import an_int
from omniops.sam2.attention import scaled_dot_product_attention

IMAGE_SIZE = 1024
"""The side in pixels of the square that pictures are resized to."""


class Hiera(NamedTuple):
    """The sizes of an image encoder, stage by stage (Ryali et al., 2023, https://arxiv.org/abs/2306.00989)."""

    width: int
    heads: int
    blocks: tuple[int, int, int, int]
    global_attention: tuple[int, int, int]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    position_size: tuple[int, int] = (7, 7)


SIZES = {
    "tiny": Hiera(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": Hiera(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base-plus": Hiera(112, 2, (2, 3, 16, 3), (12, 16, 20), position_size=(14, 14)),
    "large": Hiera(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
}
LETTERS = dict(zip(SIZES, ("t", "s", "b+", "l"), strict=True))
"""How the official package's configurations call the sizes."""
VERSIONS = ("2.0", "2.1")
"""2.1 tells a hidden object from a seen one in the memory, and gives the pointers to objects a place in time."""


def new(size: str, version: str = "2.1", *, image_size: int = IMAGE_SIZE) -> Sam2VideoModel:
    """A model of random weights in float32 on the CPU, in evaluation mode.

    Args:
        size: one of ``SIZES``.
        version: one of ``VERSIONS``.
        image_size: the side of the square that pictures are resized to, a multiple of 32. The published weights are
            trained for 1024; less is faster and coarser.

    Raises:
        ValueError: for another size or version, or such an image_size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return lightened(Sam2VideoModel(_config(SIZES[size], version, image_size)).eval())


def lightened(model: Sam2VideoModel) -> Sam2VideoModel:
    """The model, its image encoder without work that nobody sees.

    transformers computes all attention weights between the heads of each place beside the attention itself, and forgets
    them: seven kernels of each block.
    """
    for block in model.vision_encoder.backbone.blocks:
        block.attn.forward = functools.partial(_attend, block.attn)
    return model


def _attend(attention: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """transformers' ``Sam2MultiScaleAttention.forward``: (N, H, W, C), its queries pooled where a stage begins."""
    n, height, width = hidden_states.shape[:3]
    heads = attention.num_attention_heads
    query, key, value = attention.qkv(hidden_states).unflatten(-1, (3, heads, -1)).flatten(1, 2).unbind(2)
    if attention.query_stride:
        # A copy: in torch 2.7 and 2.8 MPS takes the view, whose strides are in the order of channels_last, for packed.
        places = query.flatten(2).contiguous().unflatten(1, (height, width)).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(places, attention.query_stride, attention.query_stride).permute(0, 2, 3, 1)
        height, width = pooled.shape[1:3]
        query = pooled.flatten(1, 2).unflatten(-1, (heads, -1))
    attended = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    projected: Tensor = attention.proj(attended.transpose(1, 2).reshape(n, height, width, -1))
    return projected


def cast(model: Sam2VideoModel, dtype: torch.dtype) -> Sam2VideoModel:
    """The model with weights in that dtype wherever ``autocast`` would cast them at each call.

    That is the whole image encoder, and of all else what multiplies matrices; the rest stays in float32.
    """
    model.vision_encoder.to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.to(dtype)
    return model


def recognise(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The size and the version of a model, from the tensors of Meta's checkpoint.

    Raises:
        ValueError: for tensors of something else.
    """
    blocks = {int(found[1]) for name in state if (found := re.match(r"image_encoder\.trunk\.blocks\.(\d+)\.", name))}
    position = state.get("image_encoder.trunk.pos_embed")
    shape = tuple(position.shape) if position is not None else ()
    for name, size in SIZES.items():
        if blocks == set(range(sum(size.blocks))) and shape == (1, size.width, *size.position_size):
            return name, "2.1" if "no_obj_embed_spatial" in state else "2.0"
    raise ValueError(
        f"not a checkpoint of SAM 2 ({', '.join(SIZES)}): it has {len(state)} tensors, "
        f"{len(blocks)} blocks in image_encoder.trunk and a pos_embed of {shape or 'no'} shape there; "
        f"the first names are {', '.join(list(state)[:4])}"
    )


def version_of(model: Sam2VideoModel) -> str:
    """2.0 or 2.1."""
    return VERSIONS[bool(model.config.enable_occlusion_spatial_embedding)]


def set_image_size(config: Sam2VideoConfig, image_size: int) -> None:
    """Have a model of this configuration resize pictures to squares of that side.

    Raises:
        TypeError: for a side that is no integer.
        ValueError: for one that is not a positive multiple of 32.
    """
    image_size = an_int("image_size", image_size)
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, got {image_size}")
    config.image_size = config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.vision_config.backbone_feature_sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    config.memory_attention_rope_feat_sizes = [image_size // 16] * 2


def _config(size: Hiera, version: str, image_size: int) -> Sam2VideoConfig:
    widths = [size.width * 2**stage for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=size.width,
        num_attention_heads=size.heads,
        window_positional_embedding_background_size=list(size.position_size),
        blocks_per_stage=list(size.blocks),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[size.heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(size.windows),
        global_attention_blocks=list(size.global_attention),
    )
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=widths[::-1])
    config = Sam2VideoConfig(
        vision_config=vision,
        enable_occlusion_spatial_embedding=version == "2.1",
        enable_temporal_pos_encoding_for_object_pointers=version == "2.1",
    )
    set_image_size(config, image_size)
    return config
