"""The plot of SAM 2's times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from omniops.benchmarking.sam2 import PREDICT, SET_IMAGE, VIDEOS, Time, contenders_on_devices
from omniops.formatting import digits


def draw(times: Sequence[Time], title: str, path: Path) -> None:
    """A bar for each contender on each device: set_image, and predict on top of it; of a video another."""
    steps = {time.step for time in times if time.median_ms is not None}
    panels = [[SET_IMAGE, PREDICT], *([name] for name in VIDEOS if name in steps)]
    seconds = {(time.device, time.contender, time.step): (time.median_ms or 0) / 1e3 for time in times}
    bars = contenders_on_devices(times)
    figure = Figure(figsize=(2 + 5 * len(panels), 1.6 + 0.4 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, shown in zip(axes, panels, strict=True):
        ends = [0.0] * len(bars)
        for step, colour in zip(shown, ("#1f5fa8", "#e07b28"), strict=False):
            lengths = [seconds.get((*row, step), 0.0) for row in bars]
            axis.barh(range(len(bars)), lengths, left=ends, color=colour, label=step)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for y, end in enumerate(ends):
            written = f"{digits(end)} s" if end else "cannot run"
            axis.annotate(written, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), [f"{contender}, {device}" for device, contender in bars], fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, max(ends) * 1.25 or 1)
        axis.set_xlabel("seconds", fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Median times, less is better\n{title}", fontsize=11)
    figure.savefig(path)
