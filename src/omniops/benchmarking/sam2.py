"""SAM 2 on one device beside another, and beside the official package."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omniops import device as devices
from omniops.benchmarking import timing
from omniops.formatting import dtype_name, first_line

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
PEERS = ("sam2", "av", "pillow")
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
            point = [(number + 1) / (self._clip.objects + 1) * self._clip.width, self._clip.height / 2]
            click = {"points": np.array([point], np.float32), "labels": np.array([1], np.int32)}
            self._predictor.add_new_points_or_box(self._state, frame_idx=0, obj_id=number, **click)
        for _, _, masks in self._predictor.propagate_in_video(self._state):
            (masks > 0).cpu()


@dataclass(frozen=True)
class Step:
    """What is timed: the call of each contender."""

    calls: dict[str, timing.Call] = field(default_factory=dict)
    frames: int = 1


def noise() -> NDArray[np.uint8]:
    """(H, W, 3), of the size ``NOISE``."""
    return np.random.default_rng(0).integers(0, 256, (*NOISE, 3), dtype=np.uint8)


def save_clip(video: Path, frames: int, objects: int, folder: Path) -> Clip:
    """Write the first frames of a video into a folder, from where both packages read them.

    Raises:
        FileNotFoundError: where there is no video.
        ValueError: where it cannot be read.
    """
    from PIL import Image

    from omniops.sam2.frames import Frames

    opened = Frames(video)
    count = min(frames, len(opened))
    for i in range(count):
        Image.fromarray(opened[i]).save(folder / f"{i:05}.jpg", quality=95)
    return Clip(folder, count, opened.width, opened.height, objects)


def measure(
    config: str,
    chosen: Sequence[torch.device],
    pixels: NDArray[np.uint8],
    clip: Clip | None = None,
    *,
    official: Any = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    compile_encoder: bool = False,
    seconds: float = 2.0,
    on_start: Callable[[str], object] = lambda name: None,
) -> Iterator[list[Time]]:
    """The times of each step on each device, as they are taken; with the last step on a device come the totals.

    Args:
        config: the official package's configuration, ``configs/sam2.1/sam2.1_hiera_t.yaml``; weights are random.
        chosen: the devices.
        pixels: of a picture, (H, W, 3) in uint8.
        clip: what objects are followed through, if anything.
        official: the official package's model on the CPU, as ``official_model`` gives it, or None.
        dtype: what is computed in; that of ``omniops.device.autocast_dtype`` where it is not given.
        image_size: the side of the square that the model sees.
        compile_encoder: whether omniops is also timed with its image encoder compiled.
        seconds: the time spent on each measurement, or three runs.
        on_start: called before each step with the device and its name.
    """
    for device in chosen:
        device_dtype = dtype or devices.autocast_dtype(device)
        contenders = build_contenders(config, official, device, device_dtype, image_size, compile_encoder)
        steps = build_steps(contenders, pixels, clip)
        on_device: list[Time] = []
        for number, (name, step) in enumerate(steps.items(), 1):
            on_start(f"{device} {name}")
            times = list(time_step(step, name, device, device_dtype, seconds))
            on_device += times
            yield times + (list(_totals(on_device)) if number == len(steps) else [])


def official_model(config: str, image_size: int | None) -> tuple[Any, str]:
    """The official package's model of random weights on the CPU; or none, and why."""
    if find_spec("sam2") is None:
        return None, "sam2, the official package, is not installed, so omniops stands alone: pip install sam2"
    overrides = []
    if image_size is not None:
        side = image_size // 16
        overrides = [
            f"++model.image_size={image_size}",
            *(
                f"++model.memory_attention.layer.{kind}_attention.feat_sizes=[{side},{side}]"
                for kind in ("self", "cross")
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
        return None, f"sam2 is installed but cannot be used, so omniops stands alone: {first_line(error)}"


def build_contenders(
    config: str,
    official: Any,
    device: torch.device,
    dtype: torch.dtype,
    image_size: int | None,
    compile_encoder: bool,
) -> Iterator[Contender]:
    """omniops, also compiled if wanted, and the official package if it is there, with the same weights."""
    from omniops.sam2 import SAM2ImagePredictor, build_sam2
    from omniops.sam2.video_predictor import SAM2VideoPredictor

    for name in (OURS, COMPILED) if compile_encoder else (OURS,):
        torch.manual_seed(0)
        compiled = name == COMPILED
        model = build_sam2(config, device=device, dtype=dtype, image_size=image_size, compile_encoder=compiled)
        if official is not None:
            model.load_state_dict(official.state_dict())
        yield Contender(name, SAM2ImagePredictor(model), SAM2VideoPredictor(model), nullcontext)
    if official is not None:
        predictor = import_module("sam2.sam2_image_predictor").SAM2ImagePredictor(official.to(device))
        predictor._bb_feat_sizes = [[official.image_size // stride] * 2 for stride in (4, 8, 16)]  # those of 1024
        yield Contender(OFFICIAL, predictor, official, functools.partial(devices.autocast, device, dtype))


def build_steps(contenders: Iterable[Contender], pixels: NDArray[np.uint8], clip: Clip | None) -> dict[str, Step]:
    """What is timed of a picture and, where there is one, of a clip, by the steps' names."""
    height, width = pixels.shape[:2]
    click = {"point_coords": np.array([[width / 2, height / 2]]), "point_labels": np.array([1])}
    steps = {SET_IMAGE: Step(), PREDICT: Step()}
    if clip is not None:
        steps |= {name: Step(frames=clip.frames) for name in VIDEOS}
    for contender in contenders:
        call = functools.partial(call_under, contender.precision)
        steps[SET_IMAGE].calls[contender.name] = functools.partial(call, contender.image.set_image, pixels)
        steps[PREDICT].calls[contender.name] = functools.partial(call, contender.image.predict, **click)
        if clip is not None:
            video = Video(contender.video, clip)
            for name, follow in ((VIDEO, video.open_and_follow), (OPEN, video.follow)):
                steps[name].calls[contender.name] = functools.partial(call, follow)
    return steps


def call_under(
    precision: Callable[[], AbstractContextManager[object]], call: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    """Call under what ``precision`` makes."""
    with precision():
        call(*args, **kwargs)


def time_step(step: Step, name: str, device: torch.device, dtype: torch.dtype, seconds: float) -> Iterator[Time]:
    """Each contender's times, or why it has none."""
    setting = (str(device), dtype_name(dtype))
    calls: dict[tuple[str, str], timing.Call] = {}
    for contender, call in step.calls.items():
        error = _warm_up(call, device, seconds / 2)
        if error:
            yield Time(*setting, contender, name, None, error=error)
        else:
            calls[contender, timing.CALL] = call
    for (contender, _), of_calls in timing.milliseconds(calls, device, seconds).items():
        of_frames = [milliseconds / step.frames for milliseconds in of_calls]
        lower, upper = timing.quartiles(of_frames)
        yield Time(*setting, contender, name, statistics.median(of_frames), lower, upper, len(of_frames))


def _warm_up(call: timing.Call, device: torch.device, seconds: float) -> str:
    """Run the call for a while; returns why it cannot run, if it cannot."""
    try:
        timing.warm_up(call, device, seconds)
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    return ""


def _totals(times: Sequence[Time]) -> Iterator[Time]:
    """The sum of set_image and predict by each contender that does both, from the times on one device."""
    medians = {(time.contender, time.step): time.median_ms for time in times}
    for time in times:
        second = medians.get((time.contender, PREDICT))
        if time.step == SET_IMAGE and time.median_ms is not None and second is not None:
            yield Time(time.device, time.dtype, time.contender, TOTAL, time.median_ms + second)


def speed_ups(times: Sequence[Time]) -> list[dict[str, Any]]:
    """How many times faster each contender is on each device than it is on the first, step by step."""
    medians = {(time.contender, time.device, time.step): time.median_ms for time in times}
    first, *others = dict.fromkeys(time.device for time in times)
    rows: list[dict[str, Any]] = []
    for device in others:
        for contender in CONTENDERS:
            ratios = {}
            for step in STEPS:
                slow, fast = (medians.get((contender, name, step)) for name in (first, device))
                if slow is not None and fast is not None:
                    ratios[step] = slow / fast
            if ratios:
                rows.append({"contender": contender, "device": device, "over": first, "ratios": ratios})
    return rows


def contenders_on_devices(times: Sequence[Time]) -> list[tuple[str, str]]:
    """Each device and contender, in the order in which they are shown."""
    timed = {(time.device, time.contender) for time in times}
    in_order = dict.fromkeys(time.device for time in times)
    return [(device, contender) for device in in_order for contender in CONTENDERS if (device, contender) in timed]
