"""What omniops has to be as fast as, and whether it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from omniops.benchmarking.contenders import OURS, Shape
from omniops.benchmarking.operators import Result


@dataclass(frozen=True)
class Goal:
    """omniops takes at most ``at_most`` times as long as ``against`` does."""

    text: str
    device_type: str
    direction: str
    against: str
    against_direction: str
    at_most: float
    shapes: tuple[Shape, ...]
    dtype: str = ""
    """The only one that the goal is for; without it it is for all."""
    against_dtype: str = ""
    """That of ``against``, where it is another than that of omniops."""
    mode: str = ""
    """The only one of ``timing.METHOD`` that the goal is for; without it it is for all."""


@dataclass(frozen=True)
class TimeGoal:
    """omniops takes at most ``at_most`` microseconds."""

    text: str
    device_type: str
    direction: str
    at_most: float
    shapes: tuple[Shape, ...]
    mode: str
    dtype: str = ""


@dataclass(frozen=True)
class Verdict:
    """A goal in one setting: the time of omniops, and whether that is small enough."""

    operator: str
    goal: str
    shape: Shape
    dtype: str
    mode: str
    against: str
    """The other contender, whose time the figures are multiples of; "" where they are microseconds."""
    at_most: float
    measured: float
    met: bool


def verdicts(cases: Iterable[ModuleType], results: Sequence[Result], device: torch.device) -> Iterator[Verdict]:
    """Each goal of the cases in each setting that was measured. A time of this run comes before one from elsewhere."""
    for case in cases:
        for goal in case.GOALS:
            if goal.device_type != device.type:
                continue
            for ours in results:
                if not _is_meant(goal, case.NAME, ours):
                    continue
                for against, measured in _compare(goal, ours, results):
                    yield Verdict(
                        case.NAME, goal.text, ours.shape, ours.dtype, ours.mode, against, goal.at_most, measured,
                        measured <= goal.at_most,
                    )  # fmt: skip


def _is_meant(goal: Goal | TimeGoal, operator: str, result: Result) -> bool:
    """Whether the result is a time of omniops that the goal is for."""
    return (
        (result.operator, result.direction, result.contender) == (operator, goal.direction, OURS)
        and result.shape in goal.shapes
        and result.measured
        and result.median_ms is not None
        and goal.dtype in (result.dtype, "")
        and goal.mode in (result.mode, "")
    )


def _compare(goal: Goal | TimeGoal, ours: Result, results: Sequence[Result]) -> Iterator[tuple[str, float]]:
    """Whom omniops is compared with, and the multiple of its time; or nobody, and the microseconds."""
    median_ms = ours.median_ms or 0.0
    if isinstance(goal, TimeGoal):
        yield "", median_ms * 1e3
        return
    against = (ours.operator, ours.shape, goal.against_dtype or ours.dtype, goal.against_direction)
    theirs = [
        result
        for result in results
        if result.setting == against
        and result.contender.partition(",")[0] == goal.against
        and result.mode in (ours.mode, "")
        and result.median_ms
    ]
    for other in sorted(theirs, key=lambda result: not result.measured)[:1]:
        yield other.label, median_ms / (other.median_ms or 0)
