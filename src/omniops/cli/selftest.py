"""``omniops selftest``: is every operator right on this machine?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from omniops import device as devices
from omniops.cli.cases import CASES
from omniops.cli.cases._types import Check
from omniops.cli.common import CommandError, DeviceOption, choose_device, dtype_name, output, progress
from omniops.cli.doctor import serving

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The largest error allowed, relative to the largest value of the right result."""


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


def selftest(device: DeviceOption = None) -> None:
    """Check every operator, in every dtype, forward and gradients, against a float64 oracle.

    Without --device every device found is tested. Ends with status 1 if anything is wrong.

    Example: omniops selftest --device cpu
    """
    tested = devices.found() if device is None else [choose_device(device)]
    jobs = [
        (each, case.NAME, dtype, check)
        for each in tested
        for case in CASES
        for dtype in serving(case.NAME, each.type).DTYPES
        for check in case.checks()
    ]
    worst: dict[tuple[torch.device, str, torch.dtype, str], Worst] = {}
    raised: dict[str, None] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(jobs))
        for each, name, dtype, check in jobs:
            bar.update(task, description=f"{name} {each} {dtype_name(dtype)} {check.label}")
            try:
                found = errors(check, dtype, each)
            except Exception as error:  # whatever a kernel raises is a finding
                found = dict.fromkeys(("result", *(f"gradient of {key}" for key in check.inputs)), float("inf"))
                line = str(error).strip().partition("\n")[0]
                raised[f"{name} on {each}, {dtype_name(dtype)}, {check.label}: {type(error).__name__}: {line}"] = None
            for quantity, value in found.items():
                worst.setdefault((each, name, dtype, quantity), Worst()).add(value, check.label)
            bar.advance(task)

    table = Table("operator", "device", "kernel", "dtype", "", "worst error", "tolerance", "in", "", box=SIMPLE_HEAD)
    failed = 0
    above: object = None
    for (each, name, dtype, quantity), entry in worst.items():
        right = entry.error <= TOLERANCES[dtype]
        failed += not right
        head = (name, str(each), serving(name, each.type).TITLE, dtype_name(dtype))
        table.add_row(
            *(head if head != above else ("",) * len(head)),
            quantity,
            f"{entry.error:.1e}",
            f"{TOLERANCES[dtype]:.0e}",
            entry.label,
            "[green]ok[/]" if right else "[bold red]WRONG[/]",
        )
        above = head
    console = output()
    console.print(table)
    for sentence in raised:
        console.print(sentence, markup=False, soft_wrap=True)
    if failed:
        raise CommandError(f"{failed} of {len(worst)} results are wrong", status=1)
    console.print(f"All {len(worst)} results are right in {len(jobs)} runs.")


def errors(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The largest error of the result and of each gradient, relative to the largest right value."""
    inputs = [tensor.to(dtype).to(device).requires_grad_() for tensor in check.inputs.values()]
    exact_inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    result = check.operator(*inputs)
    exact = check.oracle(*exact_inputs)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(exact.shape, dtype=torch.float64, generator=generator).to(dtype).to(device)
    gradients = torch.autograd.grad(result, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.cpu().double())
    found = {"result": _error(result, exact, dtype, device)}
    for name, gradient, exact_gradient in zip(check.inputs, gradients, exact_gradients, strict=True):
        found[f"gradient of {name}"] = _error(gradient, exact_gradient, dtype, device)
    return found


def _error(result: Tensor, exact: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    if (result.shape, result.dtype, result.device) != (exact.shape, dtype, device):
        return float("inf")
    return float((result.detach().cpu().double() - exact.detach()).abs().max() / exact.detach().abs().max())
