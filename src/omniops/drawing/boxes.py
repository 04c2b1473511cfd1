"""Detections as they are shown: masks, boxes, and what they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from omniops.drawing.masks import colour_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def draw_detections(picture: Image, detections: Mapping[str, Tensor], names: Sequence[str]) -> Image:
    """The picture with the detections drawn on it, the first, which is the surest, on top.

    Args:
        picture: in RGB.
        detections: as torchvision's detectors give them, on the CPU: ``boxes`` (N, 4), ``labels`` (N), ``scores`` (N)
            and perhaps ``masks`` (N, 1, H, W), boolean.
        names: what is written at each box, beside the score.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> box = {"boxes": torch.tensor([[20.0, 40, 90, 80]]), "labels": torch.tensor([8]), "scores": torch.ones(1)}
        >>> picture = draw_detections(Image.new("RGB", (100, 100)), box, ["truck"])
        >>> picture.getpixel((20, 60)) == colour_of(8)
        True
    """
    from PIL import Image, ImageDraw, ImageFont

    colours = [colour_of(label) for label in detections["labels"].tolist()]
    if "masks" in detections:
        pixels = np.array(picture)
        for mask, colour in reversed(list(zip(detections["masks"][:, 0].numpy(), colours, strict=True))):
            rows = np.flatnonzero(mask.any(axis=1))
            around = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0)  # to look through few of the pixels
            part, inside = pixels[around], mask[around]
            part[inside] = (part[inside] * 0.5 + np.multiply(colour, 0.5)).astype(np.uint8)
        picture = Image.fromarray(pixels)
    drawing = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, max(picture.size) // 70))
    width = max(1, max(picture.size) // 400)
    drawn = list(zip(detections["boxes"].tolist(), detections["scores"].tolist(), names, colours, strict=True))
    for box, score, name, colour in reversed(drawn):
        drawing.rectangle(box, outline=colour, width=width)
        text = f"{name} {score:.2f}"
        left, top, right, bottom = drawing.textbbox((0, 0), text, font)
        # Over the box, or in it where there is no room.
        corner = (box[0], max(0, box[1] - bottom + top - 2))
        drawing.rectangle((*corner, corner[0] + right - left + 4, corner[1] + bottom - top + 2), fill=colour)
        drawing.text((corner[0] + 2 - left, corner[1] + 1 - top), text, fill="black", font=font)
    return picture
