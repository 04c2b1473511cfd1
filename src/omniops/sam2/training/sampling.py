"""Prompts drawn from masks: a first click or box, then clicks where the result is wrong, as SAM 2 is trained.

The arguments have the names of the official training's. Everything is drawn by a generator of the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.sam2.modeling.prompt_encoder import NOT_A_POINT


def sample_prompt(
    prob_to_use_pt_input: float = 0.5,
    prob_to_use_box_input: float = 0.5,
    generator: torch.Generator | None = None,
) -> str:
    """The first prompt of a step, as SAM 2 was trained: ``point``, ``box`` or ``mask``.

    Args:
        prob_to_use_pt_input: the probability of a point or a box; otherwise it is the mask. 1 for pictures.
        prob_to_use_box_input: the probability that it is then a box.
        generator: of the CPU. Of several processes, whose prompts must be the same under FSDP2, each with one seed.

    Raises:
        ValueError: for a probability that is not from 0 to 1.

    Example:
        >>> sample_prompt(prob_to_use_pt_input=0)
        'mask'
        >>> sample_prompt(1, prob_to_use_box_input=1)
        'box'
    """
    check_probability("prob_to_use_pt_input", prob_to_use_pt_input)
    check_probability("prob_to_use_box_input", prob_to_use_box_input)
    of_points, of_box = torch.rand(2, generator=generator).tolist()
    if of_points >= prob_to_use_pt_input:
        return "mask"
    return "box" if of_box < prob_to_use_box_input else "point"


def sample_frames(
    num_frames: int,
    num_init_cond_frames: int = 1,
    num_frames_to_correct: int = 1,
    *,
    rand_init_cond_frames: bool = False,
    rand_frames_to_correct: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Which frames of a clip are prompted at first, and which are corrected: the first always, others at random.

    Args:
        num_frames: of the clip.
        num_init_cond_frames: how many are prompted.
        num_frames_to_correct: how many are corrected, those that are prompted among them.
        rand_init_cond_frames: 1 to that number are prompted.
        rand_frames_to_correct: as many as are prompted, to that number, are corrected.
        generator: of the CPU.

    Returns:
        The two lists of frame indices, ``init_cond_frames`` and ``frames_to_add_correction_pt``.

    Raises:
        ValueError: unless 1 <= num_init_cond_frames <= num_frames_to_correct <= num_frames.

    Example:
        >>> sample_frames(8)
        ([0], [0])
        >>> prompted, corrected = sample_frames(8, 2, 3)
        >>> len(prompted), len(corrected), corrected[:2] == prompted
        (2, 3, True)
    """
    if not 1 <= num_init_cond_frames <= num_frames_to_correct <= num_frames:
        raise ValueError(
            "num_init_cond_frames, num_frames_to_correct and the number of frames must be 1 or more and in that "
            f"order, got {num_init_cond_frames}, {num_frames_to_correct} and {num_frames}"
        )
    if rand_init_cond_frames:
        num_init_cond_frames = _sample_int(1, num_init_cond_frames, generator)
    if rand_frames_to_correct:
        num_frames_to_correct = _sample_int(num_init_cond_frames, num_frames_to_correct, generator)
    order = [0, *(1 + torch.randperm(num_frames - 1, generator=generator)).tolist()]
    return order[:num_init_cond_frames], order[:num_frames_to_correct]


def sample_points(region: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x and y of a random pixel of each region; of any pixel where it is empty.

    Args:
        region: (B, H, W) bool, what to draw from.
        generator: of the CPU.

    Returns:
        (B, 1, 2), float32, on the region's device.

    Raises:
        ValueError: for a region of other dimensions.

    Example:
        >>> region = torch.zeros(1, 4, 6, dtype=torch.bool)
        >>> region[0, 2, 5] = True
        >>> sample_points(region)
        tensor([[[5., 2.]]])
    """
    check_masks("region", region)
    weights = region.flatten(1).float().cpu()
    weights[weights.sum(dim=1) == 0] = 1
    index = torch.multinomial(weights, 1, generator=generator)
    width = region.shape[2]
    return torch.stack((index % width, index // width), dim=2).float().to(region.device)


def box_points(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of each mask's box, as the prompt encoder takes them.

    Args:
        targets: (B, H, W), 0 and 1.

    Returns:
        The corners (B, 2, 2), float32, x and y in pixels, and their labels (B, 2), int32: 2 and 3, or -1, to be
        ignored, where a mask is empty.

    Raises:
        ValueError: for targets of other dimensions.

    Example:
        >>> targets = torch.zeros(1, 6, 8)
        >>> targets[0, 1:4, 2:7] = 1
        >>> coords, labels = box_points(targets)
        >>> coords.tolist(), labels.tolist()
        ([[[2.0, 1.0], [6.0, 3.0]]], [[2, 3]])
    """
    check_masks("targets", targets)
    inside = targets > 0.5
    corners = []
    for axis in (1, 2):  # columns, then rows
        occupied = inside.any(dim=axis).int()
        first = occupied.argmax(dim=1)
        corners.append((first, occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = corners
    coords = torch.stack((torch.stack((x0, y0), 1), torch.stack((x1, y1), 1)), dim=1).float()
    labels = torch.tensor([2, 3], dtype=torch.int32, device=targets.device).repeat(len(targets), 1)
    labels[~inside.flatten(1).any(dim=1)] = NOT_A_POINT
    return coords, labels


def corrective_points(
    logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A click in what is wrong of each mask.

    Args:
        logits: (B, H, W), above 0 inside.
        targets: (B, H, W), 0 and 1.
        generator: of the CPU.

    Returns:
        Points (B, 1, 2), float32, x and y in pixels, and their labels (B, 1), int32: 1 in what was missed, 0 in what is
        too much, and -1, to be ignored, where nothing is wrong.

    Raises:
        ValueError: for logits or targets of other dimensions, or of different shapes.

    Example:
        >>> targets = torch.zeros(1, 4, 4)
        >>> targets[0, 3, 1] = 1
        >>> points, labels = corrective_points(torch.full((1, 4, 4), -1.0), targets)
        >>> points.tolist(), labels.tolist()
        ([[[1.0, 3.0]]], [[1]])
    """
    check_masks("targets", targets)
    if logits.shape != targets.shape:
        raise ValueError(f"logits must have the shape of targets, {tuple(targets.shape)}, got {tuple(logits.shape)}")
    inside = targets > 0.5
    error = (logits > 0) != inside
    points = sample_points(error, generator)
    x, y = points[:, 0].long().unbind(1)
    labels = inside[torch.arange(len(inside), device=inside.device), y, x].int()
    labels[~error.flatten(1).any(dim=1)] = NOT_A_POINT
    return points, labels[:, None]


def check_masks(name: str, masks: Tensor) -> None:
    """ValueError for other than (B, H, W)."""
    if masks.ndim != 3:
        raise ValueError(f"{name} must be (B, H, W), a mask for each object, got {tuple(masks.shape)}")


def check_probability(name: str, value: float) -> None:
    """ValueError for what is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value}")


def _sample_int(least: int, most: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))
