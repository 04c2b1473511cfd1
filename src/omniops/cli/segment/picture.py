"""``omniops segment`` of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import TimeRemainingColumn

from omniops import device as devices
from omniops.cli.common import CommandError, Heartbeat, print_lines, progress
from omniops.cli.errors import reason, say
from omniops.cli.outputs import write_json, writing
from omniops.cli.pictures import read_picture
from omniops.cli.segment.model import device_and_dtype
from omniops.cli.segment.prompts import Prompts, check_prompts, group_prompts
from omniops.cli.segment.records import NOT_FINITE, Record, mask_record, numbered_masks, sort_by_area
from omniops.cli.segment.request import Request, overlay_of
from omniops.drawing import draw_prompts, mask_image, paint
from omniops.formatting import digits

if TYPE_CHECKING:
    from omniops.sam2.modeling.sam2 import SAM2Base

_POINTS_PER_BATCH, _POINTS_PER_BATCH_ON_CPU = 64, 8
_MANY_POINTS_ON_CPU = 256


def segment_picture(request: Request, grid: int | None) -> None:
    """Segment a picture by prompts, or with a grid of points everything on it."""
    out, overlay, results = request.out, overlay_of(request.out), request.out.with_suffix(".json")
    picture = read_picture(request.source)
    check_prompts(request.prompts, request.source, picture.width, picture.height, None)
    prompts = {number: object_prompts for (_, number), object_prompts in group_prompts(request.prompts).items()}
    pixels = np.array(picture)
    model = request.model.load()
    try:
        if grid is None:
            records, lines = _segment_prompts(model, pixels, prompts)
        else:
            records, lines = _segment_everything(model, pixels, grid, request.model.random_weights)
    except (RuntimeError, ValueError) as error:  # RuntimeError: no memory, on the CPU too
        size = f"a picture of {picture.width} x {picture.height} pixels"
        raise CommandError(f"{size}: {reason(error)}", status=1) from None

    shown = sort_by_area(records)
    write_json(results, records, request.overwrite)
    with writing(out, request.overwrite) as temporary:
        mask_image(numbered_masks(shown), picture.height, picture.width).save(temporary, format="PNG")
    paint(pixels, numbered_masks(shown))
    with writing(overlay, request.overwrite) as temporary:
        drawn = Image.fromarray(pixels)
        for number, object_prompts in prompts.items():
            draw_prompts(drawn, number, object_prompts.points, object_prompts.labels, object_prompts.box)
        drawn.save(temporary, format="JPEG", quality=90)
    print_lines(*lines, f"Wrote {out}, {overlay} and {results}")


def _segment_prompts(
    model: SAM2Base, pixels: NDArray[np.uint8], prompts: Mapping[int, Prompts]
) -> tuple[list[Record], list[str]]:
    """A record of each object, and the lines to print."""
    from omniops.sam2 import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(model)
    started = perf_counter()
    predictor.set_image(pixels)
    devices.synchronize(predictor.device)
    encoded = perf_counter()
    records, lines = [], []
    for number, object_prompts in prompts.items():
        masks, scores, _ = predictor.predict(
            object_prompts.points or None,
            object_prompts.labels or None,
            object_prompts.box,
            multimask_output=object_prompts.is_one_click,
        )
        if not np.isfinite(scores).all():
            raise ValueError(NOT_FINITE)
        best = int(scores.argmax())
        mask = np.asarray(masks[best]) > 0
        record = mask_record(number, mask)
        record["predicted_iou"] = float(scores[best])
        if object_prompts.points:
            record |= {"point_coords": object_prompts.points, "point_labels": object_prompts.labels}
        if object_prompts.box:
            record["box"] = object_prompts.box
        records.append(record)
        lines.append(f"object {number}: score {scores[best]:.3f}, {record['area']} pixels ({mask.mean():.1%})")
    predicted = perf_counter()
    lines.append(
        f"set_image {digits(encoded - started)} s, predict {digits(predicted - encoded)} s on {device_and_dtype(model)}"
    )
    return records, lines


def _segment_everything(
    model: SAM2Base, pixels: NDArray[np.uint8], grid: int, random_weights: bool
) -> tuple[list[Record], list[str]]:
    """A record of each mask, and the lines to print."""
    from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator

    on_cpu = model.device.type == "cpu"
    # Those of random weights are never sure and hardly stable: all of them are shown that are not found twice.
    thresholds: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if random_weights else {}
    generator = SAM2AutomaticMaskGenerator(
        model,
        points_per_side=grid,
        points_per_batch=_POINTS_PER_BATCH_ON_CPU if on_cpu else _POINTS_PER_BATCH,
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

        def show_progress(points: int, total: int) -> None:
            bar.update(task, completed=points, total=total)
            heartbeat.beat(f"{points} of {total} points")

        found = generator.generate(pixels, progress=show_progress)
    seconds = perf_counter() - started
    records = [{"id": i, **mask} for i, mask in enumerate(found, start=1)]
    lines = [f"{len(found)} masks of {grid**2} points in {digits(seconds)} s on {device_and_dtype(model)}"]
    if random_weights:
        lines.append("The weights are random: these masks mean nothing.")
    return records, lines
