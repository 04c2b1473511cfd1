"""``omniops selftest``: is every operator right on this machine?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from omniops import device as devices
from omniops.cli.cases import CASES, dtypes
from omniops.cli.cases._types import Check
from omniops.cli.common import DEVICE_NAMES, CommandError, choose_device, dtype_name, output, progress
from omniops.cli.doctor import machine, serving, versions

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The largest error allowed, relative to the largest value of the right result. Results of integers are exact."""


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


def selftest(
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help=DEVICE_NAMES, show_default="every device found")
    ] = None,
) -> None:
    """Check every operator, in every dtype, forward and gradients, against an oracle in float64 or exact integers.

    Ends with status 1 if anything is wrong.

    Example: omniops selftest --device cpu
    """
    tested = devices.found() if device is None else [choose_device(device)]
    settings = [
        (each, case, dtype)
        for each in tested
        for case in CASES
        for dtype in dtypes(case.NAME, serving(case.NAME, each.type))
    ]
    lacking = {(each, dtype): None for each, _, dtype in settings if _lacks(each, dtype)}
    jobs = [
        (each, case.NAME, dtype, check)
        for each, case, dtype in settings
        if (each, dtype) not in lacking
        for check in case.checks()
    ]
    console = output()
    console.print(_header(tested), markup=False, soft_wrap=True)
    worst: dict[tuple[torch.device, str, torch.dtype, str], Worst] = {}
    raised: dict[str, None] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(jobs))
        for each, name, dtype, check in jobs:
            bar.update(task, description=f"{name} {each} {dtype_name(dtype)} {check.label}")
            try:
                found = errors(check, dtype, each)
            except Exception as error:  # whatever a kernel raises is a finding
                found = dict.fromkeys(_quantities(check, dtype), float("inf"))
                line = str(error).strip().partition("\n")[0]
                raised[f"{name} on {each}, {dtype_name(dtype)}, {check.label}: {type(error).__name__}: {line}"] = None
            for quantity, value in found.items():
                worst.setdefault((each, name, dtype, quantity), Worst()).add(value, check.label)
            bar.advance(task)

    table = Table("operator", "device", "kernel", "dtype", "", "worst error", "tolerance", "in", "", box=SIMPLE_HEAD)
    failed = 0
    above: object = None
    for (each, name, dtype, quantity), entry in worst.items():
        tolerance = TOLERANCES.get(dtype, 0.0)
        right = entry.error <= tolerance
        failed += not right
        head = (name, str(each), serving(name, each.type).TITLE, dtype_name(dtype))
        table.add_row(
            *(head if head != above else ("",) * len(head)),
            quantity,
            f"{entry.error:.1e}",
            f"{tolerance:.0e}" if tolerance else "exact",
            entry.label,
            "[green]ok[/]" if right else "[bold red]WRONG[/]",
        )
        above = head
    console.print(table)
    for each, dtype in lacking:
        console.print(f"Not checked: PyTorch has no {dtype_name(dtype)} on {each}.", markup=False, soft_wrap=True)
    for sentence in raised:
        console.print(sentence, markup=False, soft_wrap=True)
    if failed:
        raise CommandError(f"{failed} of {len(worst)} results are wrong", status=1)
    console.print(f"All {len(worst)} results are right in {len(jobs)} runs.")


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


def errors(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The largest error of each result and of each gradient, relative to the largest right value."""
    differentiable = dtype.is_floating_point
    inputs = [tensor.to(dtype).to(device).requires_grad_(differentiable) for tensor in check.inputs.values()]
    exact_inputs = [
        (each.double() if differentiable else each).requires_grad_(differentiable)
        for each in (tensor.detach().cpu() for tensor in inputs)
    ]
    results, exact_results = _all(check.operator(*inputs)), _all(check.oracle(*exact_inputs))
    pairs = list(zip(results, exact_results, strict=True))
    if differentiable:
        generator = torch.Generator().manual_seed(0)
        grads = [
            torch.randn(exact.shape, dtype=torch.float64, generator=generator).to(dtype) for exact in exact_results
        ]
        gradients = torch.autograd.grad(results, inputs, [grad.to(device) for grad in grads])
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
