"""The losses of a batch of pictures, and of a clip whose frames attend to the memories of those before."""

from __future__ import annotations

from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.layers import project_rows
from omniops.sam2.modeling.mask_decoder import Masks
from omniops.sam2.modeling.prompt_encoder import NOT_A_POINT
from omniops.sam2.modeling.sam2 import LARGEST_LOGIT, NO_OBJ_SCORE, ImageFeatures, SAM2Base
from omniops.sam2.training.losses import Losses, sam2_losses
from omniops.sam2.training.sampling import box_points, corrective_points, sample_points

PROMPTS = ("point", "box", "mask")


def image_step(
    model: SAM2Base,
    images: Tensor,
    targets: Tensor,
    prompt: str = "point",
    corrections: int = 1,
    generator: torch.Generator | None = None,
) -> Losses:
    """The loss of B pictures with an object each.

    Args:
        model: in training mode, in float32.
        images: (B, 3, S, S), of ``normalize``.
        targets: (B, S, S), 0 and 1.
        prompt: the first, ``point``, ``box`` or ``mask``.
        corrections: clicks where the mask is wrong, each of which the loss is of too.
        generator: of the CPU, that draws the clicks.

    Raises:
        ValueError: for another prompt.
    """
    features = model.forward_image(images)
    embed = model.add_no_mem_embed(features.image_embed)
    found = _interact(model, features, embed, targets, prompt, corrections, generator)
    return _mean([sam2_losses(masks, targets) for masks in found])


def clip_step(
    model: SAM2Base,
    frames: Tensor,
    targets: Tensor,
    prompt: str = "point",
    corrections: int = 0,
    generator: torch.Generator | None = None,
) -> Losses:
    """The loss of T frames with B objects: prompted on the first, tracked on the others.

    Args:
        model, prompt, corrections, generator: as in ``image_step``.
        frames: (T, 3, S, S), of ``normalize``.
        targets: (T, B, S, S), 0 and 1.
    """
    features = model.forward_image(frames)
    losses: list[Losses] = []
    memories: list[Tensor] = []
    pointers: list[Tensor] = []
    for t, expected in enumerate(targets):
        frame = features.of(t)
        if t == 0:
            embed = model.add_no_mem_embed(frame.image_embed)
            found = _interact(model, frame, embed, expected, prompt, corrections, generator)
        else:
            recent = [0, *range(max(1, t - model.num_maskmem + 1), t)]
            index, times = model.encode_times(
                [t - i if i else 0 for i in recent], [t - i for i in recent], len(frames) - 1
            )
            embed = model.prepare_memory_conditioned_features(
                frame.image_embed,
                torch.stack([memories[i] for i in recent]),
                index,
                torch.stack([pointers[i] for i in recent]),
                times,
            )
            nothing = (
                expected.new_zeros(len(expected), 1, 2),
                expected.new_full((len(expected), 1), NOT_A_POINT).int(),
            )
            found = [model.predict_masks(frame, embed, *nothing, None, multimask_output=True)]
        losses += [sam2_losses(masks, expected) for masks in found]
        logits, pointer = _choose(model, found[-1])
        score = found[-1].object_score_logits
        memories.append(model.encode_new_memory(frame.image_embed, logits, score, is_mask_from_pts=False))
        pointers.append(pointer)
    return _mean(losses)


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the weights as Meta's checkpoints have them, for ``omniops.sam2.load`` and the official package."""
    torch.save({"model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}}, path)


def _interact(
    model: SAM2Base,
    features: ImageFeatures,
    embed: Tensor,
    targets: Tensor,
    prompt: str,
    corrections: int,
    generator: torch.Generator | None,
) -> list[Masks]:
    """The masks of the first prompt and of each correction."""
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    mask_input = None
    if prompt == "box":
        coords, labels = box_points(targets)
    else:
        coords = sample_points(targets > 0.5, generator)
        # A click beside an object that is not there is one outside of it.
        labels = targets.flatten(1).any(dim=1, keepdim=True).int()
        if prompt == "mask":
            labels = torch.full_like(labels, NOT_A_POINT)
    if prompt == "mask":
        mask_input = model.mask_downsample(targets[:, None].float()).float()
    found = []
    for step in range(corrections + 1):
        several = step == 0 and prompt == "point"
        masks = model.predict_masks(features, embed, coords, labels, mask_input, multimask_output=several)
        found.append(masks)
        if step < corrections:
            best = _best(masks)
            mask_input = best.detach().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            logits = F.interpolate(mask_input, targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            point, label_of_point = corrective_points(logits, targets, generator)
            coords, labels = torch.cat((coords, point), dim=1), torch.cat((labels, label_of_point), dim=1)
    return found


def _best(masks: Masks) -> Tensor:
    """(B, 1, S/4, S/4), of the highest predicted IoU."""
    objects = torch.arange(len(masks.ious), device=masks.ious.device)
    return masks.low_res_masks[objects, masks.ious.argmax(dim=1)][:, None].float()


def _choose(model: SAM2Base, masks: Masks) -> tuple[Tensor, Tensor]:
    """What later frames are given: the logits and the object pointers of B objects."""
    objects = torch.arange(len(masks.ious), device=masks.ious.device)
    pointer = project_rows(model.obj_ptr_proj, masks.sam_output_tokens[objects, masks.ious.argmax(dim=1)])
    is_there = masks.object_score_logits > 0
    logits = torch.where(is_there[..., None, None], _best(masks), NO_OBJ_SCORE)
    return logits, torch.where(is_there, pointer, model.no_obj_ptr)


def _mean(losses: list[Losses]) -> Losses:
    return Losses(*(torch.stack(values).mean() for values in zip(*losses, strict=True)))
