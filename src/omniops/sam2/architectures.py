"""SAM 2's four sizes and two versions: models of them, and how a checkpoint's tensors tell them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omniops.sam2.arguments import check_int
from omniops.sam2.modeling.hiera import HieraSize
from omniops.sam2.modeling.sam2 import SAM2Base

IMAGE_SIZE = 1024
"""The side in pixels of the square that images are resized to."""
SIZES = {
    "tiny": HieraSize(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": HieraSize(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base-plus": HieraSize(112, 2, (2, 3, 16, 3), (12, 16, 20), window_pos_embed_bkg_spatial_size=(14, 14)),
    "large": HieraSize(144, 2, (2, 6, 36, 4), (23, 33, 43), window_spec=(8, 4, 16, 8)),
}
LETTERS = dict(zip(SIZES, ("t", "s", "b+", "l"), strict=True))
"""How the official package's configurations call the sizes."""
VERSIONS = ("2.0", "2.1")
"""In 2.1 memories say whether the object is hidden, and object pointers have a temporal position."""


def new(size: str, version: str = "2.1", *, image_size: int = IMAGE_SIZE) -> SAM2Base:
    """A model of random weights in float32 on the CPU, in evaluation mode.

    Args:
        size: one of ``SIZES``.
        version: one of ``VERSIONS``.
        image_size: the side of the square that images are resized to, a multiple of 32. The published weights are
            trained for 1024; less is faster and coarser.

    Raises:
        TypeError: for an image_size that is no integer.
        ValueError: for another size or version, or such an image_size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return SAM2Base(SIZES[size], version, check_image_size(image_size)).eval()


def check_image_size(image_size: object) -> int:
    """The side of the square that images are resized to, as an int.

    Raises:
        TypeError: for what is no integer.
        ValueError: for what is no positive multiple of 32.
    """
    side = check_int("image_size", image_size)
    if side < 32 or side % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, got {side}")
    return side


def cast(model: SAM2Base, dtype: torch.dtype) -> SAM2Base:
    """The model with weights in that dtype wherever ``autocast`` would cast them at each call.

    That is the whole image encoder, and of the other modules the linear layers and convolutions; the rest stays in
    float32.
    """
    model.image_encoder.to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.to(dtype)
    return model


def recognize(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The size and the version of a model, from the tensors of Meta's checkpoint.

    Raises:
        ValueError: for tensors of something else.
    """
    blocks = {int(match[1]) for name in state if (match := re.match(r"image_encoder\.trunk\.blocks\.(\d+)\.", name))}
    position = state.get("image_encoder.trunk.pos_embed")
    shape = tuple(position.shape) if position is not None else ()
    for name, size in SIZES.items():
        depth, expected = sum(size.stages), (1, size.embed_dim, *size.window_pos_embed_bkg_spatial_size)
        if blocks == set(range(depth)) and shape == expected:
            return name, "2.1" if "no_obj_embed_spatial" in state else "2.0"
    raise ValueError(
        f"not a checkpoint of SAM 2 ({', '.join(SIZES)}): it has {len(state)} tensors, "
        f"{len(blocks)} blocks in image_encoder.trunk and a pos_embed of {shape or 'no'} shape there; "
        f"the first names are {', '.join(list(state)[:4])}"
    )
