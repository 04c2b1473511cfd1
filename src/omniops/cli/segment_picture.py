"""``omniops segment`` of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import TimeRemainingColumn

from omniops import device as devices
from omniops.cli.common import CommandError, Heartbeat, digits, print_lines, progress
from omniops.cli.errors import reason, say
from omniops.cli.outputs import write_json, writing
from omniops.cli.pictures import read_picture
from omniops.cli.segment_parts import (
    NOT_FINITE,
    Prompts,
    Record,
    Work,
    as_picture,
    as_record,
    check,
    draw_prompts,
    grouped,
    largest_first,
    masks_of,
    where,
)
from omniops.drawing import paint

if TYPE_CHECKING:
    from transformers import Sam2VideoModel

_POINTS_AT_ONCE, _POINTS_AT_ONCE_ON_CPU = 64, 8
_MANY_POINTS_ON_CPU = 256


def cut_out(work: Work, overlay: Path, grid: int | None) -> None:
    """Segment a picture by prompts, or with a grid of points everything on it."""
    out, results = work.out, work.out.with_suffix(".json")
    picture = read_picture(work.source)
    check(work.written, work.source, picture.width, picture.height, None)
    prompts = {number: each for (_, number), each in grouped(work.written).items()}
    pixels = np.array(picture)
    model = work.load()
    try:
        if grid is None:
            records, lines = _by_prompts(model, pixels, prompts)
        else:
            records, lines = _everything(model, pixels, grid, work.random_weights)
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        size = f"a picture of {picture.width} x {picture.height} pixels"
        raise CommandError(f"{size}: {reason(error)}", status=1) from None

    order = largest_first(records)
    numbers = [int(each["id"]) for each in order]
    write_json(results, records, work.overwrite)
    with writing(out, work.overwrite) as part:
        as_picture(numbers, masks_of(order), picture.height, picture.width).save(part, format="PNG")
    paint(pixels, zip(numbers, masks_of(order), strict=True))
    with writing(overlay, work.overwrite) as part:
        Image.fromarray(draw_prompts(pixels, prompts)).save(part, format="JPEG", quality=90)
    print_lines(*lines, f"Wrote {out}, {overlay} and {results}")


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
            raise ValueError(NOT_FINITE)
        best = int(scores.argmax())
        mask = np.asarray(masks[best]) > 0
        record = as_record(number, mask)
        record["predicted_iou"] = float(scores[best])
        if each.points:
            record |= {"point_coords": each.points, "point_labels": each.labels}
        if each.box:
            record["box"] = each.box
        records.append(record)
        lines.append(f"object {number}: score {scores[best]:.3f}, {record['area']} pixels ({mask.mean():.1%})")
    predicted = perf_counter()
    lines.append(f"set_image {digits(encoded - started)} s, predict {digits(predicted - encoded)} s on {where(model)}")
    return records, lines


def _everything(
    model: Sam2VideoModel, pixels: NDArray[np.uint8], grid: int, random_weights: bool
) -> tuple[list[Record], list[str]]:
    """A record of each mask, and what is to be said."""
    from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator

    on_cpu = model.device.type == "cpu"
    # Those of random weights are never sure and hardly stable: all of them are shown that are not found twice.
    thresholds: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if random_weights else {}
    generator = SAM2AutomaticMaskGenerator(
        model,
        points_per_side=grid,
        points_per_batch=_POINTS_AT_ONCE_ON_CPU if on_cpu else _POINTS_AT_ONCE,
        output_mode="coco_rle",
        **thresholds,
    )
    advice = ""
    if on_cpu and grid**2 > _MANY_POINTS_ON_CPU:
        advice = f": on a CPU that takes minutes, --grid {grid // 2} a quarter of them, --image-size 512 less too"
    say(f"looking at {grid**2} points{advice}")
    started = perf_counter()
    with progress(TimeRemainingColumn()) as bar:
        task = bar.add_task("points", total=grid**2)
        heartbeat = Heartbeat(bar)

        def done(points: int, total: int) -> None:
            bar.update(task, completed=points, total=total)
            heartbeat.beat(f"{points} of {total} points")

        found = generator.generate(pixels, progress=done)
    seconds = perf_counter() - started
    records = [{"id": i, **each} for i, each in enumerate(found, start=1)]
    lines = [f"{len(found)} masks of {grid**2} points in {digits(seconds)} s on {where(model)}"]
    if random_weights:
        lines.append("The weights are random: these masks mean nothing.")
    return records, lines
