"""transformers' names of SAM 2's tensors (``Sam2VideoModel``), and Meta's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = "vision_encoder."
"""Of the names of the image encoder's tensors in transformers."""

# Beginnings of transformers' names, as patterns, and Meta's. The first that matches counts.
_PREFIXES = {
    r"memory_temporal_positional_encoding$": "maskmem_tpos_enc",
    r"no_memory_embedding$": "no_mem_embed",
    r"no_memory_positional_encoding$": "no_mem_pos_enc",
    r"no_object_pointer$": "no_obj_ptr",
    r"occlusion_spatial_embedding_parameter$": "no_obj_embed_spatial",
    r"temporal_positional_encoding_projection_layer\.": "obj_ptr_tpos_proj.",
    r"object_pointer_proj\.": "obj_ptr_proj.",
    r"vision_encoder\.backbone\.patch_embed\.projection\.": "image_encoder.trunk.patch_embed.proj.",
    r"vision_encoder\.backbone\.": "image_encoder.trunk.",
    r"vision_encoder\.neck\.convs\.(\d)\.": r"image_encoder.neck.convs.\1.conv.",
    r"memory_attention\.layer_norm\.": "memory_attention.norm.",
    r"memory_encoder\.mask_downsampler\.final_conv\.": "memory_encoder.mask_downsampler.encoder.12.",
    r"memory_encoder\.feature_projection\.": "memory_encoder.pix_feat_proj.",
    r"memory_encoder\.projection\.": "memory_encoder.out_proj.",
    r"memory_encoder\.memory_fuser\.layers\.(\d)\.scale$": r"memory_encoder.fuser.layers.\1.gamma",
    r"memory_encoder\.memory_fuser\.layers\.(\d)\.depthwise_conv\.": r"memory_encoder.fuser.layers.\1.dwconv.",
    r"memory_encoder\.memory_fuser\.layers\.(\d)\.pointwise_conv(\d)\.": r"memory_encoder.fuser.layers.\1.pwconv\2.",
    r"memory_encoder\.memory_fuser\.layers\.(\d)\.layer_norm\.": r"memory_encoder.fuser.layers.\1.norm.",
    r"prompt_encoder\.mask_embed\.conv1\.": "sam_prompt_encoder.mask_downscaling.0.",
    r"prompt_encoder\.mask_embed\.layer_norm1\.": "sam_prompt_encoder.mask_downscaling.1.",
    r"prompt_encoder\.mask_embed\.conv2\.": "sam_prompt_encoder.mask_downscaling.3.",
    r"prompt_encoder\.mask_embed\.layer_norm2\.": "sam_prompt_encoder.mask_downscaling.4.",
    r"prompt_encoder\.mask_embed\.conv3\.": "sam_prompt_encoder.mask_downscaling.6.",
    r"prompt_encoder\.shared_embedding\.positional_embedding$": (
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ),
    r"prompt_encoder\.": "sam_prompt_encoder.",
    r"mask_decoder\.upscale_conv1\.": "sam_mask_decoder.output_upscaling.0.",
    r"mask_decoder\.upscale_layer_norm\.": "sam_mask_decoder.output_upscaling.1.",
    r"mask_decoder\.upscale_conv2\.": "sam_mask_decoder.output_upscaling.3.",
    r"mask_decoder\.transformer\.layer_norm_final_attn\.": "sam_mask_decoder.transformer.norm_final_attn.",
    r"mask_decoder\.": "sam_mask_decoder.",
}
# Of names within many modules.
_WITHIN_NAMES = {
    r"\.layer_norm(\d)\.": r".norm\1.",
    r"\.o_proj\.": ".out_proj.",
}
_POINT_EMBED = "prompt_encoder.point_embed.weight"
_SHARED = "shared_image_embedding.positional_embedding"
"""A copy of the prompt encoder's matrix, which a file may have in its place."""


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``Sam2VideoModel`` by the names of Meta's checkpoints. Unknown names stay as they are."""
    converted = {}
    for name, value in state.items():
        if name == _POINT_EMBED:
            for label, row in enumerate(value.split(1)):
                converted[f"sam_prompt_encoder.point_embeddings.{label}.weight"] = row
        elif name == _SHARED:
            converted.setdefault("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", value)
        else:
            converted[_meta_name(_mlp_name(name, state))] = value
    return converted


def _mlp_name(name: str, state: Mapping[str, Tensor]) -> str:
    """Of a perceptron's layer: transformers has proj_in, layers.0, ..., proj_out, Meta layers.0, layers.1, ..."""
    found = re.match(r"(.*)\.(?:proj_in|layers\.(\d)|proj_out)(\.\w+)$", name)
    if not found or f"{found[1]}.proj_in.weight" not in state:
        return name
    perceptron, layer, parameter = found.groups()
    if ".proj_in." in name:
        index = 0
    elif layer is not None:
        index = int(layer) + 1
    else:
        index = 1 + sum(f"{perceptron}.layers.{i}.weight" in state for i in range(10))
    return f"{perceptron}.layers.{index}{parameter}"


def _meta_name(name: str) -> str:
    if found := re.match(r"memory_encoder\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)\.(\w+)$", name):
        index = 3 * int(found[1]) + (found[2] == "layer_norm")
        return f"memory_encoder.mask_downsampler.encoder.{index}.{found[3]}"
    for pattern, replacement in _PREFIXES.items():
        name, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            break
    for pattern, replacement in _WITHIN_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
