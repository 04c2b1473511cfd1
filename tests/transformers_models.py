"""Tiny models of transformers with multi-scale deformable attention: random weights, made from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZE = (64, 96)
"""Height and width of the images; those of plain transformers are square."""
LARGER = (128, 192)
"""Without a level of two pixels, whose normalisation makes much of what float32 rounds."""


def _resnet(name: str = "ResNetConfig", first: int = 2) -> Any:
    import transformers

    stages = [f"stage{number}" for number in range(first, 5)]
    return getattr(transformers, name)(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1] * 4, layer_type="basic", out_features=stages
    )


def _swin(first: int = 2) -> Any:
    import transformers

    stages = [f"stage{number}" for number in range(first, 5)]
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )


def _hgnet(first: int = 2) -> Any:
    import transformers

    widths = [8, 12, 16, 20]
    return transformers.HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        hidden_sizes=widths,
        depths=[1] * 4,
        stage_in_channels=[8, *widths[:3]],
        stage_mid_channels=[8] * 4,
        stage_out_channels=widths,
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        stage_kernel_size=[3] * 4,
        out_features=[f"stage{number}" for number in range(first, 5)],
    )


def _bert(width: int = 16) -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=1100, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )


TRANSFORMER = {
    "num_queries": 9,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_labels": 3,
}
DEFORMABLE = {**TRANSFORMER, "d_model": 32, "num_feature_levels": 4, "dropout": 0.0}
TWO_STAGES = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 9}
READING = {"max_text_len": 12, "fusion_droppath": 0.0}
RT = {
    **TRANSFORMER,
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [12, 16, 20],
    "decoder_in_channels": [16, 16, 16],
    "num_denoising": 4,
}
FINE = {**RT, "decoder_n_points": [3, 6, 3]}
PLAIN = {
    "d_model": 16, "decoder_layers": 2, "num_queries": 9, "decoder_self_attention_heads": 2, "num_labels": 3,
    "decoder_cross_attention_heads": 2, "decoder_ffn_dim": 16, "group_detr": 2,
}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "out_indices": [1, 2]}
CLIP = {
    "model_type": "clip_text_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "vocab_size": 1100, "projection_dim": 24,
}  # fmt: skip
OMDET = {
    "text_projection_in_dim": 24, "text_projection_out_dim": 24, "class_embed_dim": 24, "task_encoder_hidden_dim": 16,
    "num_queries": 9, "encoder_hidden_dim": 16, "encoder_in_channels": [16, 32, 64], "encoder_attention_heads": 2,
    "vision_features_channels": [16, 16, 16], "encoder_dim_feedforward": 16, "decoder_hidden_dim": 16,
    "decoder_num_heads": 2, "decoder_num_layers": 2, "decoder_dim_feedforward": 16, "image_size": 64,
    "apply_layernorm_after_vision_backbone": False,
}  # fmt: skip
READING_ORDER = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "coordinate_size": 3,
    "shape_size": 2, "max_position_embeddings": 16, "num_classes": 3,
}  # fmt: skip
CLASSES = {"class_thresholds": [0.0] * 3, "class_order": [0, 1, 2]}
MASKS = {
    "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
    "dim_feedforward": 16, "num_queries": 5, "num_labels": 3, "dropout": 0.0,
}  # fmt: skip
TASK_TEXT = {
    "text_encoder_width": 16, "task_seq_len": 6, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 100,
    "text_encoder_context_length": 6, "text_encoder_n_ctx": 2, "query_dec_layers": 1,
}  # fmt: skip

MODELS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "Deformable DETR": ("DeformableDetr", lambda: {**DEFORMABLE, "backbone_config": _resnet()}),
    "Deformable DETR in two stages": (
        "DeformableDetr",
        lambda: {**DEFORMABLE, **TWO_STAGES, "backbone_config": _resnet()},
    ),
    "RT-DETR": ("RTDetr", lambda: {**RT, "backbone_config": _resnet("RTDetrResNetConfig")}),
    "RT-DETRv2": ("RTDetrV2", lambda: {**RT, "backbone_config": _resnet("RTDetrResNetConfig")}),
    "RT-DETRv2 discrete": (
        "RTDetrV2",
        lambda: {**RT, "backbone_config": _resnet("RTDetrResNetConfig"), "decoder_method": "discrete"},
    ),
    "D-FINE": ("DFine", lambda: {**FINE, "backbone_config": _hgnet()}),
    "DEIMv2": ("Deimv2", lambda: {**FINE, "backbone_config": _hgnet()}),
    "Grounding DINO": (
        "GroundingDino",
        lambda: {**DEFORMABLE, **READING, "backbone_config": _swin(), "text_config": _bert()},
    ),
    "MM Grounding DINO": (
        "MMGroundingDino",
        lambda: {**DEFORMABLE, **READING, "backbone_config": _swin(), "text_config": _bert()},
    ),
    "LW-DETR": (
        "LwDetr",
        lambda: {
            **PLAIN,
            "backbone_config": {**VIT, "model_type": "lw_detr_vit", "num_windows": 4, "window_block_indices": [0]},
            "projector_scale_factors": [2.0, 0.5],
            "c2f_num_blocks": 1,
        },
    ),
    "RF-DETR": (
        "RfDetr",
        lambda: {
            **PLAIN,
            "backbone_config": {**VIT, "model_type": "rf_detr_dinov2", "patch_size": 16, "num_windows": 2},
            "dropout": 0.0,
        },
    ),
    "OmDet-Turbo": ("OmDetTurbo", lambda: {**OMDET, "backbone_config": _swin(), "text_config": CLIP}),
    "PP-DocLayoutV2": (
        "PPDocLayoutV2",
        lambda: {**RT, **CLASSES, "backbone_config": _hgnet(), "reading_order_config": READING_ORDER},
    ),
    "PP-DocLayoutV3": ("PPDocLayoutV3", lambda: {**RT, "backbone_config": _hgnet(first=1), "x4_feat_dim": 8}),
    "PP-DocLayoutV4": ("PPDocLayoutV4", lambda: {**RT, "backbone_config": _hgnet()}),
    "Mask2Former": (
        "Mask2Former",
        lambda: {**MASKS, "backbone_config": _swin(first=1), "feature_size": 32, "mask_feature_size": 16},
    ),
    "OneFormer": (
        "OneFormer",
        lambda: {**MASKS, **TASK_TEXT, "backbone_config": _swin(first=1), "conv_dim": 32, "mask_dim": 32},
    ),
}
"""What their classes' names begin with, and the configuration."""


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """The model, in eval mode."""
    import transformers

    start, configuration = MODELS[name]
    end = "ForUniversalSegmentation" if name.endswith("Former") else "ForObjectDetection"
    config = getattr(transformers, start + "Config")(**configuration())
    torch.manual_seed(seed)
    model = getattr(transformers, start + end)(config).eval()
    # Weights that begin as zeros would hide the attention from the results, or its locations from the gradients.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(name: str, count: int = 2, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    """Images, and text for those that read."""
    generator = torch.Generator().manual_seed(1)
    h, w = (64, 64) if name in ("LW-DETR", "RF-DETR", "OmDet-Turbo") else size
    found: dict[str, Tensor] = {"pixel_values": torch.randn((count, 3, h, w), generator=generator)}
    if "Grounding" in name:
        # [CLS] cat . dog . [SEP]
        ids = torch.tensor([[101, 1042, 1012, 1043, 1012, 102]]).expand(count, -1)
        found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if name == "OmDet-Turbo":
        ids = torch.randint(1, 1000, (2 * count, 5), generator=generator)
        found |= {
            "classes_input_ids": ids, "classes_attention_mask": torch.ones_like(ids),
            "classes_structure": torch.full((count,), 2), "tasks_input_ids": ids[:count],
            "tasks_attention_mask": torch.ones_like(ids[:count]),
        }  # fmt: skip
    if name == "OneFormer":
        found["task_inputs"] = torch.randint(0, 100, (count, 6), generator=generator)
    return found


def floats(outputs: Any) -> list[Tensor]:
    """All floating tensors among a model's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for output in outputs for tensor in floats(output)] if isinstance(outputs, (list, tuple)) else []
