"""``omniops bench sam2``: SAM 2 on one device beside another, and beside the official package."""

from __future__ import annotations

import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.cli import timing
from omniops.cli.bench import JsonOption, PlotOption, circumstances, quartiles
from omniops.cli.common import (
    DEVICE_NAMES,
    CommandError,
    choose_device,
    digits,
    dtype_name,
    load_sam2,
    output,
    progress,
    require_pictures,
    require_sam2,
)
from omniops.cli.errors import reason, say
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, write_json, writing
from omniops.cli.pictures import read_picture
from omniops.cli.segment_parts import (
    ImageSizeOption,
    Precision,
    PrecisionOption,
    configuration,
    require_image_size,
)

CONTENDERS = OURS, COMPILED, OFFICIAL = "omniops", "omniops, compiled", "sam2"
STEPS = SET_IMAGE, PREDICT, TOTAL, VIDEO, OPEN = (
    "set_image",
    "predict",
    "total",
    "video, a frame",
    "open video, a frame",
)
VIDEOS = {VIDEO: "video", OPEN: "open video"}

METHOD = {
    SET_IMAGE: "A picture in memory until its features are there.",
    PREDICT: "One click in the middle, until its three masks at the picture's size are in memory.",
    TOTAL: "The sum of these two medians.",
    VIDEO: "From opening a folder of JPEG pictures, a click for each object on the first, to the last masks, which are "
    "fetched into memory frame by frame; over the number of frames.",
    OPEN: "The same from the clicks on, of a video that was opened before: omniops decodes its frames on the way, sam2 "
    "has decoded them before.",
    OFFICIAL: "The official package with the same weights, under torch.autocast to the same dtype unless that is "
    "float32. Without its CUDA extension it leaves out the filling of holes in a video's masks.",
}
PEERS = ("transformers", "sam2", "av", "pillow")
NOISE = (1200, 1800)
"""The height and width of the picture that is made where none is given: those of the one in SAM 2's own examples."""


@dataclass(frozen=True)
class Time:
    """Of one step by one contender on one device, in milliseconds."""

    device: str
    dtype: str
    contender: str
    step: str
    median_ms: float | None
    lower_quartile_ms: float | None = None
    upper_quartile_ms: float | None = None
    samples: int = 0
    error: str = ""
    """Why there is no time."""


@dataclass(frozen=True)
class Contender:
    """The two predictors of a package, whose methods are called alike, ready on a device."""

    name: str
    image: Any
    video: Any
    precision: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Clip:
    """The first frames of a video, as JPEGs in a folder."""

    folder: Path
    frames: int
    width: int
    height: int
    objects: int


class Video:
    """A clip in a predictor, opened with the first call."""

    def __init__(self, predictor: Any, clip: Clip) -> None:
        self._predictor, self._clip = predictor, clip
        self._state: Any = None

    def open_and_follow(self) -> None:
        """From the opening to the last mask."""
        self._state = None
        self.follow()

    def follow(self) -> None:
        """From the clicks to the last mask."""
        if self._state is None:
            self._state = self._predictor.init_state(str(self._clip.folder))
        self._predictor.reset_state(self._state)
        for number in range(self._clip.objects):
            place = [(number + 1) / (self._clip.objects + 1) * self._clip.width, self._clip.height / 2]
            click = {"points": np.array([place], np.float32), "labels": np.array([1], np.int32)}
            self._predictor.add_new_points_or_box(self._state, frame_idx=0, obj_id=number, **click)
        for _, _, masks in self._predictor.propagate_in_video(self._state):
            (masks > 0).cpu()


@dataclass(frozen=True)
class Step:
    """What is timed: the call of each contender."""

    calls: dict[str, timing.Call] = field(default_factory=dict)
    frames: int = 1


def bench_sam2(
    picture: Annotated[
        Path | None, typer.Argument(metavar="IMAGE", help="Any picture; noise of 1800 x 1200 pixels without it.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="SIZE", help="tiny, small, base-plus or large; its weights are random.")
    ] = "tiny",
    names: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="D,D,...",
            help=f"Of {DEVICE_NAMES}; speed-ups are over the first.",
            show_default="the CPU, and the GPU where there is one",
        ),
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", help="Follow objects through this video as well.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", metavar="N", min=2, help="How many frames of it.", show_default="16")
    ] = None,
    objects: Annotated[
        int | None,
        typer.Option("--objects", metavar="N", min=1, help="How many objects, in one row.", show_default="1"),
    ] = None,
    precision: PrecisionOption = Precision.AUTO,
    compile_encoder: Annotated[
        bool, typer.Option("--compile", help="Also with the image encoder compiled, which takes minutes.")
    ] = False,
    image_size: ImageSizeOption = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="Time spent on each measurement, or three runs.")
    ] = 2.0,
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
    asked = ["cpu", "auto"] if names is None else [name.strip() for name in names.split(",")]
    chosen = list(dict.fromkeys(choose_device(name) for name in asked if name))
    if not chosen:
        raise CommandError("--devices must name a device")
    if video is None and (frames is not None or objects is not None):
        raise CommandError("--frames and --objects are of a video: name one by --video")
    require_image_size(image_size)
    require_picture("--plot", plot)
    require_new([json_file, plot], overwrite, [each for each in (picture, video) if each is not None])
    if plot is not None:
        require_pictures()
    require_sam2()
    say("loading SAM 2")
    load_sam2()
    config = configuration(model)
    pixels = _noise() if picture is None else np.array(read_picture(picture))
    height, width = pixels.shape[:2]

    times: list[Time] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the official package's, of its missing extension, at every frame
        clip = None if video is None else _clip(video, frames or 16, objects or 1, Path(folder))
        official, note = _official(config, image_size)
        with progress() as bar:
            task = bar.add_task("", total=len(chosen) * (2 if clip is None else 4))
            for device in chosen:
                auto = precision is Precision.AUTO
                dtype = devices.autocast_dtype(device) if auto else getattr(torch, precision.value)
                contenders = _contenders(config, official, device, dtype, image_size, compile_encoder)
                for name, step in _steps(contenders, pixels, clip).items():
                    bar.update(task, description=f"{device} {name}")
                    times += _timed(step, name, device, dtype, seconds)
                    bar.advance(task)
                times += list(_totals(times, str(device)))

    what = f"SAM 2.1 {model}, {width} x {height} pixels"
    console = output()
    for device in chosen:
        console.print(f"{device}: {devices.title(device)}", markup=False)
    console.print(_table(times, what))
    for each in dict.fromkeys((each.contender, each.device, each.error) for each in times if each.error):
        console.print("{} on {} cannot run: {}".format(*each), style="yellow", markup=False, soft_wrap=True)
    if note:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    titles = {str(device): devices.title(device) for device in chosen}
    followed = None
    if video is not None and clip is not None:
        followed = {"file": video.name, "frames": clip.frames, "objects": clip.objects}
    report = {
        **circumstances(", ".join(titles.values()), PEERS),
        "devices": titles,
        "model": {"size": model, "image_size": image_size or 1024, "weights": "random"},
        "picture": {"file": "noise" if picture is None else picture.name, "width": width, "height": height},
        "video": followed,
        "method": METHOD,
        "results": [asdict(each) for each in times],
        "speed_up": _speed_ups(times),
        "note": note,
    }
    if json_file is not None:
        write_json(json_file, report, overwrite, indent=1)
    if plot is not None:
        with writing(plot, overwrite) as part:
            _draw(times, f"{what}, torch {torch.__version__}, {report['date'][:10]}", part)


def _noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*NOISE, 3), dtype=np.uint8)


def _clip(video: Path, frames: int, objects: int, folder: Path) -> Clip:
    """The first frames of a video as JPEGs, which both packages read; the official one needs decord for videos."""
    from PIL import Image

    from omniops.sam2.frames import Frames

    try:
        opened = Frames(video)
        count = min(frames, len(opened))
        for i in range(count):
            Image.fromarray(opened[i]).save(folder / f"{i:05}.jpg", quality=95)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None
    return Clip(folder, count, opened.width, opened.height, objects)


def _official(config: str, image_size: int | None) -> tuple[Any, str]:
    """The official package's model of random weights on the CPU; or none, and why."""
    if find_spec("sam2") is None:
        return None, "sam2, the official package, is not installed, so omniops stands alone: pip install sam2"
    overrides = []
    if image_size is not None:
        places = image_size // 16
        overrides = [
            f"++model.image_size={image_size}",
            *(
                f"++model.memory_attention.layer.{part}_attention.feat_sizes=[{places},{places}]"
                for part in ("self", "cross")
            ),
        ]
    torch.manual_seed(0)
    try:
        build = import_module("sam2.build_sam").build_sam2_video_predictor
        for module in ("sam2.sam2_video_predictor", "sam2.utils.misc"):  # no bars of its own in ours
            loaded = import_module(module)
            loaded.tqdm = functools.partial(loaded.tqdm, disable=True)  # type: ignore[attr-defined]
        return build(config, device="cpu", hydra_overrides_extra=overrides), ""
    except Exception as error:  # of many types, whatever is called sam2 there
        return None, f"sam2 is installed but cannot be used, so omniops stands alone: {reason(error)}"


def _contenders(
    config: str,
    official: Any,
    device: torch.device,
    dtype: torch.dtype,
    image_size: int | None,
    compile_encoder: bool,
) -> Iterator[Contender]:
    from omniops.sam2 import SAM2ImagePredictor, build_sam2
    from omniops.sam2.checkpoints import from_meta
    from omniops.sam2.video_predictor import SAM2VideoPredictor

    for name in (OURS, COMPILED) if compile_encoder else (OURS,):
        torch.manual_seed(0)
        compiled = name == COMPILED
        model = build_sam2(config, device=device, dtype=dtype, image_size=image_size, compile_encoder=compiled)
        if official is not None:
            model.load_state_dict(from_meta(official.state_dict()))
        yield Contender(name, SAM2ImagePredictor(model), SAM2VideoPredictor(model), nullcontext)
    if official is not None:
        predictor = import_module("sam2.sam2_image_predictor").SAM2ImagePredictor(official.to(device))
        predictor._bb_feat_sizes = [[official.image_size // stride] * 2 for stride in (4, 8, 16)]  # those of 1024
        yield Contender(OFFICIAL, predictor, official, functools.partial(devices.autocast, device, dtype))


def _steps(contenders: Iterable[Contender], pixels: NDArray[np.uint8], clip: Clip | None) -> dict[str, Step]:
    height, width = pixels.shape[:2]
    click = {"point_coords": np.array([[width / 2, height / 2]]), "point_labels": np.array([1])}
    steps = {SET_IMAGE: Step(), PREDICT: Step()}
    if clip is not None:
        steps |= {name: Step(frames=clip.frames) for name in VIDEOS}
    for each in contenders:
        call = functools.partial(_call, each.precision)
        steps[SET_IMAGE].calls[each.name] = functools.partial(call, each.image.set_image, pixels)
        steps[PREDICT].calls[each.name] = functools.partial(call, each.image.predict, **click)
        if clip is not None:
            video = Video(each.video, clip)
            for name, follow in ((VIDEO, video.open_and_follow), (OPEN, video.follow)):
                steps[name].calls[each.name] = functools.partial(call, follow)
    return steps


def _call(
    precision: Callable[[], AbstractContextManager[object]], call: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    with precision():
        call(*args, **kwargs)


def _timed(step: Step, name: str, device: torch.device, dtype: torch.dtype, seconds: float) -> Iterator[Time]:
    setting = (str(device), dtype_name(dtype))
    calls: dict[tuple[str, str], timing.Call] = {}
    for contender, call in step.calls.items():
        error = _warmed_up(call, device, seconds / 2)
        if error:
            yield Time(*setting, contender, name, None, error=error)
        else:
            calls[contender, timing.CALL] = call
    for (contender, _), whole in timing.milliseconds(calls, device, seconds).items():
        taken = [each / step.frames for each in whole]
        lower, upper = quartiles(taken)
        yield Time(*setting, contender, name, statistics.median(taken), lower, upper, len(taken))


def _warmed_up(call: timing.Call, device: torch.device, seconds: float) -> str:
    """Why it cannot run, if it cannot."""
    try:
        timing.warm_up(call, device, seconds)
    except (RuntimeError, NotImplementedError) as error:
        return reason(error)
    return ""


def _totals(times: Sequence[Time], device: str) -> Iterator[Time]:
    medians = {(each.contender, each.step): each.median_ms for each in times if each.device == device}
    for each in times:
        second = medians.get((each.contender, PREDICT))
        if each.device == device and each.step == SET_IMAGE and each.median_ms is not None and second is not None:
            yield Time(device, each.dtype, each.contender, TOTAL, each.median_ms + second)


def _speed_ups(times: Sequence[Time]) -> list[dict[str, Any]]:
    """How many times faster each contender is on each device than it is on the first, step by step."""
    medians = {(each.contender, each.device, each.step): each.median_ms for each in times}
    first, *others = dict.fromkeys(each.device for each in times)
    found: list[dict[str, Any]] = []
    for device in others:
        for contender in CONTENDERS:
            ratios = {}
            for step in STEPS:
                slow, fast = (medians.get((contender, where, step)) for where in (first, device))
                if slow is not None and fast is not None:
                    ratios[step] = slow / fast
            if ratios:
                found.append({"contender": contender, "device": device, "over": first, "ratios": ratios})
    return found


def _rows(times: Sequence[Time]) -> list[tuple[str, str]]:
    """Each device and contender, in the order in which they are shown."""
    there = {(each.device, each.contender) for each in times}
    on = dict.fromkeys(each.device for each in times)
    return [(device, contender) for device in on for contender in CONTENDERS if (device, contender) in there]


def _table(times: Sequence[Time], what: str) -> Table:
    """The contenders on each device down, the steps across, and below how many times faster a device is."""
    steps = [step for step in STEPS if any(each.step == step for each in times)]
    table = Table("device", "dtype", "", box=SIMPLE_HEAD, title_justify="left")
    table.title = f"{what}: medians, and how many times omniops' time"
    for step in steps:
        table.add_column(VIDEOS.get(step, step), justify="right", no_wrap=True)
    found = {(each.device, each.contender, each.step): each for each in times}
    dtypes = {each.device: each.dtype for each in times}
    for device, contender in _rows(times):
        if dtype := dtypes.pop(device, ""):
            table.add_section()
        cells = [_cell(found.get((device, contender, step)), found.get((device, OURS, step))) for step in steps]
        table.add_row(device if dtype else "", dtype, contender, *cells)
    table.add_section()
    for each in _speed_ups(times):
        ratios = [f"{each['ratios'][step]:.1f}x" if step in each["ratios"] else "" for step in steps]
        table.add_row(f"{each['device']} over {each['over']}", "", each["contender"], *ratios, style="bold")
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


def _draw(times: Sequence[Time], title: str, path: Path) -> None:
    """A bar for each contender on each device: set_image, and predict on top of it; of a video another."""
    from matplotlib.figure import Figure

    steps = {each.step for each in times if each.median_ms is not None}
    panels = [[SET_IMAGE, PREDICT], *([name] for name in VIDEOS if name in steps)]
    seconds = {(each.device, each.contender, each.step): (each.median_ms or 0) / 1e3 for each in times}
    rows = _rows(times)
    figure = Figure(figsize=(2 + 5 * len(panels), 1.6 + 0.4 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, shown in zip(axes, panels, strict=True):
        ends = [0.0] * len(rows)
        for step, colour in zip(shown, ("#1f5fa8", "#e07b28"), strict=False):
            lengths = [seconds.get((*row, step), 0.0) for row in rows]
            axis.barh(range(len(rows)), lengths, left=ends, color=colour, label=step)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for y, end in enumerate(ends):
            written = f"{digits(end)} s" if end else "cannot run"
            axis.annotate(written, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [f"{contender}, {device}" for device, contender in rows], fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, max(ends) * 1.25 or 1)
        axis.set_xlabel("seconds", fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Median times, less is better\n{title}", fontsize=11)
    figure.savefig(path)
