"""The picture of ``omniops bench``: times as dots, a row of panels for each operator and shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from omniops.benchmarking.contenders import DIRECTIONS, FLOOR, OURS
from omniops.benchmarking.operators import Result
from omniops.benchmarking.timing import CALL, GRAPH, HOST
from omniops.formatting import digits

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from omniops.benchmarking.contenders import Shape

_COLOURS = {"float32": "#1f5fa8", "tf32": "#7b5ea7", "float16": "#e07b28", "bfloat16": "#5a9a57"}
_SPARE_COLOUR = "#7f7f7f"


def draw(results: list[Result], subtitle: str, origin: str, path: Path) -> None:
    """Draw the medians, with the quartiles as whiskers and the byte floor as a mark; the host's in rows of their own.

    On CUDA the others are those of the graphs, or of calls where there is no graph.
    """
    mode = GRAPH if any(result.mode == GRAPH for result in results) else CALL
    shown = [result for result in results if result.mode in (mode, HOST, "") and result.median_ms is not None]
    if mode == GRAPH:
        captured = {_timed_call(result) for result in shown}
        calls = [result for result in results if result.mode == CALL and result.median_ms is not None]
        shown += [
            replace(result, contender=f"{result.contender} (a call)")
            for result in calls
            if _timed_call(result) not in captured
        ]
    rows = list(dict.fromkeys(_row_of(result) for result in shown))
    heights = [_height([result for result in shown if _row_of(result) == row]) for row in rows]
    directions = [direction for direction in DIRECTIONS if any(result.direction == direction for result in shown)]
    figure = Figure(figsize=(2 + 5 * len(directions), 1.4 + sum(heights)), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + len(rows), len(directions), height_ratios=[0.3, *heights])
    panels = [
        [figure.add_subplot(grid[1 + row, column]) for column in range(len(directions))] for row in range(len(rows))
    ]
    for row, axes in zip(rows, panels, strict=True):
        operator, shape, on_host = row
        for direction, axis in zip(directions, axes, strict=True):
            in_panel = [result for result in shown if (*_row_of(result), result.direction) == (*row, direction)]
            if not in_panel:  # no gradients
                axis.set_visible(False)
                continue
            _draw_panel(axis, in_panel, on_host)
            axis.set_title(f"{operator} {shape}\n{direction}{', the host' if on_host else ''}", fontsize=10, loc="left")
    handles_by_label: dict[str, Artist] = {}
    for axis in (axis for axes in panels for axis in axes):
        handles, labels = axis.get_legend_handles_labels()
        handles_by_label.update(zip(labels, handles, strict=True))
    # A row of its own, for beside the title or the footnote it would lie over them.
    legend = figure.add_subplot(grid[0, :])
    legend.set_axis_off()
    legend.legend(
        list(handles_by_label.values()),
        list(handles_by_label),
        loc="center",
        ncols=len(handles_by_label),
        frameon=False,
        fontsize=9,
    )
    what = "kernels' own time" if mode == GRAPH else "time of a call"
    figure.suptitle(f"{what[0].upper()}{what[1:]}, median and quartiles, less is better\n{subtitle}", fontsize=11)
    if origin:
        figure.supxlabel(f"* {origin}", fontsize=8)
    figure.savefig(path)


def _row_of(result: Result) -> tuple[str, Shape, bool]:
    return result.operator, result.shape, result.mode == HOST


def _height(results: list[Result]) -> float:
    """A row's, in inches."""
    dtypes, names = {result.dtype for result in results}, {result.contender for result in results} - {FLOOR}
    return 0.9 + 0.21 * (len(dtypes) + 0.8) * len(names)


def _timed_call(result: Result) -> tuple[object, ...]:
    """What is timed, in whatever mode."""
    return *result.setting, result.contender


def _draw_panel(axis: Axes, results: list[Result], on_host: bool) -> None:
    per_ms, unit = (1e3, "microseconds") if on_host else (1, "ms")
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    names = list(dict.fromkeys(result.contender for result in results if result.contender != FLOOR))
    step = len(dtypes) + 0.8
    longest = max((result.upper_quartile_ms or result.median_ms or 0 for result in results), default=1)
    for i, dtype in enumerate(dtypes):
        colour = _COLOURS.get(dtype, _SPARE_COLOUR)
        for result in results:
            if result.dtype != dtype or result.median_ms is None:
                continue
            if result.contender == FLOOR:
                y = names.index(OURS) * step + i
                axis.plot(
                    [result.median_ms] * 2, [y - 0.6, y + 0.6], color="black", lw=1.6, label=FLOOR if i == 0 else None
                )
                continue
            y = names.index(result.contender) * step + i
            whiskers = None
            if result.lower_quartile_ms is not None and result.upper_quartile_ms is not None:
                whiskers = [
                    [result.median_ms - result.lower_quartile_ms],
                    [result.upper_quartile_ms - result.median_ms],
                ]
            # A dot, not a bar: on a logarithmic axis the length of a bar says nothing.
            axis.errorbar(
                result.median_ms, y, xerr=whiskers, fmt="o", ms=5, capsize=2, color=colour,
                mfc=colour if result.measured else "white", label=dtype if result.contender == OURS else None,
            )  # fmt: skip
            axis.annotate(
                digits(result.median_ms * per_ms), (max(result.median_ms, result.upper_quartile_ms or 0), y),
                xytext=(6, 0), textcoords="offset points", va="center", fontsize=7.5,
            )  # fmt: skip
    starred = {result.contender for result in results if not result.measured}
    axis.set_yticks(
        [i * step + (len(dtypes) - 1) / 2 for i in range(len(names))],
        [f"{name}*".replace(", ", ",\n") if name in starred else name for name in names],
        fontsize=9,
    )
    axis.set_ylim(len(names) * step - 1.1, -0.7)  # the first on top
    axis.set_xscale("log")
    axis.set_xlim(right=longest * 3)
    axis.set_xlabel(unit, fontsize=8, labelpad=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_major_formatter(lambda ms, _: f"{ms * per_ms:g}")
    axis.xaxis.set_minor_formatter("")  # whose labels lie over each other where the axis is short
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
