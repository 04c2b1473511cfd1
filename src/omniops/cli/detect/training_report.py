"""What ``omniops detect-train`` says while it trains: progress on stderr, an epoch's figures on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from omniops.cli.common import Heartbeat, print_lines
from omniops.cli.errors import raise_received
from omniops.detection.training import BEST, LAST, Observer, Step, Training


class Reporter(Observer):
    """Of the first process; the others only look for signals.

    Args:
        training: told of.
        bar: that is running.
        out: where the checkpoints are.
    """

    def __init__(self, training: Training, bar: Progress, out: Path) -> None:
        self._epochs, self._out, self._bar = training.settings.epochs, out, bar
        self._is_first = training.processes.rank == 0
        self._task = bar.add_task("", total=training.steps, visible=self._is_first)
        self._heartbeat = Heartbeat(bar)

    def on_step(self, step: Step) -> None:
        """Show how far the epoch is."""
        text = f"epoch {step.epoch}/{self._epochs}, loss {step.loss:.3f}, {step.images_per_second:.3g} pictures/s"
        self._show(step.number, step.steps, text, f"step {step.number} of {step.steps} of {text}")

    def on_validation(self, done: int, total: int) -> None:
        """Show how far the judging is."""
        self._show(done, total, "average precision", f"average precision: {done} of {total} pictures")

    def on_epoch(self, record: Mapping[str, Any], is_best: bool) -> None:
        """Print the epoch's figures."""
        print_lines(summary(record, self._epochs, self._out / (BEST if is_best else LAST)), above=self._bar)

    def _show(self, done: int, total: int, description: str, note: str) -> None:
        raise_received()
        if self._is_first:
            self._bar.update(self._task, completed=done, total=total, description=description)
            self._heartbeat.beat(note)


def summary(record: Mapping[str, Any], epochs: int, path: Path) -> str:
    """An epoch's losses and figures in a line, and where it is kept.

    Example:
        >>> record = {"epoch": 2, "loss": 0.75, "losses": {"loss_classifier": 0.5, "loss_box_reg": 0.25}}
        >>> record["bbox"] = {"AP": 0.417, "AP50": 0.6}
        >>> summary(record, 12, Path("boats/best.pth"))
        'epoch 2/12: loss 0.750 (classifier 0.500, box_reg 0.250), box AP 41.7, AP50 60.0 -> boats/best.pth'
    """
    losses = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in record["losses"].items())
    parts = [f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.3f} ({losses})"]
    for name, kind in (("bbox", "box"), ("segm", "mask")):
        for figure in ("AP", "AP50") if name in record else ():
            value = record[name][figure]
            label = f"{kind} AP" if figure == "AP" else figure
            parts.append(f"{label} {'-' if value is None else f'{100 * value:.1f}'}")
    return f"{', '.join(parts)} -> {path}"
