"""``omniops bench``: how fast is every operator on this machine, beside what a user would call instead?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from omniops import device as devices
from omniops.benchmarking import timing
from omniops.benchmarking.circumstances import circumstances
from omniops.benchmarking.goals import Verdict, verdicts
from omniops.benchmarking.operators import Result, copy_bandwidth, measure, measurement_count, read_report
from omniops.cli.bench.options import (
    BesideOption,
    GoalsOption,
    JsonOption,
    OperatorArgument,
    PlotOption,
    QuickOption,
    SecondsOption,
)
from omniops.cli.bench.tables import goal_table, result_tables
from omniops.cli.cases import CASES
from omniops.cli.common import CommandError, DeviceOption, Heartbeat, choose_device, output, progress, require_pictures
from omniops.cli.errors import cause, exit_status
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, write_json, writing

PEERS = ("torchvision", "deformops", "sam2", "opencv-python-headless", "opencv-python", "scipy")
"""The packages that contenders are from."""


def bench(
    operator: OperatorArgument = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    beside: BesideOption = None,
    seconds: SecondsOption = 0.5,
    quick: QuickOption = False,
    overwrite: OverwriteOption = False,
    goals: GoalsOption = False,
) -> None:
    """Time every operator beside what you would call instead, and beside the time that moving its bytes takes.

    At a tiny shape the host's time is taken: what Python, the dispatcher and the launches take of each call.

    Contenders take turns, so that whatever disturbs the machine disturbs them all alike.
    Times are medians, with the quartiles in brackets; what takes over a second is timed once.
    Ctrl-C or SIGTERM keeps what was measured until then.

    omniops bench sam2 times SAM 2 on one device beside another; omniops bench sam2 --help shows its own options.

    Example: omniops bench carafe --device cpu --json carafe.json --plot carafe.png
    """
    cases = _choose_cases(operator)
    chosen = choose_device(device)
    require_picture("--plot", plot)
    require_new([json_file, plot], overwrite, [] if beside is None else [beside])
    if plot is not None:
        require_pictures()
    others, origin = ([], "") if beside is None else _read_others(beside, devices.title(chosen))

    torch.manual_seed(0)
    bandwidth, results, stopped = _measure(cases, chosen, seconds, quick)
    settings = {result.setting for result in results}
    results += [other for other in others if other.setting in settings]
    origin = origin if any(other in results for other in others) else ""
    judged = list(verdicts(cases, results, chosen)) if goals else []

    _print(results, judged, f"{devices.title(chosen)}: a copy reads and writes {bandwidth / 1e9:.0f} GB/s", origin)
    report = {
        **circumstances(devices.title(chosen), PEERS),
        "method": {
            mode: text for mode, text in timing.METHOD.items() if any(mode == result.mode for result in results)
        },
        "copy_bytes_per_second": bandwidth,
        "origin_of_what_was_not_measured": origin,
        "interrupted": stopped is not None,
        "results": [asdict(result) for result in results],
        "goals": [asdict(verdict) for verdict in judged],
    }
    _write(report, results, json_file, plot, overwrite)
    if stopped is not None:
        raise CommandError(f"{cause(stopped)}: what was measured until then was kept", exit_status(stopped))


def _choose_cases(operator: str | None) -> list[ModuleType]:
    cases = {case.NAME: case for case in CASES}
    if operator == "sam2":
        raise CommandError("sam2 comes first, its own options after it: omniops bench sam2 [IMAGE] ...")
    if operator is not None and operator not in cases:
        raise CommandError(f"unknown operator {operator!r}: there are {', '.join(cases)}")
    return list(cases.values()) if operator is None else [cases[operator]]


def _read_others(path: Path, device: str) -> tuple[list[Result], str]:
    """The results of another run, if it was on the same kind of device, and where they are from."""
    try:
        others, their_device, origin = read_report(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise CommandError(f"cannot read {path}: not a file that omniops bench --json wrote") from None
    return (others, origin) if their_device == device else ([], "")


def _measure(
    cases: Sequence[ModuleType], device: torch.device, seconds: float, quick: bool
) -> tuple[float, list[Result], KeyboardInterrupt | None]:
    """The bandwidth, the results of what was finished, and what ended the rest; raises it where nothing was."""
    results: list[Result] = []
    with progress() as bar:
        bandwidth = copy_bandwidth(device, quick)
        task = bar.add_task("", total=measurement_count(cases, device, quick))
        heartbeat = Heartbeat(bar)

        def show(name: str) -> None:
            bar.update(task, description=name)
            heartbeat.beat(name)

        try:
            for finished in measure(cases, device, seconds, quick=quick, bytes_per_second=bandwidth, on_start=show):
                results += finished
                bar.advance(task)
        except KeyboardInterrupt as stopped:
            if not results:
                raise
            return bandwidth, results, stopped
    return bandwidth, results, None


def _print(results: Sequence[Result], judged: Sequence[Verdict], head: str, origin: str) -> None:
    console = output()
    console.print(head)
    for table in result_tables(results):
        console.print(table)
    if origin:
        console.print(f"* {origin}", markup=False, soft_wrap=True)
    if judged:
        console.print(goal_table(judged))


def _write(
    report: dict[str, Any], results: list[Result], json_file: Path | None, plot: Path | None, overwrite: bool
) -> None:
    if json_file is not None:
        write_json(json_file, report, overwrite, indent=1)
    if plot is not None:
        from omniops.benchmarking.plot import draw

        subtitle = f"{report['device']}, torch {torch.__version__}, {report['date'][:10]}"
        with writing(plot, overwrite) as temporary:
            draw(results, subtitle, report["origin_of_what_was_not_measured"], temporary)
