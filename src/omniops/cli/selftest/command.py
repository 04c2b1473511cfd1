"""``omniops selftest``: is every operator right on this machine, and every model?"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from omniops import device as devices
from omniops.cli.cases import CASES
from omniops.cli.common import CommandError, choose_device, output, progress
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.cli.selftest.models import Model, models
from omniops.cli.selftest.operators import tolerance
from omniops.cli.selftest.options import GROUPS, DeviceOption, ImageSizeOption, JsonOption, OnlyOption
from omniops.cli.selftest.report import Report
from omniops.cli.selftest.run import run_checks
from omniops.environment import machine, serving, versions
from omniops.formatting import dtype_name


def selftest(
    device: DeviceOption = None,
    only: OnlyOption = None,
    image_size: ImageSizeOption = 128,
    json_file: JsonOption = None,
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
    _dump_stack_on_crash()
    console = output()
    console.print(_header(report.tested), markup=False, soft_wrap=True)
    with progress() as bar:
        for _ in run_checks(report, cases, chosen_models, bar):
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


def _dump_stack_on_crash() -> None:
    """Metal ends the process where it finds an error: then Python's stack goes to stderr."""
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        with suppress(OSError, ValueError):  # no file behind it
            faulthandler.enable(sys.__stderr__)


def _chosen(only: Sequence[str] | None, image_size: int) -> tuple[list[ModuleType], list[Model]]:
    """The operators' cases and the models that were asked for."""
    if image_size % 32:
        raise CommandError(f"--image-size must be a multiple of 32, got {image_size}")
    every_model = models(image_size)
    names = [*GROUPS, *(case.NAME for case in CASES), *(model.name for model in every_model)]
    for name in only or ():
        if name not in names:
            raise CommandError(f"--only {name}: there are {', '.join(names)}")
    wanted = set(only or GROUPS)
    return (
        [case for case in CASES if wanted & {"operators", case.NAME}],
        [model for model in every_model if wanted & {"models", model.name}],
    )


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
        device, name, dtype = setting
        head = (name, str(device), serving(name, device.type).TITLE, dtype_name(dtype))
        allowed = tolerance(setting.dtype)
        add(head, quantity, entry.error, allowed, entry.label, entry.error <= allowed)
    for outcome in report.outcomes:
        head = (outcome.model, outcome.device, "", outcome.dtype)
        stage = outcome.operators.first_wrong or outcome.operators.worst
        if stage is not None:
            label = f"{stage.module}, {stage.operator}".removeprefix(", ")
            add(head, "each stage", stage.error, stage.tolerance, label, outcome.operators.first_wrong is None)
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
            write_json(path, report.as_json(), overwrite=True, indent=1)  # that of the part before
        except CommandError as error:  # what else there is to find is worth more than the file
            return str(error)
    return ""


def _header(tested: list[torch.device]) -> str:
    """What a report must say to be of use: versions, system and hardware."""
    found = versions()
    hardware = (f"{device}: {devices.title(device)}" for device in tested)
    return "; ".join([f"omniops {found['omniops']}, torch {found['torch']}", machine()["machine"], *hardware])
