"""Hydra's overrides of the official package's configurations, as arguments of the models and predictors here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_PREDICTOR = {
    "fill_hole_area": int,
    "non_overlap_masks": bool,
    "clear_non_cond_mem_around_input": bool,
    "add_all_frames_to_correct_as_cond": bool,
}
"""Arguments of the video predictor, as in the official package."""
_MEMORY = {"binarize_mask_from_pts_for_mem_enc": bool, "max_cond_frames_in_attn": int}
"""Arguments of every model in the official package, without effect on pictures; of the video predictor here."""
_BUILD = {"image_size": int, "compile_image_encoder": bool}
_EXTRA = "sam_mask_decoder_extra_args."
_DECODER = {
    f"{_EXTRA}dynamic_multimask_via_stability": bool,
    f"{_EXTRA}dynamic_multimask_stability_delta": float,
    f"{_EXTRA}dynamic_multimask_stability_thresh": float,
}
_MODEL = {
    "sigmoid_scale_for_mem_enc": float,
    "sigmoid_bias_for_mem_enc": float,
    "multimask_min_pt_num": int,
    "multimask_max_pt_num": int,
    "max_obj_ptrs_in_encoder": int,
}
"""Attributes of the model."""
_FIXED: dict[str, tuple[Any, ...]] = {
    # The official predictor encodes the memories of one object at a time, whose masks cannot overlap.
    "non_overlap_masks_for_mem_enc": (False, True),
    "use_mask_input_as_output_without_sam": (True,),
    "directly_add_no_mem_embed": (True,),
    "use_high_res_features_in_sam": (True,),
    "multimask_output_in_sam": (True,),
    "multimask_output_for_tracking": (True,),
    "use_multimask_token_for_obj_ptr": (True,),
    "iou_prediction_use_sigmoid": (True,),
    "use_obj_ptrs_in_encoder": (True,),
    "only_obj_ptrs_in_the_past_for_eval": (True,),
    "pred_obj_scores": (True,),
    "pred_obj_scores_mlp": (True,),
    "fixed_no_obj_ptr": (True,),
    "soft_no_obj_ptr": (False,),
    "use_mlp_for_obj_ptr_proj": (True,),
    "memory_temporal_stride_for_eval": (1,),
    "num_maskmem": (7,),
}
"""Settings that the model here has fixed to those of the published configurations."""
_FEAT_SIZES = ("memory_attention.layer.self_attention.feat_sizes", "memory_attention.layer.cross_attention.feat_sizes")
"""Settings that have to change with ``image_size``."""


@dataclass
class Overrides:
    """Overrides, by what they change."""

    predictor: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``SAM2VideoPredictor``."""
    model: dict[str, Any] = field(default_factory=dict)
    """Attributes of the model."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Attributes of the mask decoder."""
    image_size: int | None = None
    compile_encoder: bool = False
    feat_sizes: Any = None


def parse_overrides(overrides: Iterable[str], *, video: bool) -> Overrides:
    """The overrides of a video predictor or of a model for pictures; the last counts where one is repeated.

    Raises:
        TypeError: for anything else than a list of str.
        ValueError: for anything else than an override of the model, or one that is not supported here, by its name.
    """
    if isinstance(overrides, str):
        raise TypeError(f"hydra_overrides_extra must be a list of str, got the str {overrides!r}")
    found = Overrides()
    for override in overrides:
        if not isinstance(override, str):
            raise TypeError(f"hydra_overrides_extra must be a list of str, got {type(override).__name__} in it")
        name, value = _split(override)
        if name in _MEMORY or (video and name in _PREDICTOR):
            found.predictor[name] = _check_type(override, value, {**_PREDICTOR, **_MEMORY}[name])
        elif name in _DECODER:
            found.decoder[name.removeprefix(_EXTRA)] = _check_type(override, value, _DECODER[name])
        elif name in _MODEL:
            found.model[name] = _check_type(override, value, _MODEL[name])
        elif name == "image_size":
            found.image_size = _check_type(override, value, int)
        elif name == "compile_image_encoder":
            found.compile_encoder = _check_type(override, value, bool)
        elif name in _FEAT_SIZES:
            found.feat_sizes = value
        elif name in _FIXED:
            _require_fixed(override, value, _FIXED[name])
        else:
            raise ValueError(
                f"hydra_overrides_extra cannot have {override!r} here: of model. it takes {', '.join(_names(video))}"
            )
    return found


def require_feat_sizes(overrides: Overrides, image_size: int) -> None:
    """Raise ValueError where feat_sizes are not those of the image size."""
    expected = [image_size // 16] * 2
    if overrides.feat_sizes not in (None, expected):
        raise ValueError(
            f"hydra_overrides_extra has feat_sizes of {overrides.feat_sizes}, where image_size {image_size} has "
            f"{expected}"
        )


def _names(video: bool) -> list[str]:
    video_names = {**_PREDICTOR, **_MEMORY} if video else _MEMORY
    return [*video_names, *_BUILD, *_DECODER, *_MODEL, *_FEAT_SIZES, *_FIXED]


def _split(override: str) -> tuple[str, Any]:
    match = re.fullmatch(r"\s*(?:\+\+|\+)?model\.([\w.]+)\s*=\s*(.*?)\s*", override)
    if not match:
        raise ValueError(
            "hydra_overrides_extra must hold overrides of the model, as ++model.non_overlap_masks=true, got "
            f"{override!r}"
        )
    return match[1], _parse_value(match[2])


def _parse_value(text: str) -> Any:
    """The value of an override, as Hydra reads it."""
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text


def _check_type(override: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"hydra_overrides_extra has {override!r}, which must be of {kind.__name__}")
    return value


def _require_fixed(override: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(fixed) and value == fixed for fixed in allowed):
        raise ValueError(
            f"hydra_overrides_extra cannot have {override!r} here: every model has {' or '.join(map(str, allowed))}"
        )
