"""``omniops bench sam2``: SAM 2 on one device beside another, and beside the official package."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.benchmarking.circumstances import circumstances
from omniops.benchmarking.sam2 import (
    METHOD,
    OURS,
    PEERS,
    STEPS,
    VIDEOS,
    Clip,
    Time,
    contenders_on_devices,
    measure,
    noise,
    official_model,
    save_clip,
    speed_ups,
)
from omniops.cli.bench.options import (
    CompileOption,
    DevicesOption,
    FramesOption,
    JsonOption,
    ObjectsOption,
    PictureArgument,
    PlotOption,
    SecondsOfStepOption,
    SizeOption,
    VideoOption,
)
from omniops.cli.common import (
    CommandError,
    choose_device,
    load_sam2,
    output,
    progress,
    require_pictures,
    require_sam2,
)
from omniops.cli.errors import say
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, write_json, writing
from omniops.cli.pictures import read_picture
from omniops.cli.segment.model import config_file
from omniops.cli.segment.options import ImageSizeOption, Precision, PrecisionOption, require_image_size
from omniops.formatting import digits


def bench_sam2(
    picture: PictureArgument = None,
    model: SizeOption = "tiny",
    names: DevicesOption = None,
    video: VideoOption = None,
    frames: FramesOption = None,
    objects: ObjectsOption = None,
    precision: PrecisionOption = Precision.AUTO,
    compile_encoder: CompileOption = False,
    image_size: ImageSizeOption = None,
    seconds: SecondsOfStepOption = 2.0,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Time SAM 2 on one device beside another: set_image, predict of one click, and the two together.

    Weights are random, which take the time of any others: nothing is fetched. The official package, sam2, stands beside
    where it is installed, with the same weights and in the same dtype; the two take turns. Times are medians, of a
    video frames a second; --json has the quartiles.

    Example: omniops bench sam2 truck.jpg --devices cpu,mps --json sam2.json --plot sam2.png
    """
    chosen = _choose_devices(names)
    if video is None and (frames is not None or objects is not None):
        raise CommandError("--frames and --objects are of a video: name one by --video")
    require_image_size(image_size)
    require_picture("--plot", plot)
    require_new([json_file, plot], overwrite, [path for path in (picture, video) if path is not None])
    if plot is not None:
        require_pictures()
    require_sam2()
    say("loading SAM 2")
    load_sam2()
    config = config_file(model)
    pixels = noise() if picture is None else np.array(read_picture(picture))
    height, width = pixels.shape[:2]

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the official package's, of its missing extension, at every frame
        clip = None if video is None else _save_clip(video, frames or 16, objects or 1, Path(folder))
        official, note = official_model(config, image_size)
        dtype = None if precision is Precision.AUTO else getattr(torch, precision.value)
        times = _measure(config, chosen, pixels, clip, official, dtype, image_size, compile_encoder, seconds)

    what = f"SAM 2.1 {model}, {width} x {height} pixels"
    _print(times, chosen, what, note)
    report = {
        **_circumstances(chosen),
        "model": {"size": model, "image_size": image_size or 1024, "weights": "random"},
        "picture": {"file": "noise" if picture is None else picture.name, "width": width, "height": height},
        "video": video and clip and {"file": video.name, "frames": clip.frames, "objects": clip.objects},
        "method": METHOD,
        "results": [asdict(time) for time in times],
        "speed_up": speed_ups(times),
        "note": note,
    }
    _write(report, times, what, json_file, plot, overwrite)


def _circumstances(chosen: Sequence[torch.device]) -> dict[str, Any]:
    titles = {str(device): devices.title(device) for device in chosen}
    return {**circumstances(", ".join(titles.values()), PEERS), "devices": titles}


def _choose_devices(names: str | None) -> list[torch.device]:
    asked = ["cpu", "auto"] if names is None else [name.strip() for name in names.split(",")]
    chosen = list(dict.fromkeys(choose_device(name) for name in asked if name))
    if not chosen:
        raise CommandError("--devices must name a device")
    return chosen


def _save_clip(video: Path, frames: int, objects: int, folder: Path) -> Clip:
    try:
        return save_clip(video, frames, objects, folder)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None


def _measure(
    config: str,
    chosen: Sequence[torch.device],
    pixels: NDArray[np.uint8],
    clip: Clip | None,
    official: Any,
    dtype: torch.dtype | None,
    image_size: int | None,
    compile_encoder: bool,
    seconds: float,
) -> list[Time]:
    """All times, with a progress bar."""
    times: list[Time] = []
    with progress() as bar:
        task = bar.add_task("", total=len(chosen) * (2 if clip is None else 4))
        for finished in measure(
            config,
            chosen,
            pixels,
            clip,
            official=official,
            dtype=dtype,
            image_size=image_size,
            compile_encoder=compile_encoder,
            seconds=seconds,
            on_start=lambda name: bar.update(task, description=name),
        ):
            times += finished
            bar.advance(task)
    return times


def _print(times: Sequence[Time], chosen: Sequence[torch.device], what: str, note: str) -> None:
    console = output()
    for device in chosen:
        console.print(f"{device}: {devices.title(device)}", markup=False)
    console.print(_table(times, what))
    for failure in dict.fromkeys(
        (failure.contender, failure.device, failure.error) for failure in times if failure.error
    ):
        console.print("{} on {} cannot run: {}".format(*failure), style="yellow", markup=False, soft_wrap=True)
    if note:
        console.print(note, style="yellow", markup=False, soft_wrap=True)


def _write(
    report: dict[str, Any], times: Sequence[Time], what: str, json_file: Path | None, plot: Path | None, overwrite: bool
) -> None:
    if json_file is not None:
        write_json(json_file, report, overwrite, indent=1)
    if plot is not None:
        from omniops.benchmarking.sam2_plot import draw

        with writing(plot, overwrite) as temporary:
            draw(times, f"{what}, torch {torch.__version__}, {report['date'][:10]}", temporary)


def _table(times: Sequence[Time], what: str) -> Table:
    """The contenders on each device down, the steps across, and below how many times faster a device is."""
    steps = [step for step in STEPS if any(time.step == step for time in times)]
    table = Table("device", "dtype", "", box=SIMPLE_HEAD, title_justify="left")
    table.title = f"{what}: medians, and how many times omniops' time"
    for step in steps:
        table.add_column(VIDEOS.get(step, step), justify="right", no_wrap=True)
    found = {(time.device, time.contender, time.step): time for time in times}
    dtypes = {time.device: time.dtype for time in times}
    for device, contender in contenders_on_devices(times):
        if dtype := dtypes.pop(device, ""):
            table.add_section()
        cells = [_cell(found.get((device, contender, step)), found.get((device, OURS, step))) for step in steps]
        table.add_row(device if dtype else "", dtype, contender, *cells)
    table.add_section()
    for speed_up in speed_ups(times):
        ratios = [f"{speed_up['ratios'][step]:.1f}x" if step in speed_up["ratios"] else "" for step in steps]
        table.add_row(f"{speed_up['device']} over {speed_up['over']}", "", speed_up["contender"], *ratios, style="bold")
    return table


def _cell(time: Time | None, ours: Time | None) -> str:
    if time is None or time.median_ms is None:
        return "" if time is None else "cannot run"
    if time.step in VIDEOS:
        cell = f"{digits(1e3 / time.median_ms)} frames/s"
    else:
        cell = f"{digits(time.median_ms / 1e3)} s"
    if ours is not None and ours.median_ms and ours is not time:
        cell += f" {time.median_ms / ours.median_ms:5.2f}x"
    return cell
