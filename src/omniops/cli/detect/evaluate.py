"""``omniops detect-eval``: COCO's average precision of a detector, on one process or on several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.cli.common import CommandError, DeviceOption, Heartbeat, output, progress
from omniops.cli.detect.detector import (
    choose_own_device,
    detect_objects,
    fail_for,
    identify,
    load_detector,
    read_coco,
    require_detection,
)
from omniops.cli.detect.options import (
    AnnotationsOption,
    FolderOption,
    JsonOption,
    Model,
    ModelOption,
    RandomWeightsOption,
    WeightsOption,
    require_weights,
)
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.cli.pictures import read_picture
from omniops.distributed import Processes
from omniops.environment import versions

if TYPE_CHECKING:
    from omniops.detection import CARAFERCNN
    from omniops.detection.evaluation import CocoEvaluator
    from omniops.detection.trained import Categories

    Figures = dict[str, dict[str, float | None]]


def detect_eval(
    images: FolderOption,
    annotations: AnnotationsOption,
    weights: WeightsOption = None,
    model: ModelOption = Model.MASK,
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compute COCO's average precision and recall of boxes, and of masks where model and annotations have them.

    Of other categories than COCO's the detector's labels are taken for them by the order of their ids; a file of
    omniops detect-train has its own. A picture that cannot be read is left out and named at the end, with status 1.

    Under torchrun the pictures are shared among the processes, each with a GPU of its own, and the figures are the
    same: torchrun --nproc-per-node 2 --no-python omniops detect-eval ...

    Example: omniops detect-eval --images val2017 --annotations instances_val2017.json --weights coco
    """
    processes = Processes()
    chosen = choose_own_device(device, processes)
    require_weights(weights, random_weights)
    if processes.rank == 0:  # another process may be slower than the first one is
        require_new([json_file], overwrite, [annotations])
    require_detection()
    if not images.is_dir():
        raise CommandError(f"no such folder: {images}")
    processes.start()
    is_first = processes.rank == 0
    with processes.local_rank_zero_first():
        model, categories, known = identify(model, weights, progress=is_first)
    evaluator = _evaluator(annotations, categories if known else None)
    paths = _paths(evaluator, images, annotations)

    count = len(evaluator.category_ids)
    classes = f"the {count - 1} classes of {annotations}"
    with processes.local_rank_zero_first():
        detector = load_detector(model, weights, chosen, is_first, classes, **{"num_classes": count, **known})
    failed = _detect_all(evaluator, detector, paths, chosen, processes)
    if not _gather(evaluator, failed, processes):
        return
    if not evaluator.results:  # nothing to judge
        fail_for(failed, len(paths))

    figures = evaluator.figures(masks=model is Model.MASK)
    _print(figures, len(evaluator.results), model, devices.title(chosen))
    if json_file is not None:
        report = {
            "model": model.value,
            "weights": weights or "random",
            "annotations": str(annotations),
            "images": len(evaluator.results),
            "failed": [str(path) for path in failed],
            "device": devices.title(chosen),
            "versions": versions(),
            **figures,
        }
        write_json(json_file, report, overwrite, indent=1)
    fail_for(failed, len(paths))


def _evaluator(path: Path, categories: Categories | None) -> CocoEvaluator:
    """Of the annotations, whose categories must be among the detector's where the weights say which those are."""
    from omniops.detection.evaluation import CocoEvaluator

    annotations = read_coco(path)
    if categories is None:
        return CocoEvaluator(annotations)
    try:
        categories.require(annotations)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None
    return CocoEvaluator(annotations, categories.ids)


def _paths(evaluator: CocoEvaluator, folder: Path, annotations: Path) -> list[Path]:
    """The pictures' files, in the order of the annotations; raise where there is none of them."""
    entries = evaluator.annotations["images"]
    paths = [folder / _inside(entry["file_name"], annotations) for entry in entries]
    if not any(os.path.exists(path) for path in paths):
        raise CommandError(f"{folder} has none of the {len(entries)} images that {annotations} lists")
    return paths


def _detect_all(
    evaluator: CocoEvaluator, detector: CARAFERCNN, paths: Sequence[Path], device: torch.device, processes: Processes
) -> dict[Path, str]:
    """Count this process's share of the pictures; returns which failed, and why."""
    failed: dict[Path, str] = {}
    share = processes.share(list(zip(evaluator.annotations["images"], paths, strict=True)))
    is_first = processes.rank == 0
    with progress() as bar:
        task = bar.add_task("", total=len(share), visible=is_first)
        heartbeat = Heartbeat(bar)
        for entry, path in share:
            try:
                picture = read_picture(path, (entry["width"], entry["height"]))
                evaluator.update(entry["id"], detect_objects(detector, picture, device))
            except CommandError as error:
                failed[path] = str(error)
            bar.advance(task)
            if is_first:
                heartbeat.beat(f"{len(evaluator.results) + len(failed)} of {len(share)} images")
    return failed


def _gather(evaluator: CocoEvaluator, failed: dict[Path, str], processes: Processes) -> bool:
    """Add what the other processes found; returns whether this is the one that goes on."""
    gathered = processes.gather((evaluator.results, failed))
    processes.end()
    for their_results, their_failed in gathered or ():
        evaluator.results.update(their_results)
        failed.update(their_failed)
    return gathered is not None


def _print(figures: Figures, images: int, model: Model, device: str) -> None:
    names = next(iter(figures.values()))
    table = Table("", *names, title=f"{images} images, {model.value}, {device}", box=SIMPLE_HEAD)
    for name, kind in (("bbox", "boxes"), ("segm", "masks")):
        if name in figures:
            values = figures[name].values()
            table.add_row(kind, *("" if value is None else f"{100 * value:.1f}" for value in values))
    console = output()
    console.print(table)
    if model is Model.MASK and "segm" not in figures:
        console.print("Masks were not judged: some annotations have none.")


def _inside(name: str, annotations: Path) -> Path:
    """The path of a picture from its folder; raise where an annotation file's name leads out of that folder."""
    from omniops.detection import coco

    try:
        return coco.relative_path(name)
    except ValueError:
        raise CommandError(
            f"{annotations} is refused: it names the picture {name}, which is not in the folder that --images names: "
            "give the names from that folder on"
        ) from None
