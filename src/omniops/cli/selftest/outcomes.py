"""What ``selftest`` finds of one model on one device in one dtype."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from omniops.cli.selftest.models import RESULT_TOLERANCES, Model, Results
from omniops.cli.selftest.stages import OperatorsReport, check_operators, relative_error, type_and_first_line
from omniops.formatting import dtype_name


@dataclass
class Outcome:
    """A model on a device in a dtype: its operators one by one, and its results as a whole."""

    model: str
    """As ``--only`` calls it."""
    title: str
    device: str
    dtype: str
    operators: OperatorsReport = field(default_factory=OperatorsReport)
    results: dict[str, float] = field(default_factory=dict)
    """The error of each result."""
    tolerance: float = 0.0
    """Of the results."""
    exception: str = ""
    """Its type and first line; empty where nothing was raised."""
    not_checked: str = ""
    """What the results could not be compared with, and why; empty where they were."""
    traceback: str = ""
    seconds: float = 0.0

    @property
    def worst_result(self) -> str:
        """The name of the one with the largest error; empty where there is none."""
        return max(self.results, key=lambda name: self.results[name], default="")

    @property
    def results_are_right(self) -> bool:
        """Whether there are results, all within their tolerance."""
        return bool(self.results) and self.results[self.worst_result] <= self.tolerance

    @property
    def is_wrong(self) -> bool:
        """Whether something was found; results that could not be compared are nothing."""
        results_are_wrong = not self.results_are_right and not self.not_checked
        return self.operators.first_wrong is not None or bool(self.exception) or results_are_wrong

    @property
    def is_right(self) -> bool:
        """Whether all was compared, and nothing was found."""
        return not self.is_wrong and not self.not_checked

    @property
    def sentence(self) -> str:
        """What is wrong first, where something is."""
        head, first = f"{self.title} on {self.device}, {self.dtype}:", self.operators.first_wrong
        if first is not None:
            sentence = (
                f"{head} the first stage that differs is {first.name}: {first.error:.1e} of its largest value, "
                f"{_allowed(first.tolerance)}; its inputs were {first.inputs}"
            )
            return f"{sentence}; later it raised {self.exception}" if self.exception else sentence
        if self.exception:
            stage = self.operators.raising
            return f"{head} {f'the stage {stage.name}' if stage else 'it'} raised {self.exception}"
        if self.is_wrong:
            name = self.worst_result
            return (
                f"{head} every stage alone is right, but {name} differ: {self.results[name]:.1e} of the largest value, "
                f"{_allowed(self.tolerance)}"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        first, raising = self.operators.first_wrong, self.operators.raising
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "right": self.is_right,
            "sentence": self.sentence,
            "seconds": round(self.seconds, 2),
            "first_wrong": None if first is None else asdict(first),
            "raising": asdict(raising) if raising is not None and self.exception else None,
            "exception": self.exception,
            "not_checked": self.not_checked,
            "traceback": self.traceback,
            "results": [
                {"result": name, "error": error, "tolerance": self.tolerance} for name, error in self.results.items()
            ],
            "stages": [asdict(stage) for stage in self.operators.stages.values() if stage.calls],
            "not_compared": dict(self.operators.unchecked),
        }


def _allowed(tolerance: float) -> str:
    return f"{tolerance:.0e} allowed" if tolerance else "none allowed"


def check_model(model: Model, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Run a model on the device twice: operator by operator, and undisturbed against the CPU in float32."""
    outcome = Outcome(model.name, model.title, str(device), dtype_name(dtype), tolerance=RESULT_TOLERANCES[dtype])
    start = time.perf_counter()
    try:
        with _threads(1 if model.is_small else torch.get_num_threads()), _exact_float32(device):
            network = model.build(device, dtype)
            with check_operators(network) as outcome.operators:
                model.run(network, dtype)
            results = model.run(network, dtype)
            expected = _expected(model, network, outcome)
        if expected is not None:  # in half precision there are fewer results than it has
            outcome.results = {
                name: relative_error([result], [expected[name]] if name in expected else [])
                for name, result in results.items()
            }
    except Exception as error:  # whatever a kernel raises is a finding
        outcome.exception = type_and_first_line(error)
        outcome.traceback = "".join(traceback.format_exception(error))
    outcome.seconds = time.perf_counter() - start
    return outcome


def _expected(model: Model, network: nn.Module, outcome: Outcome) -> Results | None:
    """The CPU's results; None where it raises, which the outcome says."""
    try:
        return model.run(model.reference(network), torch.float32)
    except Exception as error:  # says nothing about the device
        outcome.not_checked = raised_by_cpu(error)
        outcome.traceback = "".join(traceback.format_exception(error))
        return None


def raised_by_cpu(error: Exception) -> str:
    """Why something is not checked."""
    return f"the CPU's own run, which it is compared with, raised {type_and_first_line(error)}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Without TF32, which CUDA otherwise uses for convolutions of float32."""
    if device.type != "cuda":
        yield
        return
    flags: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag_owner.allow_tf32 for flag_owner in flags]
    for flag_owner in flags:
        flag_owner.allow_tf32 = False
    try:
        yield
    finally:
        for flag_owner, value in zip(flags, before, strict=True):
            flag_owner.allow_tf32 = value
