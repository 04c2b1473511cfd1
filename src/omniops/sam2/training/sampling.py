"""Prompts drawn from masks: a first click or box, then clicks where the result is wrong, as SAM 2 is trained."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_points(region: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, H, W) bool -> (B, 1, 2), x and y of a random pixel of each region; of any pixel where it is empty.

    Args:
        region: what to draw from.
        generator: of the CPU.
    """
    weights = region.flatten(1).float().cpu()
    weights[weights.sum(dim=1) == 0] = 1
    index = torch.multinomial(weights, 1, generator=generator)
    width = region.shape[2]
    return torch.stack((index % width, index // width), dim=2).float().to(region.device)


def box_points(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W) masks -> (B, 2, 2) corners and their labels 2 and 3, (B, 2); labels -1 where a mask is empty."""
    inside = targets > 0.5
    corners = []
    for axis in (1, 2):  # columns, then rows
        occupied = inside.any(dim=axis).int()
        first = occupied.argmax(dim=1)
        corners.append((first, occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = corners
    coords = torch.stack((torch.stack((x0, y0), 1), torch.stack((x1, y1), 1)), dim=1).float()
    labels = torch.tensor([2, 3], dtype=torch.int32, device=targets.device).repeat(len(targets), 1)
    labels[~inside.flatten(1).any(dim=1)] = -1
    return coords, labels


def corrective_points(
    logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A click in what is wrong: (B, H, W) logits and masks -> (B, 1, 2) points, (B, 1) labels.

    The label is 1 in what was missed and 0 in what is too much; -1, to be ignored, where nothing is wrong.
    """
    inside = targets > 0.5
    error = (logits > 0) != inside
    points = sample_points(error, generator)
    x, y = points[:, 0].long().unbind(1)
    labels = inside[torch.arange(len(inside), device=inside.device), y, x].int()
    labels[~error.flatten(1).any(dim=1)] = -1
    return points, labels[:, None]
