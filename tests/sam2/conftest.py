"""Pairs of models with the same random weights: the official package's, which is the oracle, and this package's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from omniops.sam2.architectures import LETTERS, SIZES, new


class Uninitialised(TorchFunctionMode):
    """Leaves weights uninitialised: drawing random ones takes nearly all of the time in which a model is built."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def uninitialised() -> AbstractContextManager[object]:
    """Within it models are built quickly, with weights that do not matter or are set later."""
    return Uninitialised()


@functools.lru_cache(maxsize=2)  # the large ones are large
def _twins(size: str, version: str, image_size: int, seed: int) -> tuple[Any, Any]:
    build_sam = pytest.importorskip("sam2.build_sam", reason="the oracle: the official package, sam2 from PyPI")
    folder = "sam2" if version == "2.0" else "sam2.1"
    feat_size = image_size // 16
    torch.manual_seed(seed)
    official = build_sam.build_sam2_video_predictor(
        f"configs/{folder}/{folder}_hiera_{LETTERS[size]}.yaml",
        device="cpu",
        hydra_overrides_extra=[
            f"++model.image_size={image_size}",
            *(
                f"++model.memory_attention.layer.{part}_attention.feat_sizes=[{feat_size},{feat_size}]"
                for part in ("self", "cross")
            ),
        ],
    )
    for parameter in official.parameters():
        if not parameter.any():  # which would hide what it is multiplied with
            torch.nn.init.normal_(parameter, std=0.02)
    # Without autocast, and with no pointer beside them, it leaves its memories in bfloat16 and fails.
    official.memory_attention.register_forward_pre_hook(_memory_in_float32, with_kwargs=True)
    with Uninitialised():
        ours = new(size, version, image_size=image_size)
    ours.load_state_dict(official.state_dict())
    return official, ours


def _memory_in_float32(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "memory": kwargs["memory"].float()}


@pytest.fixture(scope="session")
def twins() -> Callable[..., tuple[Any, Any]]:
    """The official model, which is a video predictor too, and ours."""

    def make(size: str = "tiny", version: str = "2.1", image_size: int = 128, seed: int = 0) -> tuple[Any, Any]:
        return _twins(size, version, image_size, seed)

    return make


def _transformers_model(size: str, version: str, image_size: int) -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle of folders: transformers")
    sizes = SIZES[size]
    widths = [sizes.embed_dim * 2**stage for stage in range(4)]
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=sizes.embed_dim,
        num_attention_heads=sizes.num_heads,
        image_size=[image_size, image_size],
        window_positional_embedding_background_size=list(sizes.window_pos_embed_bkg_spatial_size),
        blocks_per_stage=list(sizes.stages),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[sizes.num_heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(sizes.window_spec),
        global_attention_blocks=list(sizes.global_att_blocks),
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[image_size // stride] * 2 for stride in (4, 8, 16)],
    )
    config = transformers.Sam2VideoConfig(
        vision_config=vision,
        image_size=image_size,
        memory_attention_rope_feat_sizes=[image_size // 16] * 2,
        enable_occlusion_spatial_embedding=version == "2.1",
        enable_temporal_pos_encoding_for_object_pointers=version == "2.1",
    )
    config.prompt_encoder_config.image_size = image_size
    return transformers.Sam2VideoModel(config).eval()


@functools.lru_cache(maxsize=2)
def _transformers_model_with_weights(*arguments: Any) -> Any:
    torch.manual_seed(0)
    model = _transformers_model(*arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    return model


@pytest.fixture(scope="session")
def transformers_model() -> Callable[..., Any]:
    """transformers' ``Sam2VideoModel`` with random weights; or on the meta device, without."""

    def make(size: str = "tiny", version: str = "2.1", image_size: int = 64, *, on_meta: bool = False) -> Any:
        make_model = _transformers_model if on_meta else _transformers_model_with_weights
        return make_model(size, version, image_size)

    return make
