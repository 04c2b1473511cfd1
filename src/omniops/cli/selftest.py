"""``omniops selftest``: is every operator right on this machine, and every model?"""

from __future__ import annotations

import faulthandler
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from omniops import device as devices
from omniops.cli.cases import CASES, dtypes
from omniops.cli.cases._types import Check
from omniops.cli.common import (
    DEVICE_NAMES,
    CommandError,
    choose_device,
    dtype_name,
    output,
    progress,
)
from omniops.cli.doctor import facts, machine, serving, versions
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.cli.selftest_models import Model, models
from omniops.cli.selftest_outcomes import Outcome, examine, raised_by_cpu
from omniops.cli.selftest_stages import first_line

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The largest error of an operator of this package, relative to the largest value of the right result. Results of
integers are exact. Those of models are ``STAGE_TOLERANCES`` and ``RESULT_TOLERANCES``."""

_GROUPS = ("operators", "models")


@dataclass
class Worst:
    """The worst error of one result over all shapes."""

    error: float = 0.0
    label: str = ""

    def add(self, error: float, label: str) -> None:
        """Keep the larger error; one that is not a number is the largest."""
        if not self.label or not error <= self.error:
            self.error = error if error == error else float("inf")
            self.label = label


class _Setting(NamedTuple):
    """An operator or a model, on a device, in a dtype."""

    device: torch.device
    name: str
    dtype: torch.dtype


@dataclass
class Report:
    """What was found so far."""

    tested: list[torch.device]
    worst: dict[tuple[_Setting, str], Worst] = field(default_factory=dict)
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
        wrong = sum(not entry.error <= _tolerance(setting) for (setting, _), entry in self.worst.items())
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
        return {
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
                    "tolerance": _tolerance(setting),
                    "check": entry.label,
                }
                for (setting, quantity), entry in self.worst.items()
            ],
            "models": [outcome.as_json() for outcome in self.outcomes],
            "tested": {str(each): devices.title(each) for each in self.tested},
            "doctor": self._facts,
        }


def selftest(
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help=DEVICE_NAMES, show_default="every device found")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="operators, models, or one by its name: "
            + ", ".join([*(case.NAME for case in CASES), *(model.name for model in models(128))])
            + ". May be given several times.",
            show_default="all",
        ),
    ] = None,
    image_size: Annotated[
        int,
        typer.Option(
            "--image-size",
            metavar="S",
            min=32,
            help="The side that SAM 2 resizes pictures to, a multiple of 32. People use 1024, which takes minutes and "
            "gigabytes here.",
        ),
    ] = 128,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, to attach to a report.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Check operators and models, in every dtype, against the CPU in float64 or exact integers.

    Operators: forward and gradients. Models: FPNCarafe, Faster and Mask R-CNN with CARAFE, and SAM 2 on an image and on
    a video of three frames and two objects, with random weights. Each call of a PyTorch operator in them is compared
    with the same call on the CPU in float64, so the first that differs is named, with the module that it is in; then
    the results of an undisturbed run are compared with the CPU's in float32.

    FILE is written before each part, and says which: so what was found stays where the process dies.

    Ends with status 1 if anything is wrong.

    Example: omniops selftest --device mps --json selftest.json
    """
    cases, chosen_models = _chosen(only, image_size)
    require_new([json_file], overwrite)
    report = Report(devices.found() if device is None else [choose_device(device)])
    _say_where_it_dies()
    console = output()
    console.print(_header(report.tested), markup=False, soft_wrap=True)
    with progress() as bar:
        for _ in _checked(report, cases, chosen_models, bar):
            _write(report, json_file)
    unwritten = _write(report, json_file)
    if report.total:
        console.print(_table(report))
    for sentence in report.sentences:
        console.print(sentence, markup=False, soft_wrap=True)
    wrong = f"{report.failed} of {report.total} results are wrong" if report.failed else ""
    if not report.total:
        wrong = "nothing was checked"
    if wrong or unwritten:
        raise CommandError("; ".join(filter(None, (wrong, unwritten))), status=1)
    console.print(f"All {report.total} results are right in {report.runs} runs.")


def _say_where_it_dies() -> None:
    """Metal ends the process where it finds an error: then Python's stack goes to stderr."""
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        with suppress(OSError, ValueError):  # no file behind it
            faulthandler.enable(sys.__stderr__)


def _chosen(only: Sequence[str] | None, image_size: int) -> tuple[list[ModuleType], list[Model]]:
    """The operators' cases and the models that were asked for."""
    if image_size % 32:
        raise CommandError(f"--image-size must be a multiple of 32, got {image_size}")
    every_model = models(image_size)
    names = [*_GROUPS, *(case.NAME for case in CASES), *(model.name for model in every_model)]
    for name in only or ():
        if name not in names:
            raise CommandError(f"--only {name}: there are {', '.join(names)}")
    wanted = set(only or _GROUPS)
    return (
        [case for case in CASES if wanted & {"operators", case.NAME}],
        [model for model in every_model if wanted & {"models", model.name}],
    )


def _checked(
    report: Report, cases: Sequence[ModuleType], chosen_models: Sequence[Model], bar: Progress
) -> Iterator[None]:
    """Fill the report; yields before each part of it."""
    yield
    settings = {
        _Setting(each, case.NAME, dtype): case
        for each in report.tested
        for case in cases
        for dtype in dtypes(case.NAME, serving(case.NAME, each.type))
    }
    lacking = {(each, dtype): None for each, _, dtype in settings if _lacks(each, dtype)}
    report.not_checked += [f"Not checked: PyTorch has no {dtype_name(dtype)} on {each}." for each, dtype in lacking]
    checks = [
        (setting, check)
        for setting, case in settings.items()
        if (setting.device, setting.dtype) not in lacking
        for check in case.checks()
    ]
    missing = {model.name: why for model in chosen_models if (why := model.missing())}
    report.not_checked += [f"Not checked: {name}: {why}" for name, why in missing.items()]
    runs = [
        (model, each, dtype)
        for model in chosen_models
        if model.name not in missing
        for each in report.tested
        for dtype in model.dtypes(each)
    ]
    report.runs = len(checks) + len(runs)
    task = bar.add_task("", total=report.runs)
    above = None
    for setting, check in checks:
        each, name, dtype = setting
        if setting != above:
            report.running, above = f"{name} on {each}, {dtype_name(dtype)}", setting
            yield
        bar.update(task, description=escape(f"{name} {each} {dtype_name(dtype)} {check.label}"))
        _add(report, setting, check)
        bar.advance(task)
    for model, each, dtype in runs:
        report.running = f"{model.name} on {each}, {dtype_name(dtype)}"
        bar.update(task, description=report.running)
        yield
        report.outcomes.append(examine(model, each, dtype))
        bar.advance(task)
    report.running = ""


def _add(report: Report, setting: _Setting, check: Check) -> None:
    """Run a check, and keep its errors where they are the worst."""
    each, name, dtype = setting
    call = f"{name} on {each}, {dtype_name(dtype)}, {check.label}"
    try:
        found = errors(check, dtype, each)
    except OracleError as error:
        report.not_checked.append(f"Not checked: {call}: {error}")
        return
    except Exception as error:  # whatever a kernel raises is a finding
        found = dict.fromkeys(_quantities(check, dtype), float("inf"))
        sentence = f"{call}: {first_line(error)}"
        if sentence not in report.raised:
            report.raised.append(sentence)
    for quantity, value in found.items():
        report.worst.setdefault((setting, quantity), Worst()).add(value, check.label)


def _tolerance(setting: _Setting) -> float:
    return TOLERANCES.get(setting.dtype, 0.0)


def _table(report: Report) -> Table:
    table = Table("", "device", "kernel", "dtype", "", "worst error", "tolerance", box=SIMPLE_HEAD)
    table.add_column("in", overflow="fold")
    table.add_column()
    above: object = None

    def add(head: tuple[str, ...], quantity: str, error: float, tolerance: float, label: str, right: bool) -> None:
        nonlocal above
        verdict = "[green]ok[/]" if right else "[bold red]WRONG[/]"
        allowed = f"{tolerance:.0e}" if tolerance else "exact"
        cells = (*(head if head != above else ("",) * len(head)), quantity, f"{error:.1e}", allowed, escape(label))
        table.add_row(*cells, verdict)
        above = head

    for (setting, quantity), entry in report.worst.items():
        each, name, dtype = setting
        head = (name, str(each), serving(name, each.type).TITLE, dtype_name(dtype))
        tolerance = _tolerance(setting)
        add(head, quantity, entry.error, tolerance, entry.label, entry.error <= tolerance)
    for outcome in report.outcomes:
        head = (outcome.model, outcome.device, "", outcome.dtype)
        stage = outcome.found.first_wrong or outcome.found.worst
        if stage is not None:
            label = f"{stage.module}, {stage.operator}".removeprefix(", ")
            add(head, "each stage", stage.error, stage.tolerance, label, outcome.found.first_wrong is None)
        if outcome.not_checked:
            continue
        name = outcome.worst_result
        error = outcome.results.get(name, float("inf"))
        add(head, "results", error, outcome.tolerance, name or outcome.exception, outcome.results_are_right)
    return table


def _write(report: Report, path: Path | None) -> str:
    """Why the file cannot be written; empty where it was, or none is wanted."""
    if path is not None:
        try:
            write_json(path, _plain(report.as_json()), overwrite=True, indent=1)  # that of the part before
        except CommandError as error:  # what else there is to find is worth more than the file
            return str(error)
    return ""


def _plain(value: Any) -> Any:
    """JSON has no number that is not finite: these become words."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch cannot hold this dtype there, one of those that it does not have on every device."""
    if dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return False
    try:
        torch.zeros(1, dtype=dtype).to(device)
    except (RuntimeError, TypeError):
        return True
    return False


def _header(tested: list[torch.device]) -> str:
    """What a report must say to be of use: versions, system and hardware."""
    found = versions()
    hardware = (f"{each}: {devices.title(each)}" for each in tested)
    return "; ".join([f"omniops {found['omniops']}, torch {found['torch']}", machine()["machine"], *hardware])


class OracleError(Exception):
    """The CPU's own run, which an operator is compared with, raised something."""


@contextmanager
def _oracle() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OracleError(raised_by_cpu(error)) from error


def errors(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The largest error of each result and of each gradient, relative to the largest right value.

    Raises what the operator raises, and OracleError for what the oracle does.
    """
    differentiable = dtype.is_floating_point
    inputs = [tensor.to(dtype).to(device).requires_grad_(differentiable) for tensor in check.inputs.values()]
    exact_inputs = [
        (each.double() if differentiable else each).requires_grad_(differentiable)
        for each in (tensor.detach().cpu() for tensor in inputs)
    ]
    results = _all(check.operator(*inputs))
    with _oracle():
        exact_results = _all(check.oracle(*exact_inputs))
    pairs = list(zip(results, exact_results, strict=True))
    if differentiable:
        generator = torch.Generator().manual_seed(0)
        grads = [
            torch.randn(exact.shape, dtype=torch.float64, generator=generator).to(dtype) for exact in exact_results
        ]
        gradients = torch.autograd.grad(results, inputs, [grad.to(device) for grad in grads])
        with _oracle():
            exact_gradients = torch.autograd.grad(exact_results, exact_inputs, [grad.double() for grad in grads])
        pairs += zip(gradients, exact_gradients, strict=True)
    quantities = _quantities(check, dtype)
    return {name: _error(*pair, dtype, device) for name, pair in zip(quantities, pairs, strict=True)}


def _quantities(check: Check, dtype: torch.dtype) -> list[str]:
    gradients = check.inputs if dtype.is_floating_point else ()
    return [*check.results, *(f"gradient of {name}" for name in gradients)]


def _all(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _error(result: Tensor, exact: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    expected = dtype if exact.is_floating_point() else exact.dtype
    if (result.shape, result.dtype, result.device) != (exact.shape, expected, device):
        return float("inf")
    exact = exact.detach().double()
    difference = (result.detach().cpu().double() - exact).abs().max()
    return float(difference / exact.abs().max()) if difference else 0.0
