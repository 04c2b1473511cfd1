"""The tables of ``omniops bench``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops.benchmarking.contenders import DIRECTIONS, OURS, Shape
from omniops.benchmarking.goals import Verdict
from omniops.benchmarking.operators import Result
from omniops.benchmarking.timing import HOST, METHOD
from omniops.formatting import digits


def result_tables(results: Sequence[Result]) -> Iterator[Table]:
    """A table for each operator and shape: contenders down, directions and modes across. The host's have their own."""
    for key in dict.fromkeys(_table_of(result) for result in results):
        yield _result_table(*key, [result for result in results if _table_of(result) == key])


def _table_of(result: Result) -> tuple[str, Shape, bool]:
    """What the results of one table have in common: the operator, the shape, and whether the host is timed."""
    return result.operator, result.shape, result.mode == HOST


def _result_table(operator: str, shape: Shape, on_host: bool, results: Sequence[Result]) -> Table:
    modes = [mode for mode in METHOD if any(result.mode == mode for result in results)]
    unit = "microseconds of the host" if on_host else "ms"
    table = Table(
        "dtype",
        "",
        title=f"{operator} {shape}: {unit} (quartiles) and how many times omniops'",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    directions = [direction for direction in DIRECTIONS if any(result.direction == direction for result in results)]
    columns = [(direction, mode) for direction in directions for mode in modes]
    for direction, mode in columns:
        table.add_column(direction if len(modes) == 1 else f"{direction}, {mode}", justify="right", no_wrap=True)
    for dtype in dict.fromkeys(result.dtype for result in results):
        labels = list(dict.fromkeys(result.label for result in results if result.dtype == dtype))
        for label in labels:
            cells = []
            for direction, mode in columns:
                column = {
                    result.label: result
                    for result in results
                    if (result.dtype, result.direction) == (dtype, direction) and result.mode in (mode, "")
                }
                cells.append(_cell(column.get(label), column.get(OURS), 1e3 if on_host else 1))
            table.add_row(dtype if label == labels[0] else "", label, *cells)
        table.add_section()
    return table


def _cell(result: Result | None, ours: Result | None, per_ms: float) -> str:
    if result is None or result.median_ms is None:
        return "" if result is None else "cannot run"
    cell = digits(result.median_ms * per_ms)
    if result.lower_quartile_ms is not None and result.upper_quartile_ms is not None:
        cell += f" ({digits(result.lower_quartile_ms * per_ms)}-{digits(result.upper_quartile_ms * per_ms)})"
    if ours is not None and ours.median_ms:
        cell += f" {result.median_ms / ours.median_ms:5.2f}x"
    return cell


def goal_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each goal in each setting."""
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
