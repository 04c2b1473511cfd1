"""The checks of ``selftest``, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from rich.markup import escape
from rich.progress import Progress

from omniops.cli.cases import dtypes
from omniops.cli.cases._check import Check
from omniops.cli.selftest.models import Model
from omniops.cli.selftest.operators import OracleError, quantities, relative_errors
from omniops.cli.selftest.outcomes import check_model
from omniops.cli.selftest.report import Report, Setting, WorstError
from omniops.cli.selftest.stages import type_and_first_line
from omniops.environment import serving
from omniops.formatting import dtype_name


def run_checks(
    report: Report, cases: Sequence[ModuleType], chosen_models: Sequence[Model], bar: Progress
) -> Iterator[None]:
    """Fill the report; yields before each part of it."""
    yield
    settings = {
        Setting(device, case.NAME, dtype): case
        for device in report.tested
        for case in cases
        for dtype in dtypes(case.NAME, serving(case.NAME, device.type))
    }
    lacking = {(device, dtype): None for device, _, dtype in settings if _is_missing(device, dtype)}
    report.not_checked += [f"Not checked: PyTorch has no {dtype_name(dtype)} on {device}." for device, dtype in lacking]
    checks = [
        (setting, check)
        for setting, case in settings.items()
        if (setting.device, setting.dtype) not in lacking
        for check in case.checks()
    ]
    missing = {model.name: why for model in chosen_models if (why := model.missing())}
    report.not_checked += [f"Not checked: {name}: {why}" for name, why in missing.items()]
    runs = [
        (model, device, dtype)
        for model in chosen_models
        if model.name not in missing
        for device in report.tested
        for dtype in model.dtypes(device)
    ]
    report.runs = len(checks) + len(runs)
    task = bar.add_task("", total=report.runs)
    above = None
    for setting, check in checks:
        device, name, dtype = setting
        if setting != above:
            report.running, above = f"{name} on {device}, {dtype_name(dtype)}", setting
            yield
        bar.update(task, description=escape(f"{name} {device} {dtype_name(dtype)} {check.label}"))
        _add(report, setting, check)
        bar.advance(task)
    for model, device, dtype in runs:
        report.running = f"{model.name} on {device}, {dtype_name(dtype)}"
        bar.update(task, description=report.running)
        yield
        report.outcomes.append(check_model(model, device, dtype))
        bar.advance(task)
    report.running = ""


def _add(report: Report, setting: Setting, check: Check) -> None:
    """Run a check, and keep its errors where they are the worst."""
    device, name, dtype = setting
    call = f"{name} on {device}, {dtype_name(dtype)}, {check.label}"
    try:
        found = relative_errors(check, dtype, device)
    except OracleError as error:
        report.not_checked.append(f"Not checked: {call}: {error}")
        return
    except Exception as error:  # whatever a kernel raises is a finding
        found = dict.fromkeys(quantities(check, dtype), float("inf"))
        sentence = f"{call}: {type_and_first_line(error)}"
        if sentence not in report.raised:
            report.raised.append(sentence)
    for quantity, value in found.items():
        report.worst.setdefault((setting, quantity), WorstError()).add(value, check.label)


def _is_missing(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch cannot hold this dtype there, one of those that it does not have on every device."""
    if dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return False
    try:
        torch.zeros(1, dtype=dtype).to(device)
    except (RuntimeError, TypeError):
        return True
    return False
