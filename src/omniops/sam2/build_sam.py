"""The official package's builders, by their names: a configuration's name and a checkpoint give a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2.architectures import IMAGE_SIZE, LETTERS, SIZES, VERSIONS, cast, new
from omniops.sam2.checkpoints import as_dtype, load, require_compiler
from omniops.sam2.video_predictor import SAM2VideoPredictor


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
        hydra_overrides_extra: must be empty: there is no configuration to override.
        apply_postprocessing: choose among all masks where the single one is not stable.

    Raises:
        ValueError: for another name of a configuration, a checkpoint of another than it names, or overrides.
    """
    if list(hydra_overrides_extra):
        raise ValueError(
            f"hydra_overrides_extra must be empty, got {list(hydra_overrides_extra)}: image_size and the predictors' "
            "arguments say what it could"
        )
    found = re.fullmatch(r"(?:.*/)?sam2(\.1)?_hiera_(t|s|b\+|l)(?:\.yaml)?", str(config_file))
    if not found:
        raise ValueError(
            "config_file must be a name as configs/sam2.1/sam2.1_hiera_t.yaml, of sizes t, s, b+ or l, got "
            f"{config_file!r}"
        )
    size = next(size for size, letter in LETTERS.items() if letter == found[2])
    version = VERSIONS[found[1] is not None]
    place = devices.pick(device)
    if ckpt_path is None:
        if compile_encoder:
            require_compiler(place)
        model = cast(new(size, version, image_size=image_size or IMAGE_SIZE), as_dtype(dtype, place))
        with devices.exclusive(place):
            model = model.to(place)
        if compile_encoder:
            model.vision_encoder.backbone.compile()
    else:
        model = load(ckpt_path, place, dtype, image_size=image_size, compile_encoder=compile_encoder)
        depth, expected = len(model.vision_encoder.backbone.blocks), sum(SIZES[size].blocks)
        if depth != expected:
            raise ValueError(f"ckpt_path has {depth} blocks of an encoder, config_file {config_file!r} {expected}")
    model.mask_decoder.dynamic_multimask_via_stability = apply_postprocessing
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
        config_file, ckpt_path, device, mode, hydra_overrides_extra, dtype, image_size: as in ``build_sam2``.
        apply_postprocessing: as in ``build_sam2``; and small holes are filled.
        vos_optimized: compile the image encoder.
        options: of ``SAM2VideoPredictor``.
    """
    model = build_sam2(
        config_file,
        ckpt_path,
        device,
        mode,
        hydra_overrides_extra,
        apply_postprocessing,
        dtype=dtype,
        image_size=image_size,
        compile_encoder=vos_optimized,
    )
    return SAM2VideoPredictor(model, **{"fill_hole_area": 8 if apply_postprocessing else 0, **options})


def build_sam2_hf(model_id: str, **options: Any) -> Sam2VideoModel:
    """``load``, by the official package's name."""
    return load(model_id, **options)


def build_sam2_video_predictor_hf(model_id: str, **options: Any) -> SAM2VideoPredictor:
    """``SAM2VideoPredictor.from_pretrained``, by the official package's name."""
    return SAM2VideoPredictor.from_pretrained(model_id, **options)
