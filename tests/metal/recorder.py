"""Keeps what launch code asks of Metal's kernels, and runs none of them."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from omniops.backends.mps import _segments
from omniops.backends.mps._library import library


class Recorder:
    """Stands in for the libraries of an operator. A launch must keep what Metal asks of one."""

    def __init__(self, name: str) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        """Of each its kernel's name and arguments."""
        self._name = name

    def __getattr__(self, name: str) -> Any:
        def launch(*args: Any, threads: Any, group_size: Any, arg_casts: Any = None) -> None:
            assert {i for i, arg in enumerate(args) if not isinstance(arg, Tensor)} == set(arg_casts or {})
            threads, group_size = (x if isinstance(x, tuple) else (x,) for x in (threads, group_size))
            # Metal counts threads of an axis in 32 bits, and the kernels take them, whole groups of them, as int.
            assert all(-(-axis // group) * group <= 2**31 for axis, group in zip(threads, group_size, strict=True))
            kernels = library("segments") if "segments" in name else library(self._name, torch.half)
            assert torch.tensor(group_size).prod() <= getattr(kernels, name).max_threads
            self.launches.append((name, args))

        return launch


def record_launches(monkeypatch: pytest.MonkeyPatch, metal: ModuleType, name: str) -> Recorder:
    """Those of an operator's launch code from now on."""
    recorder = Recorder(name)
    monkeypatch.setattr(metal, "library", lambda name, dtype: recorder)
    monkeypatch.setattr(_segments, "library", lambda name: recorder)
    return recorder
