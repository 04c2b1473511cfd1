"""``omniops segment``: SAM 2 on a picture or through a video, from clicks and boxes or of everything."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import Progress, TimeRemainingColumn

from omniops import device as devices
from omniops.cli.common import (
    CommandError,
    DeviceOption,
    choose_device,
    digits,
    dtype_name,
    output,
    progress,
    require_sam2,
    require_writable,
)
from omniops.cli.pictures import read_picture
from omniops.cli.segment_parts import (
    ImageSizeOption,
    Mask,
    Precision,
    PrecisionOption,
    Prompts,
    VideoWriter,
    Written,
    as_picture,
    check,
    configuration,
    draw_prompts,
    grouped,
    is_picture,
    line,
    load_model,
    paint,
    parse,
    require_image_size,
    require_not_input,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Sam2VideoModel

    from omniops.sam2.frames import Frames
    from omniops.sam2.video_predictor import SAM2VideoPredictor

Record = dict[str, Any]
Load = Callable[[], "Sam2VideoModel"]

_NOT_FINITE = "the scores or masks are no finite numbers: are the weights damaged, or another model's?"


def segment(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE|VIDEO", help="A picture, a video, or a folder of a video's frames.")
    ],
    points: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            metavar="X,Y[,LABEL][@FRAME][#OBJECT]",
            help="A place in pixels from the top left; LABEL 1, of the object, or 0, not of it. May be repeated.",
            show_default=False,
        ),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="X0,Y0,X1,Y1[@FRAME][#OBJECT]",
            help="Around an object, from the top left corner to the bottom right one. May be repeated.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Instead of prompts: every mask that a grid of points finds.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="M",
            help="tiny, small, base-plus or large, which are fetched once; Meta's .pt or its URL, a folder, a hub id.",
        ),
    ] = "tiny",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="To see it run without any: its masks mean nothing.")
    ] = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.AUTO,
    image_size: ImageSizeOption = None,
    grid: Annotated[
        int, typer.Option("--grid", metavar="N", min=1, help="The points along a side of the grid of --everything.")
    ] = 32,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="What to write: a .png of a picture, a .mp4 of a video.",
            show_default="omniops-mask.png or .mp4",
        ),
    ] = None,
) -> None:
    """Cut objects out of a picture, or follow them through a video, with SAM 2.

    Of a picture, FILE.png gets the mask: white inside, or with several objects the number of the object at each pixel.
    Beside it FILE-overlay.jpg shows it on the picture, and FILE.json has each object's mask as COCO's run lengths, with
    its area and score. Of the three masks that one click may mean the one with the best score is taken.

    Of a video, FILE.mp4 shows the masks on it, without sound, and FILE.json has them by frame and object. Prompts are
    of the frame after the @; without one of frame 0, the first. Objects are followed from the earliest of these frames
    back to the beginning, then on to the end. A video that breaks off, or Ctrl-C, keeps the masks until there.

    What follows a # tells objects apart, from 1 on. Places are those of a picture as it is shown: turned as its camera
    was.

    Example: omniops segment truck.jpg --point 500,375

    Example: omniops segment truck.jpg --box 425,600,700,875 --point 575,750,0 --point 1200,500#2 --out two.png

    Example: omniops segment juggle.mp4 --point 620,250@0 --point 640,300,0@30 --out followed.mp4
    """
    chosen = choose_device(device)
    written = parse(points or [], boxes or [])
    if everything and written:
        raise CommandError("--everything takes no --point and no --box")
    if not everything and not written:
        raise CommandError("nothing to look for: give --point X,Y or --box X0,Y0,X1,Y1, or --everything")
    require_image_size(image_size)
    if not source.exists():
        raise CommandError(f"no such file: {source}")
    require_sam2()
    if random_weights:
        configuration(model)

    def load() -> Sam2VideoModel:
        return load_model(model, random_weights, chosen, precision, image_size)

    if source.is_dir() or not is_picture(source):
        if everything:
            raise CommandError(f"--everything is for pictures, and {source} is none that Pillow can read")
        _follow(source, written, load, out or Path("omniops-mask.mp4"))
    else:
        _cut_out(source, written, grid if everything else None, load, out or Path("omniops-mask.png"))


def _cut_out(source: Path, written: list[Written], grid: int | None, load: Load, out: Path) -> None:
    """Segment a picture by prompts, or with a grid of points everything on it."""
    overlay = out.with_name(f"{out.stem}-overlay.jpg")
    results = _require_outputs(out, ".png", source, overlay)
    picture = read_picture(source)
    check(written, source, picture.width, picture.height, None)
    prompts = {number: each for (_, number), each in grouped(written).items()}
    pixels = np.array(picture)
    model = load()
    try:
        if grid is None:
            records, lines = _by_prompts(model, pixels, prompts)
        else:
            records, lines = _everything(model, pixels, grid)
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        raise CommandError(f"a picture of {picture.width} x {picture.height} pixels: {line(error)}", 1) from None

    from PIL import Image

    order = _largest_first(records)
    numbers = [int(each["id"]) for each in order]
    try:
        as_picture(numbers, _masks(order), picture.height, picture.width).save(out)
        paint(pixels, zip(numbers, _masks(order), strict=True))
        Image.fromarray(draw_prompts(pixels, prompts)).save(overlay, quality=90)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {out} and {overlay}: {error}", status=1) from None
    _write(records, results)
    _print(*lines, f"Wrote {out}, {overlay} and {results}")


def _by_prompts(
    model: Sam2VideoModel, pixels: NDArray[np.uint8], prompts: Mapping[int, Prompts]
) -> tuple[list[Record], list[str]]:
    """A record of each object, and what is to be said."""
    from omniops.sam2 import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(model)
    started = perf_counter()
    predictor.set_image(pixels)
    devices.synchronize(predictor.device)
    encoded = perf_counter()
    records, lines = [], []
    for number, each in prompts.items():
        masks, scores, _ = predictor.predict(
            each.points or None, each.labels or None, each.box, multimask_output=each.is_one_click
        )
        if not np.isfinite(scores).all():
            raise ValueError(_NOT_FINITE)
        best = int(scores.argmax())
        record = _record(number, masks[best])
        record["predicted_iou"] = float(scores[best])
        if each.points:
            record |= {"point_coords": each.points, "point_labels": each.labels}
        if each.box:
            record["box"] = each.box
        records.append(record)
        lines.append(f"object {number}: score {scores[best]:.3f}, {record['area']} pixels ({masks[best].mean():.1%})")
    predicted = perf_counter()
    lines.append(f"set_image {digits(encoded - started)} s, predict {digits(predicted - encoded)} s on {_where(model)}")
    return records, lines


def _everything(model: Sam2VideoModel, pixels: NDArray[np.uint8], grid: int) -> tuple[list[Record], list[str]]:
    """A record of each mask, and what is to be said."""
    from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator

    generator = SAM2AutomaticMaskGenerator(model, points_per_side=grid, output_mode="coco_rle")
    started = perf_counter()
    with progress(TimeRemainingColumn()) as bar:
        task = bar.add_task("points", total=grid**2)
        found = generator.generate(pixels, progress=lambda done, total: bar.update(task, completed=done, total=total))
    seconds = perf_counter() - started
    records = [{"id": i, **each} for i, each in enumerate(found, start=1)]
    return records, [f"{len(found)} masks of {grid**2} points in {digits(seconds)} s on {_where(model)}"]


def _follow(source: Path, written: list[Written], load: Load, out: Path) -> None:
    """Segment a video, and write it with its masks as they come."""
    results = _require_outputs(out, ".mp4", source)
    with _complaints() as at_opening:
        video = _opened(source)
    check(written, source, video.width, video.height, len(video))
    prompts = grouped(written)

    from omniops.sam2.video_predictor import SAM2VideoPredictor

    predictor = SAM2VideoPredictor(load())
    writer = VideoWriter(out, video.fps)
    records: list[Record] = []
    frames = 0
    stopped: BaseException | None = None
    started = perf_counter()
    with _complaints() as on_the_way:
        try:
            with progress(TimeRemainingColumn()) as bar:
                seen = _counting(bar, len(video))
                for frame, pixels, found in _through(predictor, source, prompts, seen):
                    records += found
                    frames += 1
                    order = _largest_first(found)
                    paint(pixels, zip((each["id"] for each in order), _masks(order), strict=True))
                    here = {number: each for (at, number), each in prompts.items() if at == frame}
                    writer.write(draw_prompts(pixels, here))
        except (
            KeyboardInterrupt,
            CommandError,
            RuntimeError,
            ValueError,
            OSError,
        ) as error:
            # What was found so far is kept.
            stopped = error
    seconds = perf_counter() - started
    try:
        writer.close()
    except CommandError as error:
        stopped = stopped or error
    if frames:
        _write(records, results)
        speed = f"{frames} of {len(video)} frames in {digits(seconds)} s, {frames / seconds:.2f} frames/s"
        _print(f"{speed}, on {_where(predictor.model)}", f"Wrote {out} and {results}")
    for each in dict.fromkeys(at_opening + on_the_way):
        print(each, file=sys.stderr)
    kept = f"the masks of {frames} of {len(video)} frames were kept"
    if isinstance(stopped, KeyboardInterrupt):
        raise CommandError(f"interrupted: {kept}", status=130)
    if stopped is not None:
        raise CommandError(f"{line(stopped)}: {kept}", status=1)
    if at_opening or frames < len(video):
        raise CommandError(f"{source} breaks off: {kept}", status=1)


def _opened(source: Path) -> Frames:
    from omniops.sam2.frames import Frames

    try:
        return Frames(source)
    except ValueError as error:
        nor = "" if source.is_dir() else "; nor is it a picture that Pillow can read"
        raise CommandError(f"{error}{nor}") from None


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What is warned of meanwhile: where a video breaks off or is damaged. It is there at the end."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield said
        finally:
            said += [str(each.message) for each in caught if each.category is UserWarning]


def _counting(bar: Progress, total: int) -> Callable[[], None]:
    """To be called at each of so many frames."""
    task = bar.add_task("", total=total)
    started = perf_counter()

    def seen() -> None:
        done = bar.tasks[0].completed + 1
        bar.update(task, completed=done, description=f"{done / (perf_counter() - started):.2f} frames/s")

    return seen


def _through(
    predictor: SAM2VideoPredictor, source: Path, prompts: Mapping[tuple[int, int], Prompts], seen: Callable[[], None]
) -> Iterator[tuple[int, NDArray[np.uint8], list[Record]]]:
    """Each frame of a video in order, and a record of each object on it; ``seen`` is called as they are found."""
    state = predictor.init_state(source)
    for (frame, number), each in prompts.items():
        predictor.add_new_points_or_box(state, frame, number, each.points or None, each.labels or None, box=each.box)
    first = min(frame for frame, _ in prompts)
    before: dict[int, list[Record]] = {}
    stopped: BaseException | None = None
    try:
        for frame, numbers, logits in predictor.propagate_in_video(state, first, reverse=True):
            before[frame] = _records(frame, numbers, logits)
            seen()
    except (KeyboardInterrupt, CommandError, RuntimeError, ValueError, OSError) as error:
        stopped = error
    for frame, found in sorted(before.items()):
        yield frame, state.frames[frame], found
    if stopped is not None:
        raise stopped
    for frame, numbers, logits in predictor.propagate_in_video(state, first):
        if frame not in before:
            found = _records(frame, numbers, logits)
            seen()
            yield frame, state.frames[frame], found


def _records(frame: int, numbers: Iterable[int], logits: Tensor) -> list[Record]:
    if not logits.isfinite().all():
        raise CommandError(_NOT_FINITE, status=1)
    masks = (logits[:, 0] > 0).cpu().numpy()
    return [{"frame": frame, **_record(number, mask)} for number, mask in zip(numbers, masks, strict=True)]


def _record(number: int, mask: Mask) -> Record:
    from omniops.sam2 import rle

    return {"id": number, "segmentation": rle.encode(mask), "area": int(mask.sum())}


def _largest_first(records: Iterable[Record]) -> list[Record]:
    """So that none is hidden by what it lies in when they are drawn."""
    return sorted(records, key=lambda each: -int(each["area"]))


def _masks(records: Iterable[Record]) -> Iterator[Mask]:
    """One at a time, for all of them may be more than there is memory."""
    from omniops.sam2 import rle

    return (rle.decode(each["segmentation"]) for each in records)


def _require_outputs(out: Path, ending: str, source: Path, *beside: Path) -> Path:
    """Raise where the results could not be written, or would overwrite the source; the JSON's name."""
    if out.suffix.lower() != ending:
        raise CommandError(f"cannot write {out}: what is made of {source} ends with {ending}")
    results = out.with_suffix(".json")
    for each in (out, *beside, results):
        require_not_input(each, source)
        require_writable(each)
    return results


def _write(records: list[Record], path: Path) -> None:
    try:
        path.write_text(json.dumps(records) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}", status=1) from None


def _where(model: Sam2VideoModel) -> str:
    return f"{devices.title(torch.device(model.device))}, {dtype_name(model.vision_encoder.dtype)}"


def _print(*lines: str) -> None:
    console = output()
    for each in lines:
        console.print(each, markup=False, soft_wrap=True)
