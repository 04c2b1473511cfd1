"""How long, how fast and in what a detector is trained, and the schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

_LR_PER_PICTURE = 0.02 / 16
"""MMDetection's learning rate of these detectors, which is of 16 pictures a step."""
_STEPS = (8 / 12, 11 / 12)
"""After which share of the training the rate falls to a tenth: MMDetection's schedule of 12 epochs."""
_LONGEST_WARMUP, _WARMUP_SHARE, _FIRST_FACTOR = 500, 0.1, 0.001
SCHEDULES = ("step", "cosine")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How a detector is trained.

    Args:
        epochs: how often each picture is seen.
        batch: pictures a step, of all processes together.
        lr: the learning rate after warm-up; by default 0.00125 for each picture of a step, which is MMDetection's.
        schedule: ``"step"``, to a tenth after 8/12 and again after 11/12 of the training, or ``"cosine"``, to 0.
        warmup: steps over which the rate rises linearly; by default a tenth of all, and at most 500.
        momentum: of stochastic gradient descent.
        weight_decay: of all parameters.
        max_norm: of the gradient of all parameters together, to which a longer one is shortened; 0 for any.
        dtype: what autocast computes in: ``"float32"`` for off, ``"bfloat16"``, or ``"float16"`` with scaled losses.
        seed: of the order of pictures, their flips, and the anchors and proposals that are drawn.
        flip: whether half of the pictures are mirrored.
        random_weights: that the detector started from random weights, for who goes on with it: all its layers train.

    Raises:
        ValueError: for a number or a word that cannot be.

    Example:
        >>> settings = Settings(epochs=2, batch=4, schedule="cosine", warmup=0)
        >>> [round(settings.lr_at(step, steps=4), 5) for step in range(4)]
        [0.005, 0.00427, 0.0025, 0.00073]
    """

    epochs: int = 12
    batch: int = 2
    lr: float | None = None
    schedule: str = "step"
    warmup: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    max_norm: float = 35.0
    dtype: str = "float32"
    seed: int = 0
    flip: bool = True
    random_weights: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not lowest <= value < 2**63):
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        for name, below in (("lr", math.inf), ("momentum", 1), ("weight_decay", math.inf), ("max_norm", math.inf)):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < below):
                raise ValueError(f"{name} must be a number of at least 0 and below {below}, got {value!r}")
        for name, words in (("schedule", SCHEDULES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        for name in ("flip", "random_weights"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, where there are ``steps`` in all."""
        highest = _LR_PER_PICTURE * self.batch if self.lr is None else self.lr
        warmup = min(_LONGEST_WARMUP, int(steps * _WARMUP_SHARE)) if self.warmup is None else self.warmup
        rise = 1.0 if step >= warmup else _FIRST_FACTOR + (1 - _FIRST_FACTOR) * step / warmup
        if self.schedule == "cosine":
            return highest * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        return highest * rise * 0.1 ** sum(step >= round(share * steps) for share in _STEPS)

    def as_plain(self) -> dict[str, Any]:
        """Of texts and numbers, as it stands in a checkpoint."""
        return asdict(self)
