"""Pairs of models with the same random weights: the official package's, which is the oracle, and this package's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")

from omniops.sam2.architectures import LETTERS, new
from omniops.sam2.checkpoints import from_meta


@functools.lru_cache(maxsize=2)  # the large ones are large
def _twins(size: str, version: str, image_size: int, seed: int) -> tuple[Any, Any]:
    build_sam = pytest.importorskip("sam2.build_sam", reason="the oracle: the official package, sam2 from PyPI")
    folder = "sam2" if version == "2.0" else "sam2.1"
    places = image_size // 16
    torch.manual_seed(seed)
    official = build_sam.build_sam2_video_predictor(
        f"configs/{folder}/{folder}_hiera_{LETTERS[size]}.yaml",
        device="cpu",
        hydra_overrides_extra=[
            f"++model.image_size={image_size}",
            *(
                f"++model.memory_attention.layer.{part}_attention.feat_sizes=[{places},{places}]"
                for part in ("self", "cross")
            ),
        ],
    )
    for parameter in official.parameters():
        if not parameter.any():  # which would hide what it is multiplied with
            torch.nn.init.normal_(parameter, std=0.02)
    # Without autocast, and with no pointer beside them, it leaves its memories in bfloat16 and fails.
    official.memory_attention.register_forward_pre_hook(_memory_in_float32, with_kwargs=True)
    ours = new(size, version, image_size=image_size)
    ours.load_state_dict(from_meta(official.state_dict()))
    return official, ours


def _memory_in_float32(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "memory": kwargs["memory"].float()}


@pytest.fixture(scope="session")
def twins() -> Callable[..., tuple[Any, Any]]:
    """The official model, which is a video predictor too, and ours."""

    def make(size: str = "tiny", version: str = "2.1", image_size: int = 128, seed: int = 0) -> tuple[Any, Any]:
        return _twins(size, version, image_size, seed)

    return make
