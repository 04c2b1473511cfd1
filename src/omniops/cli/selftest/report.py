"""What ``selftest`` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from omniops import device as devices
from omniops.cli.doctor import facts
from omniops.cli.selftest.operators import tolerance
from omniops.cli.selftest.outcomes import Outcome
from omniops.environment import serving
from omniops.formatting import dtype_name


@dataclass
class WorstError:
    """The worst error of one result over all shapes."""

    error: float = 0.0
    label: str = ""

    def add(self, error: float, label: str) -> None:
        """Keep the larger error; one that is not a number is the largest."""
        if not self.label or not error <= self.error:
            self.error = error if error == error else float("inf")
            self.label = label


class Setting(NamedTuple):
    """An operator or a model, on a device, in a dtype."""

    device: torch.device
    name: str
    dtype: torch.dtype


@dataclass
class Report:
    """What was found so far."""

    tested: list[torch.device]
    worst: dict[tuple[Setting, str], WorstError] = field(default_factory=dict)
    """By operator and quantity."""
    raised: list[str] = field(default_factory=list)
    """What operators raised, in sentences."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Of models."""
    not_checked: list[str] = field(default_factory=list)
    """What, and why, in sentences."""
    runs: int = 0
    running: str = "preparations"
    """What is about to run; empty at the end."""

    @property
    def total(self) -> int:
        """The number of results that are known to be right or wrong."""
        return len(self.worst) + sum(outcome.is_right or outcome.is_wrong for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        """How many of them are wrong."""
        wrong = sum(not entry.error <= tolerance(setting.dtype) for (setting, _), entry in self.worst.items())
        return wrong + sum(outcome.is_wrong for outcome in self.outcomes)

    @property
    def sentences(self) -> list[str]:
        """What went wrong where, and what was not checked."""
        wrong = [outcome.sentence for outcome in self.outcomes if outcome.is_wrong]
        not_checked = [
            f"Not checked: {outcome.title} on {outcome.device}, {outcome.dtype}: {outcome.not_checked}"
            for outcome in self.outcomes
            if outcome.not_checked
        ]
        return [*self.not_checked, *not_checked, *self.raised, *wrong]

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return facts()

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        content: dict[str, Any] = _without_infinities(
            {
                "running": self.running,
                "failed": self.failed,
                "total": self.total,
                "sentences": self.sentences,
                "operators": [
                    {
                        "operator": setting.name,
                        "device": str(setting.device),
                        "kernel": serving(setting.name, setting.device.type).TITLE,
                        "dtype": dtype_name(setting.dtype),
                        "quantity": quantity,
                        "error": entry.error,
                        "tolerance": tolerance(setting.dtype),
                        "check": entry.label,
                    }
                    for (setting, quantity), entry in self.worst.items()
                ],
                "models": [outcome.as_json() for outcome in self.outcomes],
                "tested": {str(device): devices.title(device) for device in self.tested},
                "doctor": self._facts,
            }
        )
        return content


def _without_infinities(value: Any) -> Any:
    """JSON has no number that is not finite: these become words."""
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
