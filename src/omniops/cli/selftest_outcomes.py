"""What ``selftest`` finds of one model on one device in one dtype."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from omniops.cli.common import dtype_name
from omniops.cli.selftest_models import RESULT_TOLERANCES, Model
from omniops.cli.selftest_stages import Found, checked, relative_error


@dataclass
class Outcome:
    """A model on a device in a dtype: its operators one by one, and its results as a whole."""

    model: str
    """As ``--only`` calls it."""
    title: str
    device: str
    dtype: str
    found: Found = field(default_factory=Found)
    results: dict[str, float] = field(default_factory=dict)
    """The error of each result."""
    tolerance: float = 0.0
    """Of the results."""
    exception: str = ""
    """Its type and first line; empty where nothing was raised."""
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
    def is_right(self) -> bool:
        """Whether nothing was found."""
        return self.found.first_wrong is None and not self.exception and self.results_are_right

    @property
    def sentence(self) -> str:
        """What is wrong first, where something is."""
        head, first = f"{self.title} on {self.device}, {self.dtype}:", self.found.first_wrong
        if first is not None:
            sentence = (
                f"{head} the first stage that differs is {first.name}: {first.error:.1e} of its largest value, "
                f"{_allowed(first.tolerance)}; its inputs were {first.inputs}"
            )
            return f"{sentence}; later it raised {self.exception}" if self.exception else sentence
        if self.exception:
            stage = self.found.raising
            return f"{head} {f'the stage {stage.name}' if stage else 'it'} raised {self.exception}"
        if not self.results_are_right:
            name = self.worst_result
            return (
                f"{head} every stage alone is right, but {name} differ: {self.results[name]:.1e} of the largest value, "
                f"{_allowed(self.tolerance)}"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        first, raising = self.found.first_wrong, self.found.raising
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
            "traceback": self.traceback,
            "results": [
                {"result": name, "error": error, "tolerance": self.tolerance} for name, error in self.results.items()
            ],
            "stages": [asdict(stage) for stage in self.found.stages.values() if stage.calls],
            "not_compared": dict(self.found.unchecked),
        }


def _allowed(tolerance: float) -> str:
    return f"{tolerance:.0e} allowed" if tolerance else "none allowed"


def examine(model: Model, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Run a model on the device twice: operator by operator, and undisturbed against the CPU in float32."""
    outcome = Outcome(model.name, model.title, str(device), dtype_name(dtype), tolerance=RESULT_TOLERANCES[dtype])
    start = time.perf_counter()
    try:
        with _threads(1 if model.is_small else torch.get_num_threads()), _exact_float32(device):
            network = model.build(device, dtype)
            with checked(network) as outcome.found:
                model.run(network, dtype)
            results = model.run(network, dtype)
            expected = model.run(model.reference(network), torch.float32)
        # In half precision there are fewer.
        outcome.results = {name: relative_error([each], [expected[name]]) for name, each in results.items()}
    except Exception as error:  # whatever a kernel raises is a finding
        line = str(error).strip().partition("\n")[0]
        outcome.exception = f"{type(error).__name__}: {line}"
        outcome.traceback = "".join(traceback.format_exception(error))
    outcome.seconds = time.perf_counter() - start
    return outcome


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
    before = [each.allow_tf32 for each in flags]
    for each in flags:
        each.allow_tf32 = False
    try:
        yield
    finally:
        for each, value in zip(flags, before, strict=True):
            each.allow_tf32 = value
