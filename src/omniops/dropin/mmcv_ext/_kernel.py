"""What every function of the stand-in shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from omniops.ops._library import without_autocast

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """The function as a kernel: autograd and autocast are the business of mmcv's functions around it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.no_grad(), without_autocast(first):
            return function(*args, **kwargs)

    return call
