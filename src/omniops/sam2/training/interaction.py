"""Objects on one frame: a first prompt, then clicks where the mask is wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.sam2.modeling.mask_decoder import Masks
from omniops.sam2.modeling.sam2 import LARGEST_LOGIT, ImageFeatures, SAM2Base, SAMOutput
from omniops.sam2.training.sampling import box_points, corrective_points, sample_points


class Prompt(NamedTuple):
    """Of B objects; all None where they are tracked."""

    point_coords: Tensor | None = None
    """(B, P, 2)"""
    point_labels: Tensor | None = None
    """(B, P)"""
    mask_input: Tensor | None = None
    """(B, 1, S/4, S/4), what the decoder starts from."""


class Clicks(NamedTuple):
    """How results are corrected."""

    number: int
    prob_to_sample_from_gt: float = 0.0
    generator: torch.Generator | None = None


def first_prompt(model: SAM2Base, targets: Tensor, prompt: str, generator: torch.Generator | None) -> Prompt:
    """A point, the box or the mask of each of (B, S, S) targets."""
    if prompt == "mask":
        return Prompt(mask_input=model.mask_downsample(targets[:, None]).float())
    if prompt == "box":
        return Prompt(*box_points(targets))
    # A click beside an object that is not there is one outside of it.
    is_there = targets.flatten(1).any(dim=1, keepdim=True)
    return Prompt(sample_points(targets > 0.5, generator), is_there.int())


def interact(
    model: SAM2Base, features: ImageFeatures, image_embed: Tensor, targets: Tensor, prompt: Prompt, clicks: Clicks
) -> tuple[list[Masks], SAMOutput]:
    """The masks after the prompt and after each click, and the object as later frames are given it, after the last."""
    coords, labels, mask_input = prompt
    several = mask_input is None
    found = []
    for remaining in range(clicks.number, -1, -1):
        masks, output = model.forward_sam_heads_with_masks(
            features, image_embed, coords, labels, mask_input, multimask_output=several
        )
        found.append(masks)
        if remaining:
            mask_input = output.low_res_masks.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            point, label = _click(mask_input.detach(), targets, clicks)
            coords = point if coords is None else torch.cat((coords, point), dim=1)
            labels = label if labels is None else torch.cat((labels, label), dim=1)
    return found, output


def _click(logits: Tensor, targets: Tensor, clicks: Clicks) -> tuple[Tensor, Tensor]:
    generator, probability = clicks.generator, clicks.prob_to_sample_from_gt
    if probability and torch.rand((), generator=generator).item() < probability:
        return corrective_points(torch.full_like(targets, -1), targets, generator)
    upsampled = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return corrective_points(upsampled, targets, generator)
