"""The official package's builders, by their names: a configuration's name and a checkpoint give a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2.architectures import IMAGE_SIZE, LETTERS, SIZES, VERSIONS, cast, new, version_of
from omniops.sam2.checkpoints import as_dtype, load, require_compiler
from omniops.sam2.overrides import Overrides, parsed, require_feat_sizes
from omniops.sam2.video_predictor import SAM2VideoPredictor

_STABILITY = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_VIDEO = {"fill_hole_area": 8, "binarize_mask_from_pts_for_mem_enc": True}
"""What ``apply_postprocessing`` sets, after all overrides."""


def build_sam2(
    config_file: str,
    ckpt_path: str | PathLike[str] | None = None,
    device: str | torch.device = "auto",
    mode: str = "eval",
    hydra_overrides_extra: Sequence[str] = (),
    apply_postprocessing: bool = True,
    *,
    dtype: str | torch.dtype = "auto",
    image_size: int | None = None,
    compile_encoder: bool = False,
) -> Sam2VideoModel:
    """The model of one of the official package's configurations, as its function of that name.

    Args:
        config_file: ``configs/sam2.1/sam2.1_hiera_t.yaml``, ... of sizes t, s, b+ and l, in ``sam2`` or ``sam2.1``;
            only its name is looked at.
        ckpt_path: as ``load`` takes it; random weights where there is none.
        device, dtype, image_size, compile_encoder: as in ``load``; the official package's results are those of
            ``dtype="float32"``.
        mode: ``eval``, or else the model is left in training mode, where the memory attention has no dropout here.
        hydra_overrides_extra: as ``++model.image_size=512``; docs/sam2.md lists what can be overridden.
        apply_postprocessing: choose among all masks where the single one is not stable, whatever overrides say.

    Raises:
        ValueError: for another name of a configuration, a checkpoint of another size or version than it names, or
            overrides of what cannot be had here.

    Warns:
        UserWarning: where ``apply_postprocessing`` undoes an override.
    """
    overrides = parsed(hydra_overrides_extra, video=False)
    _postprocess(overrides.decoder, _STABILITY, apply_postprocessing)
    return _built(config_file, ckpt_path, device, mode, overrides, dtype, image_size, compile_encoder)


def _postprocess(settings: dict[str, Any], own: dict[str, Any], apply_postprocessing: bool) -> None:
    """Put what postprocessing sets, or its contrary, where overrides have something else or nothing."""
    if apply_postprocessing:
        for name, value in own.items():
            if settings.setdefault(name, value) != value:
                warnings.warn(
                    f"apply_postprocessing sets {name} to {value}, after hydra_overrides_extra, as in the official "
                    "package: pass apply_postprocessing=False to override it",
                    stacklevel=3,
                )
        settings.update(own)


def _built(
    config_file: str,
    ckpt_path: str | PathLike[str] | None,
    device: str | torch.device,
    mode: str,
    overrides: Overrides,
    dtype: str | torch.dtype,
    image_size: int | None,
    compile_encoder: bool,
) -> Sam2VideoModel:
    found = re.fullmatch(r"(?:.*/)?sam2(\.1)?_hiera_(t|s|b\+|l)(?:\.yaml)?", str(config_file))
    if not found:
        raise ValueError(
            "config_file must be a name as configs/sam2.1/sam2.1_hiera_t.yaml, of sizes t, s, b+ or l, got "
            f"{config_file!r}"
        )
    size = next(size for size, letter in LETTERS.items() if letter == found[2])
    version = VERSIONS[found[1] is not None]
    place = devices.pick(device)
    image_size = overrides.image_size if image_size is None else image_size
    compile_encoder = compile_encoder or overrides.compile_encoder
    if ckpt_path is None:
        if compile_encoder:
            require_compiler(place)
        model = cast(
            new(size, version, image_size=IMAGE_SIZE if image_size is None else image_size), as_dtype(dtype, place)
        )
        with devices.exclusive(place):
            model = model.to(place)
        if compile_encoder:
            model.vision_encoder.backbone.compile()
    else:
        model = load(ckpt_path, place, dtype, image_size=image_size, compile_encoder=compile_encoder)
        depth, expected = len(model.vision_encoder.backbone.blocks), sum(SIZES[size].blocks)
        if depth != expected:
            raise ValueError(f"ckpt_path has {depth} blocks of an encoder, config_file {config_file!r} {expected}")
        of = version_of(model)
        if of != version:
            raise ValueError(f"ckpt_path has the weights of version {of}, config_file {config_file!r} is of {version}")
    require_feat_sizes(overrides, int(model.image_size))
    for name, value in overrides.config.items():
        setattr(model.config, name, value)
    for name, value in {"dynamic_multimask_via_stability": False, **overrides.decoder}.items():
        setattr(model.mask_decoder, name, value)
    return model.train(mode != "eval")


def build_sam2_video_predictor(
    config_file: str,
    ckpt_path: str | PathLike[str] | None = None,
    device: str | torch.device = "auto",
    mode: str = "eval",
    hydra_overrides_extra: Sequence[str] = (),
    apply_postprocessing: bool = True,
    vos_optimized: bool = False,
    *,
    dtype: str | torch.dtype = "auto",
    image_size: int | None = None,
    **options: Any,
) -> SAM2VideoPredictor:
    """``build_sam2``'s model in a ``SAM2VideoPredictor``, as the official function of that name.

    Args:
        config_file, ckpt_path, device, mode, dtype, image_size: as in ``build_sam2``.
        hydra_overrides_extra: as in ``build_sam2``, and as ``++model.non_overlap_masks=true``.
        apply_postprocessing: as in ``build_sam2``; and small holes are filled, and masks with prompts remembered as
            they are seen: ``fill_hole_area`` 8 and ``binarize_mask_from_pts_for_mem_enc``.
        vos_optimized: compile the image encoder.
        options: of ``SAM2VideoPredictor``, whatever the arguments above say of them.

    Raises, Warns: as ``build_sam2``.
    """
    overrides = parsed(hydra_overrides_extra, video=True)
    _postprocess(overrides.decoder, _STABILITY, apply_postprocessing)
    _postprocess(overrides.predictor, _VIDEO, apply_postprocessing)
    model = _built(config_file, ckpt_path, device, mode, overrides, dtype, image_size, vos_optimized)
    plain = {"fill_hole_area": 0, "binarize_mask_from_pts_for_mem_enc": False}
    return SAM2VideoPredictor(model, **{**plain, **overrides.predictor, **options})


def build_sam2_hf(model_id: str, **options: Any) -> Sam2VideoModel:
    """``load``, by the official package's name."""
    return load(model_id, **options)


def build_sam2_video_predictor_hf(model_id: str, **options: Any) -> SAM2VideoPredictor:
    """``SAM2VideoPredictor.from_pretrained``, by the official package's name."""
    return SAM2VideoPredictor.from_pretrained(model_id, **options)
