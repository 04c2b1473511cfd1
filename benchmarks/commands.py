"""How many frames and pictures a second ``omniops segment`` and ``omniops detect`` do, as processes of their own.

The weights are random, and the pictures parts of a photo and of a clip that are made here, or --photo and --video: what
is found means nothing, but it costs at least what real masks cost. Of a video two lengths are timed, the clip and four
times the clip, after a first run that compiles: what is between them, "steady", is without the first calls. Of pictures
that is the time from the second quarter on. Loading PyTorch and the model is in neither.

python benchmarks/commands.py --video clip.mp4 --photo photo.jpg --json commands.json
"""

from __future__ import annotations

import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.cli import errors
from omniops.cli.common import DeviceOption, choose_device, output
from omniops.cli.detect.options import Model
from omniops.cli.errors import CommandError, say
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.drawing import VideoWriter
from omniops.environment import installed, machine, versions
from omniops.sam2.frames import Frames

WIDTH, HEIGHT = 1280, 720
BATCHES = (1, 4)
REPEATS = 4
"""How many times as long as the clip the second video is."""
COMMAND = [sys.executable, "-u", "-c", "from omniops.cli import main; main()"]


def main(
    video: Annotated[
        Path | None, typer.Option(help="A clip; by default a moving disc, 1280 x 720, 25 frames/s.")
    ] = None,
    photo: Annotated[Path | None, typer.Option(help="A photo; by default noise and discs.")] = None,
    device: DeviceOption = None,
    frames: Annotated[int, typer.Option(min=2, help="Of the clip, at most.")] = 250,
    pictures: Annotated[int, typer.Option(min=8, help="How many.")] = 200,
    model: Annotated[str, typer.Option(help="The size of SAM 2.")] = "tiny",
    detects: Annotated[bool, typer.Option("--detect/--no-detect", help="Time omniops detect too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Time omniops segment and omniops detect by command."""
    require_new([json], overwrite)
    chosen = choose_device(device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        say("making the videos and pictures")
        folder = Path(name)
        clips = write_clips(folder, video, frames)
        write_pictures(folder / "pictures", photo, pictures)
        for row in measure(folder, clips, ["--device", str(chosen), "--overwrite"], model, detects):
            say(f"{row['what']}: {row['steady']:.1f} a second")
            rows.append(row)
    output().print(table(rows))
    if json is not None:
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
            "device": devices.title(chosen),
            "hardware": {**machine(), "threads": torch.get_num_threads()},
            "versions": {**versions(), **installed(("torchvision", "av", "pillow"))},
            "rows": rows,
        }
        write_json(json, report, overwrite, indent=1)


def measure(
    folder: Path, clips: Sequence[Path], options: Sequence[str], model: str, detects: bool
) -> Iterator[dict[str, Any]]:
    """A row for each command."""
    sam2 = ["--random-weights", "--model", model, *options]
    for count in (1, 3):
        yield time_video(f"segment, video, objects: {count}", clips, count, sam2, folder)
    pictures = str(folder / "pictures")
    for what, save in (("mask, overlay, json", []), ("json", ["--save", "json"])):
        point = f"{WIDTH // 3},{HEIGHT // 3}"
        arguments = ["segment", pictures, "--pictures", "--point", point, *save, *sam2]
        yield time_pictures(f"segment, pictures: {what}", arguments, folder)
    for kind, batch in ((kind, batch) for kind in Model for batch in BATCHES if detects):
        arguments = ["detect", pictures, "--random-weights", "--model", kind.value, "--batch", str(batch), *options]
        yield time_pictures(f"detect, {kind.value}, --batch {batch}", arguments, folder)


def write_clips(folder: Path, source: Path | None, count: int) -> list[Path]:
    """A clip, and one that is it several times."""
    found = (frame for _, frame in zip(range(count), Frames(source), strict=False)) if source else moving_disc(count)
    frames = [np.array(frame) for frame in found]
    paths = [folder / "clip.mp4", folder / "long.mp4"]
    for path, repeats in zip(paths, (1, REPEATS), strict=True):
        with VideoWriter(path, fps=25) as writer:
            for frame in frames * repeats:
                writer.write(frame)
    return paths


def moving_disc(count: int) -> Iterator[NDArray[np.uint8]]:
    """Frames of a disc that moves over noise."""
    background = np.random.default_rng(0).integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for i in range(count):
        frame = background.copy()
        frame[(y - HEIGHT // 2) ** 2 + (x - WIDTH // 3 - 2 * i % (WIDTH // 2)) ** 2 < (HEIGHT // 5) ** 2] = 220, 120, 60
        yield frame


def write_pictures(folder: Path, photo: Path | None, count: int) -> None:
    """The photo, or a frame of a disc, turned a little more each time."""
    folder.mkdir()
    picture = Image.open(photo).convert("RGB") if photo else Image.fromarray(next(moving_disc(1)))
    picture = picture.resize((WIDTH, HEIGHT))
    for i in range(count):
        picture.rotate(i / 10).save(folder / f"{i:04d}.jpg", quality=90)


def time_video(name: str, clips: Sequence[Path], objects: int, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Frames a second of a clip as it is told, and of the part by which the other is longer."""
    prompts = [f"{WIDTH * (i + 1) // 4},{HEIGHT // 2}#{i + 1}" for i in range(objects)]
    points = [part for prompt in prompts for part in ("--point", prompt)]
    counts, seconds = [], []
    for clip in (clips[0], *clips):  # a first run compiles what the others find in its caches
        lines = run(["segment", str(clip), *points, *options, "--out", str(folder / "out.mp4")])
        told = next(found for _, line in lines if (found := re.match(r"(\d+) of \d+ frames in ([\d.]+) s", line)))
        counts.append(int(told[1]))
        seconds.append(float(told[2]))
    steady = (counts[2] - counts[1]) / (seconds[2] - seconds[1])
    speeds = [count / time for count, time in zip(counts, seconds, strict=True)]
    return {"what": name, "count": counts[1:], "a second": speeds[1:], "steady": steady}


def time_pictures(name: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Pictures a second between the first line and the last, and from the second quarter on."""
    done = [when for when, line in run([*arguments, "--out", str(folder / "out")]) if " -> " in line]
    quarter = len(done) // 4
    rate, steady = ((len(done) - first - 1) / (done[-1] - done[first]) for first in (0, quarter))
    return {"what": name, "count": [len(done)], "a second": [rate], "steady": steady}


def run(arguments: Sequence[str]) -> list[tuple[float, str]]:
    """The lines of a command's results, and when each came."""
    with tempfile.TemporaryFile("w+") as notes:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=notes, text=True)
        assert process.stdout is not None
        lines = [(perf_counter(), line) for line in process.stdout]
        if process.wait():
            notes.seek(0)
            raise CommandError(f"omniops {shlex.join(arguments)} failed: {notes.read().strip()}", status=1)
    return lines


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as they are printed."""
    printed = Table("", "frames or pictures", "a second", "steady", box=SIMPLE_HEAD)
    for row in rows:
        speeds = ", ".join(f"{speed:.1f}" for speed in row["a second"])
        printed.add_row(row["what"], ", ".join(map(str, row["count"])), speeds, f"{row['steady']:.1f}")
    return printed


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
