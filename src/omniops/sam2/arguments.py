"""Arguments of callers, checked: integers and arrays of any library."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def check_int(name: str, value: Any) -> int:
    """An integer of Python's, NumPy's or PyTorch's as Python's; TypeError for anything else, by its name."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def check_array(name: str, value: object) -> Tensor:
    """An array of numbers as a tensor; TypeError for anything else, by its name."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {type(value).__name__} ({error})") from None


def check_upsampling(upsampling: str) -> str:
    """How masks come to the size of the image; ValueError for another way."""
    if upsampling not in ("bilinear", "guided"):
        raise ValueError(f"upsampling must be bilinear or guided, got {upsampling!r}")
    return upsampling
