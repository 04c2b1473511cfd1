"""The losses of a batch of pictures, and of a clip whose frames attend to the memories of others.

The arguments have the names of the official training's, and their defaults are the simplest case. Meta's published
configuration has ``num_correction_pt_per_frame=7, num_frames_to_correct=2, rand_frames_to_correct=True,
num_init_cond_frames=2, rand_init_cond_frames=True, prob_to_sample_from_gt=0.1``, prompts as ``sample_prompt`` draws
them, and clips of 8 frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.sam2.modeling.sam2 import ImageFeatures, SAM2Base
from omniops.sam2.training.clip_memory import ClipMemory
from omniops.sam2.training.interaction import Clicks, Prompt, first_prompt, interact
from omniops.sam2.training.losses import Losses, sam2_losses
from omniops.sam2.training.sampling import check_probability, sample_frames

PROMPTS = ("point", "box", "mask")


def image_step(
    model: SAM2Base,
    images: Tensor,
    targets: Tensor,
    prompt: str = "point",
    *,
    num_correction_pt_per_frame: int = 7,
    prob_to_sample_from_gt: float = 0.0,
    generator: torch.Generator | None = None,
) -> Losses:
    """The loss of B pictures with an object each.

    Args:
        model: in training mode, in float32; ``omniops.device.autocast`` around the step has it compute in less.
        images: (B, 3, S, S), of ``normalize``, on the model's device.
        targets: (B, S, S), 0 and 1, on the model's device.
        prompt: the first, ``point``, ``box`` or ``mask``.
        num_correction_pt_per_frame: clicks where the mask is wrong, each of which the loss is of too.
        prob_to_sample_from_gt: the probability that a click is in the target instead.
        generator: of the CPU, that draws the clicks.

    Returns:
        The means over pictures and clicks.

    Raises:
        ValueError: for another prompt, images or targets of other shapes, a negative number, no probability, or a model
            that is not in float32.

    Example:
        >>> from omniops.sam2 import load
        >>> model = load("tiny", "cpu", "float32", image_size=64, random_weights=True).train()
        >>> targets = torch.zeros(2, 64, 64)
        >>> targets[:, 16:48, 16:48] = 1
        >>> losses = image_step(model, torch.randn(2, 3, 64, 64), targets, "box", num_correction_pt_per_frame=1)
        >>> losses.total.backward()
        >>> losses.total.shape, losses.mean_iou.requires_grad
        (torch.Size([]), False)
    """
    clicks = _check_clicks(num_correction_pt_per_frame, prob_to_sample_from_gt, generator)
    _check_inputs(model, prompt, "images", images)
    _check_targets(targets, (len(images), *images.shape[2:]), "(B, S, S), a mask for each picture")
    targets = targets.float()
    features = model.forward_image(images)
    image_embed = model.add_no_mem_embed(features.image_embed)
    first = first_prompt(model, targets, prompt, generator)
    found, _ = interact(model, features, image_embed, targets, first, clicks)
    return _mean([sam2_losses(masks, targets) for masks in found])


def clip_step(
    model: SAM2Base,
    frames: Tensor,
    targets: Tensor,
    prompt: str = "point",
    *,
    num_correction_pt_per_frame: int = 7,
    num_frames_to_correct: int = 1,
    rand_frames_to_correct: bool = False,
    num_init_cond_frames: int = 1,
    rand_init_cond_frames: bool = False,
    add_all_frames_to_correct_as_cond: bool = True,
    prob_to_sample_from_gt: float = 0.0,
    generator: torch.Generator | None = None,
) -> Losses:
    """The loss of T frames with B objects: prompted on some, tracked on the others, and there corrected on some.

    Prompted frames come first, and have no memories of others; the rest follow by time. A mask as prompt is the result
    of its frame, as ``SAM2VideoPredictor.add_new_mask`` has it: it becomes that frame's memory as it was given, there
    is nothing to correct, and the loss is of the other frames.

    Args:
        model, prompt, num_correction_pt_per_frame, prob_to_sample_from_gt: as in ``image_step``.
        frames: (T, 3, S, S), of ``normalize``, on the model's device.
        targets: (T, B, S, S), 0 and 1, on the model's device.
        num_frames_to_correct: how many frames get clicks where the mask is wrong, the prompted ones among them. Masks
            as prompts are not corrected, and this is ignored.
        rand_frames_to_correct: from as many as are prompted to that number, at random.
        num_init_cond_frames: how many are prompted: the first, and others at random.
        rand_init_cond_frames: from 1 to that number, at random.
        add_all_frames_to_correct_as_cond: frames that were corrected are from then on remembered as prompted ones.
        generator: of the CPU, that draws frames and clicks.

    Returns:
        The means over objects, frames and clicks.

    Raises:
        ValueError: as in ``image_step``; also unless 1 <= num_init_cond_frames <= num_frames_to_correct <= T, or, for
            masks as prompts, 1 <= num_init_cond_frames < T.

    Example:
        >>> from omniops.sam2 import load
        >>> model = load("tiny", "cpu", "float32", image_size=64, random_weights=True).train()
        >>> targets = torch.zeros(2, 1, 64, 64)
        >>> targets[..., 16:48, 16:48] = 1
        >>> losses = clip_step(model, torch.randn(2, 3, 64, 64), targets, num_correction_pt_per_frame=1)
        >>> losses.total.backward()
        >>> clip_step(model, torch.randn(2, 3, 64, 64), targets, "mask").total.requires_grad
        True
    """
    clicks = _check_clicks(num_correction_pt_per_frame, prob_to_sample_from_gt, generator)
    _check_inputs(model, prompt, "frames", frames)
    objects = max(targets.shape[1], 1) if targets.ndim == 4 else 1
    _check_targets(targets, (len(frames), objects, *frames.shape[2:]), "(T, B, S, S), masks for each frame")
    if prompt == "mask":
        if num_init_cond_frames >= len(frames):
            raise ValueError(
                f"num_init_cond_frames must be less than the number of frames, {len(frames)}, because masks that are "
                f"given train nothing on their own frames, got {num_init_cond_frames}"
            )
        num_frames_to_correct = num_init_cond_frames
    prompted, corrected = sample_frames(
        len(frames),
        num_init_cond_frames,
        num_frames_to_correct,
        rand_init_cond_frames=rand_init_cond_frames,
        rand_frames_to_correct=rand_frames_to_correct,
        generator=generator,
    )
    targets = targets.float()
    features = model.forward_image(frames)
    memory = ClipMemory(model, len(frames))
    losses: list[Losses] = []
    for t in (*prompted, *(t for t in range(len(frames)) if t not in prompted)):
        frame, expected, is_prompted = _frame(features, t), targets[t], t in prompted
        if is_prompted and prompt == "mask":
            output = model.use_mask_as_output(frame, expected[:, None])
        else:
            if is_prompted:
                first = first_prompt(model, expected, prompt, generator)
                image_embed = model.add_no_mem_embed(frame.image_embed)
            else:
                first, image_embed = Prompt(), memory.attend(t, frame.image_embed)
            on_frame = clicks if t in corrected else clicks._replace(number=0)
            found, output = interact(model, frame, image_embed, expected, first, on_frame)
            losses += [sam2_losses(masks, expected) for masks in found]
        is_cond = is_prompted or (add_all_frames_to_correct_as_cond and t in corrected)
        memory.add(t, frame.image_embed, output, is_cond=is_cond)
    return _mean(losses)


def _frame(features: ImageFeatures, t: int) -> ImageFeatures:
    """Those of one frame, copied where they are a view of channels_last memory.

    Before torch 2.13 convolutions on MPS take such a view for packed memory (pytorch issue 180984).
    """
    frame = features.of(t)
    return frame._replace(image_embed=frame.image_embed.contiguous())


def _check_clicks(number: int, prob_to_sample_from_gt: float, generator: torch.Generator | None) -> Clicks:
    if number < 0:
        raise ValueError(f"num_correction_pt_per_frame must be 0 or more, got {number}")
    check_probability("prob_to_sample_from_gt", prob_to_sample_from_gt)
    return Clicks(number, prob_to_sample_from_gt, generator)


def _check_inputs(model: SAM2Base, prompt: str, name: str, images: Tensor) -> None:
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    if model.dtype != torch.float32:
        raise ValueError(f"model must be in float32 to be trained, got {model.dtype}: load it with dtype='float32'")
    side = model.image_size
    if images.ndim != 4 or not len(images) or images.shape[1:] != (3, side, side):
        raise ValueError(f"{name} must be (N, 3, {side}, {side}), N >= 1, got {tuple(images.shape)}")


def _check_targets(targets: Tensor, shape: tuple[int, ...], layout: str) -> None:
    if targets.shape != shape:
        raise ValueError(f"targets must be {layout}, here {shape}, got {tuple(targets.shape)}")


def _mean(losses: list[Losses]) -> Losses:
    return Losses(*(torch.stack(values).mean() for values in zip(*losses, strict=True)))
