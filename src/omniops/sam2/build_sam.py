"""The official package's builders, by their names: a configuration's name and a checkpoint give a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from omniops import device as devices
from omniops.sam2.architectures import IMAGE_SIZE, LETTERS, SIZES, VERSIONS, cast, new
from omniops.sam2.checkpoints import load, require_compiler, to_torch_dtype
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.overrides import Overrides, parse_overrides, require_feat_sizes
from omniops.sam2.video_predictor import SAM2VideoPredictor

_MULTIMASK_STABILITY = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_VIDEO_POSTPROCESSING = {"fill_hole_area": 8, "binarize_mask_from_pts_for_mem_enc": True}
"""These two are what ``apply_postprocessing`` sets, after all overrides."""


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
) -> SAM2Base:
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
            overrides that are not supported here.

    Warns:
        UserWarning: where ``apply_postprocessing`` undoes an override.

    Example:
        >>> model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", ckpt_path=None, device="cpu", image_size=64)
        >>> model.training
        False
    """
    overrides = parse_overrides(hydra_overrides_extra, video=False)
    if apply_postprocessing:
        _apply_postprocessing(overrides.decoder, _MULTIMASK_STABILITY)
    return _build(config_file, ckpt_path, device, mode, overrides, dtype, image_size, compile_encoder)


def _apply_postprocessing(settings: dict[str, Any], postprocessing: dict[str, Any]) -> None:
    """Set what postprocessing sets, with a warning for each override that says otherwise."""
    for name, value in postprocessing.items():
        if settings.setdefault(name, value) != value:
            warnings.warn(
                f"apply_postprocessing sets {name} to {value}, after hydra_overrides_extra, as in the official "
                "package: pass apply_postprocessing=False to override it",
                stacklevel=3,
            )
    settings.update(postprocessing)


def _build(
    config_file: str,
    ckpt_path: str | PathLike[str] | None,
    device: str | torch.device,
    mode: str,
    overrides: Overrides,
    dtype: str | torch.dtype,
    image_size: int | None,
    compile_encoder: bool,
) -> SAM2Base:
    match = re.fullmatch(r"(?:.*/)?sam2(\.1)?_hiera_(t|s|b\+|l)(?:\.yaml)?", str(config_file))
    if not match:
        raise ValueError(
            "config_file must be a name as configs/sam2.1/sam2.1_hiera_t.yaml, of sizes t, s, b+ or l, got "
            f"{config_file!r}"
        )
    size = next(size for size, letter in LETTERS.items() if letter == match[2])
    version = VERSIONS[match[1] is not None]
    target = devices.pick(device)
    image_size = overrides.image_size if image_size is None else image_size
    compile_encoder = compile_encoder or overrides.compile_encoder
    if ckpt_path is None:
        if compile_encoder:
            require_compiler(target)
        model = new(size, version, image_size=IMAGE_SIZE if image_size is None else image_size)
        cast(model, to_torch_dtype(dtype, target))
        with devices.exclusive(target):
            model = model.to(target)
        if compile_encoder:
            model.image_encoder.trunk.compile()
    else:
        model = load(ckpt_path, target, dtype, image_size=image_size, compile_encoder=compile_encoder)
        depth, expected = len(model.image_encoder.trunk.blocks), sum(SIZES[size].stages)
        if depth != expected:
            raise ValueError(f"ckpt_path has {depth} blocks of an encoder, config_file {config_file!r} {expected}")
        if model.version != version:
            raise ValueError(
                f"ckpt_path has the weights of version {model.version}, config_file {config_file!r} is of {version}"
            )
    require_feat_sizes(overrides, model.image_size)
    for name, value in overrides.model.items():
        setattr(model, name, value)
    for name, value in {"dynamic_multimask_via_stability": False, **overrides.decoder}.items():
        setattr(model.sam_mask_decoder, name, value)
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
        apply_postprocessing: as in ``build_sam2``; and small holes are filled, and the masks of prompts are binary for
            the memory encoder: ``fill_hole_area`` 8 and ``binarize_mask_from_pts_for_mem_enc``.
        vos_optimized: compile the image encoder.
        options: of ``SAM2VideoPredictor``, whatever the arguments above say of them.

    Raises, Warns: as ``build_sam2``.

    Example:
        >>> config = "configs/sam2.1/sam2.1_hiera_t.yaml"
        >>> predictor = build_sam2_video_predictor(config, device="cpu", image_size=64, fill_hole_area=0)
        >>> predictor.fill_hole_area
        0
    """
    overrides = parse_overrides(hydra_overrides_extra, video=True)
    if apply_postprocessing:
        _apply_postprocessing(overrides.decoder, _MULTIMASK_STABILITY)
        _apply_postprocessing(overrides.predictor, _VIDEO_POSTPROCESSING)
    model = _build(config_file, ckpt_path, device, mode, overrides, dtype, image_size, vos_optimized)
    defaults = {"fill_hole_area": 0, "binarize_mask_from_pts_for_mem_enc": False}
    return SAM2VideoPredictor(model, **{**defaults, **overrides.predictor, **options})


def build_sam2_hf(model_id: str, **options: Any) -> SAM2Base:
    """``load``, by the official package's name.

    Example:
        >>> model = build_sam2_hf("facebook/sam2.1-hiera-tiny")  # needs: the network
    """
    return load(model_id, **options)


def build_sam2_video_predictor_hf(model_id: str, **options: Any) -> SAM2VideoPredictor:
    """``SAM2VideoPredictor.from_pretrained``, by the official package's name.

    Example:
        >>> predictor = build_sam2_video_predictor_hf("facebook/sam2.1-hiera-tiny")  # needs: the network
    """
    return SAM2VideoPredictor.from_pretrained(model_id, **options)
