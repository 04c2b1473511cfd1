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

pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")

from omniops.sam2.architectures import LETTERS, new
from omniops.sam2.checkpoints import from_meta


class Uninitialised(TorchFunctionMode):
    """Leaves weights as memory holds them: to draw random ones takes most of the time in which a model is built."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def uninitialised() -> AbstractContextManager[object]:
    """Within it models are built quickly, whose weights nobody looks at or sets later."""
    return Uninitialised()


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
    with Uninitialised():
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
