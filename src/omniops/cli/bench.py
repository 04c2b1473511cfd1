"""``omniops bench``: how fast is every operator on this machine, beside what a user would call instead?"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from omniops import device as devices
from omniops.cli import timing
from omniops.cli.cases import CASES, timed_dtypes
from omniops.cli.cases._types import (
    BOTH,
    DIRECTIONS,
    FLOOR,
    FORWARD,
    OURS,
    Contender,
    Goal,
    Shape,
    TimeGoal,
    bare_function,
)
from omniops.cli.common import (
    CommandError,
    DeviceOption,
    Heartbeat,
    choose_device,
    digits,
    dtype_name,
    output,
    progress,
    require_pictures,
)
from omniops.cli.doctor import installed, machine, serving, versions
from omniops.cli.errors import cause, exit_status
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, write_json, writing
from omniops.cli.timing import CALL, GRAPH, HOST

PEERS = ("torchvision", "sam2", "opencv-python-headless", "opencv-python", "scipy")
"""The packages that contenders are from."""

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them there: .png, .svg.")]


@dataclass(frozen=True)
class Result:
    """The times of one contender in one setting, in milliseconds."""

    operator: str
    shape: Shape
    dtype: str
    direction: str
    contender: str
    mode: str
    """As ``timing.METHOD`` has it, or "" for the byte floor and for times from elsewhere."""
    median_ms: float | None
    lower_quartile_ms: float | None = None
    upper_quartile_ms: float | None = None
    samples: int = 0
    measured: bool = True
    """False for the byte floor, which is computed, and for times that were not taken in this run."""
    error: str = ""
    """Why there is no time."""


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


class Setting(NamedTuple):
    """What is timed in turns."""

    case: ModuleType
    shape: Shape
    dtype: torch.dtype
    dtype_label: str
    """ "tf32" for float32 while PyTorch is told to allow TF32."""
    on_host: bool = False
    """Whether the host's time is taken, and not the device's."""


def bench(
    operator: Annotated[str | None, typer.Argument(metavar="OP", help="One operator; all without it.")] = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            "--beside", metavar="FILE", help="Times of another run, written by --json, to stand beside these."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="Time spent on each measurement.")
    ] = 0.5,
    quick: Annotated[bool, typer.Option("--quick", help="One tiny shape: does it run at all?")] = False,
    overwrite: OverwriteOption = False,
    # The goals name an H200 and two CPU threads: benchmarks/ asks for them, on those machines.
    goals: Annotated[bool, typer.Option("--goals", hidden=True)] = False,
) -> None:
    """Time every operator beside what you would call instead, and beside the time that moving its bytes takes.

    At a tiny shape the host's time is taken: what Python, the dispatcher and the launches take of each call.

    Contenders take turns, so that whatever disturbs the machine disturbs them all alike.
    Times are medians, with the quartiles in brackets; what takes over a second is timed once.
    Ctrl-C or SIGTERM keeps what was measured until then.

    omniops bench sam2 times SAM 2 on one device beside another; omniops bench sam2 --help shows its own options.

    Example: omniops bench carafe --device cpu --json carafe.json --plot carafe.png
    """
    cases = {case.NAME: case for case in CASES}
    if operator == "sam2":
        raise CommandError("sam2 comes first, its own options after it: omniops bench sam2 [IMAGE] ...")
    if operator is not None and operator not in cases:
        raise CommandError(f"unknown operator {operator!r}: there are {', '.join(cases)}")
    chosen = choose_device(device)
    require_picture("--plot", plot)
    require_new([json_file, plot], overwrite, [] if beside is None else [beside])
    if plot is not None:
        require_pictures()
    others, origin = ([], "") if beside is None else _read(beside, devices.title(chosen))
    selected = list(cases.values()) if operator is None else [cases[operator]]

    torch.manual_seed(0)
    with progress() as bar:
        bandwidth = _bandwidth(chosen, quick)
        results, stopped = _until_stopped(_measure(selected, chosen, seconds, quick, bandwidth, bar))
    settings = {_setting(result) for result in results}
    results += [other for other in others if _setting(other) in settings]
    origin = origin if any(other in results for other in others) else ""
    verdicts = list(_verdicts(selected, results, chosen)) if goals else []

    console = output()
    console.print(f"{devices.title(chosen)}: a copy reads and writes {bandwidth / 1e9:.0f} GB/s")
    for table in _tables(results):
        console.print(table)
    if origin:
        console.print(f"* {origin}", markup=False, soft_wrap=True)
    if verdicts:
        console.print(_goals(verdicts))
    report = {
        **circumstances(devices.title(chosen), PEERS),
        "method": {mode: text for mode, text in timing.METHOD.items() if any(mode == each.mode for each in results)},
        "copy_bytes_per_second": bandwidth,
        "origin_of_what_was_not_measured": origin,
        "interrupted": stopped is not None,
        "results": [asdict(result) for result in results],
        "goals": [asdict(verdict) for verdict in verdicts],
    }
    if json_file is not None:
        write_json(json_file, report, overwrite, indent=1)
    if plot is not None:
        from omniops.cli.bench_plot import draw

        with writing(plot, overwrite) as part:
            draw(results, f"{devices.title(chosen)}, torch {torch.__version__}, {report['date'][:10]}", origin, part)
    if stopped is not None:
        raise CommandError(f"{cause(stopped)}: what was measured until then was kept", exit_status(stopped))


def circumstances(device: str, peers: Iterable[str]) -> dict[str, Any]:
    """When figures were taken, by which command, on what and with which versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "device": device,
        "hardware": {**machine(), "threads": torch.get_num_threads()},
        "versions": {**versions(), **installed(peers), "cuda": torch.version.cuda},
    }


def quartiles(times: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The lower and the upper one, where there are times enough."""
    if len(times) == 1:
        return None, None
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return lower, upper


def _until_stopped(measured: Iterable[list[Result]]) -> tuple[list[Result], KeyboardInterrupt | None]:
    """The results of what was finished, and what ended the rest; raises it where nothing was finished."""
    results: list[Result] = []
    try:
        for finished in measured:
            results += finished
    except KeyboardInterrupt as stopped:
        if not results:
            raise
        return results, stopped
    return results, None


def _measure(
    cases: list[ModuleType], device: torch.device, seconds: float, quick: bool, bandwidth: float, bar: Progress
) -> Iterator[list[Result]]:
    """The results of each direction in each setting."""
    total = sum(len(setting.case.traffic(setting.shape)) for setting in _settings(cases, device, quick))
    task = bar.add_task("", total=total)
    heartbeat = Heartbeat(bar)
    for setting in _settings(cases, device, quick):
        case, shape, dtype, dtype_label, on_host = setting
        contenders: list[Contender] = list(case.contenders(shape, dtype, device))
        traffic = case.traffic(shape)
        if on_host:
            contenders = [each for each in contenders if each.on_host]
            contenders += [bare_function(device)] if BOTH in traffic else []
        for direction, elements in traffic.items():
            what = f"{case.NAME} {shape} {dtype_label} {direction}{', host' if on_host else ''}"
            bar.update(task, description=what)
            heartbeat.beat(what)
            results = list(_timed(setting, direction, contenders, device, seconds))
            if not on_host:
                floor = elements * dtype.itemsize / bandwidth * 1e3
                results.append(Result(case.NAME, shape, dtype_label, direction, FLOOR, "", floor, measured=False))
            yield results
            bar.advance(task)


def _timed(
    setting: Setting, direction: str, contenders: Iterable[Contender], device: torch.device, seconds: float
) -> Iterator[Result]:
    """Each contender's times, or why it has none."""
    place = setting.case.NAME, setting.shape, setting.dtype_label, direction
    calls: dict[tuple[str, str], timing.Call] = {}
    slow: set[str] = set()
    failed: list[Result] = []
    for each in contenders:
        call = each.forward if direction == FORWARD else each.both
        if call is None:
            continue
        mode = HOST if setting.on_host else CALL
        try:
            if timing.warm_up(call, device, seconds / 2):
                slow.add(each.name)
            calls[each.name, mode] = call
            if mode == CALL and device.type == "cuda" and each.capturable:
                mode = GRAPH
                calls[each.name, mode] = timing.captured(call)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            failed.append(Result(*place, each.name, mode, None, error=reason))
    for (name, mode), times in timing.milliseconds(calls, device, seconds, slow).items():
        lower, upper = quartiles(times)
        yield Result(*place, name, mode, statistics.median(times), lower, upper, len(times))
    yield from failed


def _settings(cases: list[ModuleType], device: torch.device, quick: bool) -> Iterator[Setting]:
    matmul = torch.backends.cuda.matmul
    for case in cases:
        dtypes = timed_dtypes(case, serving(case.NAME, device.type))
        for shape in case.shapes(device.type, quick):
            for dtype in dtypes:
                yield Setting(case, shape, dtype, dtype_name(dtype))
                if device.type == "cuda" and dtype == torch.float32 and getattr(case, "IN_TF32", False):
                    before = matmul.allow_tf32
                    matmul.allow_tf32 = True
                    try:
                        yield Setting(case, shape, dtype, "tf32")
                    finally:
                        matmul.allow_tf32 = before
        # The host takes as long in every dtype.
        yield Setting(case, case.host_shape(device.type), dtypes[0], dtype_name(dtypes[0]), on_host=True)


def _bandwidth(device: torch.device, quick: bool) -> float:
    size = 2**28 if device.type == "cpu" else 2**30
    if quick:
        size = 2**24
    limit = devices.memory(device).limit
    return timing.copy_bandwidth(device, size if limit is None else min(size, limit // 8))


def _read(path: Path, device: str) -> tuple[list[Result], str]:
    """The results of another run, if it was on the same kind of device, and where they are from."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [{**row, "shape": tuple(row["shape"]), "measured": False} for row in report["results"]]
        others = [Result(**row) for row in rows if row["contender"] != FLOOR]
        origin = report.get(
            "origin", f"not measured in this run, but with {report.get('command')} on {report.get('date')}"
        )
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"cannot read {path}: not a file that omniops bench --json wrote") from None
    return (others, origin) if report.get("device") == device else ([], "")


def _setting(result: Result) -> tuple[str, Shape, str, str]:
    return result.operator, result.shape, result.dtype, result.direction


def _verdicts(cases: list[ModuleType], results: list[Result], device: torch.device) -> Iterator[Verdict]:
    """Each goal in each setting that was measured. A time of this run comes before one from elsewhere."""
    for case in cases:
        for goal in case.GOALS:
            if goal.device_type != device.type:
                continue
            for ours in results:
                if (ours.operator, ours.direction, ours.contender) != (case.NAME, goal.direction, OURS):
                    continue
                if ours.shape not in goal.shapes or not ours.measured or ours.median_ms is None:
                    continue
                if goal.dtype not in (ours.dtype, "") or goal.mode not in (ours.mode, ""):
                    continue
                for against, measured in _judged(goal, ours, ours.median_ms, results):
                    yield Verdict(
                        case.NAME, goal.text, ours.shape, ours.dtype, ours.mode, against, goal.at_most, measured,
                        measured <= goal.at_most,
                    )  # fmt: skip


def _judged(
    goal: Goal | TimeGoal, ours: Result, median_ms: float, results: list[Result]
) -> Iterator[tuple[str, float]]:
    """Whom omniops is compared with, and the multiple of its time; or nobody, and the microseconds."""
    if isinstance(goal, TimeGoal):
        yield "", median_ms * 1e3
        return
    against = (ours.operator, ours.shape, goal.against_dtype or ours.dtype, goal.against_direction)
    theirs = [
        each
        for each in results
        if _setting(each) == against
        and each.contender.partition(",")[0] == goal.against
        and each.mode in (ours.mode, "")
        and each.median_ms
    ]
    for other in sorted(theirs, key=lambda each: not each.measured)[:1]:
        yield _label(other), median_ms / (other.median_ms or 0)


def _label(result: Result) -> str:
    """The contender's name, starred where its time is from elsewhere."""
    return result.contender if result.measured or result.contender == FLOOR else f"{result.contender}*"


def _tables(results: list[Result]) -> Iterator[Table]:
    """A table for each operator and shape: contenders down, directions and modes across. The host's have their own."""
    for place in dict.fromkeys(_table(result) for result in results):
        here = [result for result in results if _table(result) == place]
        modes = [mode for mode in timing.METHOD if any(result.mode == mode for result in here)]
        operator, shape, on_host = place
        unit = "microseconds of the host" if on_host else "ms"
        table = Table(
            "dtype",
            "",
            title=f"{operator} {shape}: {unit} (quartiles) and how many times omniops'",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        directions = [direction for direction in DIRECTIONS if any(result.direction == direction for result in here)]
        columns = [(direction, mode) for direction in directions for mode in modes]
        for direction, mode in columns:
            table.add_column(direction if len(modes) == 1 else f"{direction}, {mode}", justify="right", no_wrap=True)
        for dtype in dict.fromkeys(result.dtype for result in here):
            names = dict.fromkeys(_label(result) for result in here if result.dtype == dtype)
            for name in names:
                cells = []
                for direction, mode in columns:
                    row = {
                        _label(result): result
                        for result in here
                        if (result.dtype, result.direction) == (dtype, direction) and result.mode in (mode, "")
                    }
                    cells.append(_cell(row.get(name), row.get(OURS), 1e3 if on_host else 1))
                table.add_row(dtype if name == next(iter(names)) else "", name, *cells)
            table.add_section()
        yield table


def _table(result: Result) -> tuple[str, Shape, bool]:
    return result.operator, result.shape, result.mode == HOST


def _cell(result: Result | None, ours: Result | None, per_ms: float) -> str:
    if result is None or result.median_ms is None:
        return "" if result is None else "cannot run"
    cell = digits(result.median_ms * per_ms)
    if result.lower_quartile_ms is not None and result.upper_quartile_ms is not None:
        cell += f" ({digits(result.lower_quartile_ms * per_ms)}-{digits(result.upper_quartile_ms * per_ms)})"
    if ours is not None and ours.median_ms:
        cell += f" {result.median_ms / ours.median_ms:5.2f}x"
    return cell


def _goals(verdicts: list[Verdict]) -> Table:
    table = Table("goal", "shape", "dtype", "", "at most", "measured", "", box=SIMPLE_HEAD)
    for verdict in verdicts:
        unit = f"x {verdict.against}" if verdict.against else "us"
        table.add_row(
            f"{verdict.operator}: {verdict.goal}",
            str(verdict.shape),
            verdict.dtype,
            verdict.mode,
            f"{verdict.at_most:.3g} {unit}",
            f"{verdict.measured:.3g}",
            "[green]met[/]" if verdict.met else "[bold red]missed[/]",
        )
    return table


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python {os.path.relpath(program)}" if program.suffix == ".py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}"
