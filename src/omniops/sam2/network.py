"""The parts of transformers' SAM 2 in the order in which every predictor runs them: image -> features -> masks.

Transformers' own forward methods pad prompts, choose masks and store memories in ways that differ from the official
package; what is here calls the modules that hold the weights, and decides nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2.mask_decoder import decode_masks

LARGEST_LOGIT = 32.0
"""Of masks that the model is given to start from, as it was trained."""
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What the image encoder makes of N images of side S."""

    embedding: Tensor
    """(N, 256, S/16, S/16), as ``encode`` gives it without the embedding that says that there is no memory."""
    fine: tuple[Tensor, Tensor]
    """(N, 32, S/4, S/4) and (N, 64, S/8, S/8), what the mask decoder adds for sharp edges."""
    places: Tensor
    """(1, 256, S/16, S/16), the random Fourier features of each place, which prompts are told in too."""

    def of(self, image: int) -> Features:
        """Those of one image."""
        one = slice(image, image + 1)
        return Features(self.embedding[one], (self.fine[0][one], self.fine[1][one]), self.places)


class Masks(NamedTuple):
    """What the mask decoder makes of B prompts, M masks each: 3 of multimask, else 1."""

    logits: Tensor
    """(B, M, S/4, S/4)"""
    scores: Tensor
    """(B, M), the predicted IoU."""
    tokens: Tensor
    """(B, M, 256), what pointers to the object are made of."""
    object_logits: Tensor
    """(B, 1), above 0 where the object is in the image."""


def precision(model: Sam2VideoModel) -> AbstractContextManager[object]:
    """Autocast to the dtype of a model that was loaded in half precision; nothing of its own for one in float32."""
    return devices.autocast(model.device, model.vision_encoder.dtype)


def normalised(images: Tensor) -> Tensor:
    """(N, 3, S, S) from 0 to 1 -> what the encoder takes."""
    mean, std = (sent(torch.tensor(each, dtype=images.dtype), images.device)[:, None, None] for each in (_MEAN, _STD))
    return (images - mean) / std


def sent(few: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on the device. CUDA puts so little aside at once, so that nothing is waited for."""
    return few.to(device, non_blocking=device.type == "cuda")


def encode(model: Sam2VideoModel, pixels: Tensor) -> Features:
    """The features of normalised (N, 3, S, S)."""
    encoder, decoder = model.vision_encoder, model.mask_decoder
    lateral = encoder.neck.convs  # from the coarsest to the finest
    finest, fine, coarse, coarsest = (
        stage.permute(0, 3, 1, 2) for stage in encoder.backbone(pixels).intermediate_hidden_states
    )
    # As transformers' neck, whose top-down path joins the two coarsest stages alone, but without the position encodings
    # of all stages, which nothing here needs, and without maps of 256 channels where the decoder takes 32 and 64.
    embedding = lateral[1](coarse) + F.interpolate(lateral[0](coarsest), scale_factor=2.0, mode="nearest")
    return Features(
        embedding,
        (_both(finest, lateral[3], decoder.conv_s0), _both(fine, lateral[2], decoder.conv_s1)),
        model.get_image_wide_positional_embeddings(),
    )


def _both(x: Tensor, first: nn.Conv2d, second: nn.Conv2d) -> Tensor:
    """Two 1x1 convolutions as one."""
    outer = second.weight.flatten(1)
    weight = outer @ first.weight.flatten(1)
    bias = outer @ first.bias + second.bias  # type: ignore[operator]  # which every convolution here has
    return F.conv2d(x, weight[..., None, None], bias)


def without_memory(model: Sam2VideoModel, embedding: Tensor) -> Tensor:
    """The embedding of an image on its own, or of a frame that has no memory to look at."""
    nothing: Tensor = model.no_memory_embedding
    return embedding + nothing.reshape(1, -1, 1, 1)


def decode(
    model: Sam2VideoModel,
    features: Features,
    embedding: Tensor,
    points: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    multimask: bool,
) -> Masks:
    """The masks of B prompts.

    Args:
        features: of 1 image, or of B.
        embedding: (1 or B, 256, S/16, S/16), that of the features, conditioned on a memory or on there being none.
        points: (B, P, 2), x and y in pixels of the resized image.
        labels: (B, P): 1 foreground, 0 background, 2 and 3 the corners of a box, -1 a place to ignore.
        mask: (B, 1, S/4, S/4), logits.
        multimask: three masks, else one: the model's choice among all where its single mask is not stable.
    """
    encoder = model.prompt_encoder
    if points is not None and labels is not None:
        sparse = encoder(points[:, None], labels[:, None], None, None)[0].squeeze(1)
    else:
        sparse = embedding.new_zeros(1 if mask is None else len(mask), 0, embedding.shape[1])
    dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1) if mask is None else encoder.mask_embed(mask)
    image = (embedding + dense).expand(len(sparse), -1, -1, -1)
    if image.device.type == "mps":  # which may get matrix products of expanded tensors wrong (pytorch issue 180201)
        image = image.contiguous()
    return Masks(*decode_masks(model.mask_decoder, image, features.places, features.fine, sparse, multimask=multimask))
