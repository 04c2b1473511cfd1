"""What callers pass, checked: integers of any kind, arrays of numbers, and the prompts of a frame."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def an_int(name: str, value: Any) -> int:
    """An integer of Python's, NumPy's or PyTorch's as Python's; TypeError for anything else, by its name."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def tensor(name: str, value: object) -> Tensor:
    """What is an array of numbers as a tensor; TypeError for anything else, by its name."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {type(value).__name__} ({error})") from None


def points_and_box(points: object, labels: object, box: object, clear_old_points: bool) -> tuple[Tensor, Tensor]:
    """(1, P, 2), float32, and (1, P), int32, the corners of a box first."""
    if (points is None) != (labels is None):
        raise ValueError("points and labels must be given together")
    where, which = torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.int32)
    if points is not None:
        where, given = tensor("points", points).float(), tensor("labels", labels)
        if where.numel() == 0:
            where = where.reshape(-1, 2)
        where = where if where.dim() == 3 else where[None]
        given = given if given.dim() == 2 else given[None]
        if where.dim() != 3 or where.shape[0] != 1 or where.shape[2] != 2:
            raise ValueError(f"points must be (P, 2), got {tuple(tensor('points', points).shape)}")
        if given.shape != where.shape[:2]:
            raise ValueError(f"labels must be ({where.shape[1]},) as points say, got {tuple(given.shape[1:])}")
        if not torch.isin(given, torch.tensor([-1, 0, 1, 2, 3], dtype=given.dtype, device=given.device)).all():
            raise ValueError(f"labels must be 1 (object), 0 (not) or -1 (ignored), got {given.flatten().tolist()}")
        which = given.to(torch.int32)
    if box is not None:
        if not clear_old_points:
            raise ValueError("a box comes before all points: box needs clear_old_points=True")
        corners = tensor("box", box).float().to(where.device)
        if corners.numel() != 4:
            raise ValueError(f"box must be x0, y0, x1, y1, got the shape {tuple(corners.shape)}")
        corners = corners.reshape(1, 2, 2)
        if (corners[:, 0] > corners[:, 1]).any():
            raise ValueError(f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {corners.flatten().tolist()}")
        where = torch.cat((corners, where), dim=1)
        which = torch.cat((which.new_tensor([[2, 3]]), which), dim=1)
    if where.shape[1] == 0:
        raise ValueError("there is no prompt: give points and labels, or a box")
    if not where.isfinite().all():
        raise ValueError("points and box must be finite")
    return where, which
