"""``omniops detect-eval``: COCO's average precision of a detector, on one process or on several."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.cli.common import CommandError, DeviceOption, Heartbeat, choose_device, output, progress
from omniops.cli.detect_parts import (
    Model,
    ModelOption,
    RandomWeightsOption,
    WeightsOption,
    detect_objects,
    fail_for,
    load_detector,
    require_detection,
    require_weights,
)
from omniops.cli.doctor import versions
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.cli.pictures import read_picture


def detect_eval(
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="The folder of the pictures.")],
    annotations: Annotated[
        Path, typer.Option("--annotations", metavar="FILE.json", help="COCO's annotations of instances in them.")
    ],
    weights: WeightsOption = None,
    model: ModelOption = Model.MASK,
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compute COCO's average precision and recall of boxes, and of masks where model and annotations have them.

    Where the annotations' categories are not COCO's, the detector's labels are taken for theirs in the order of their
    ids. A picture that cannot be read is left out of the figures and named at the end, with status 1.

    Under torchrun the pictures are shared among the processes, each with a GPU of its own, and the figures are the
    same: torchrun --nproc-per-node 2 --no-python omniops detect-eval ...

    Example: omniops detect-eval --images val2017 --annotations instances_val2017.json --weights coco
    """
    distributed = dist.is_available() and dist.is_torchelastic_launched()
    chosen = _choose_device(device, distributed)
    require_weights(weights, random_weights)
    if os.environ.get("RANK", "0") == "0":  # another process may be slower than the first one is
        require_new([json_file], overwrite, [annotations])
    require_detection()
    if not images.is_dir():
        raise CommandError(f"no such folder: {images}")

    from omniops.detection import coco

    try:
        truth = coco.read_annotations(annotations)
    except OSError as error:
        raise CommandError(f"cannot read {annotations}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    entries = truth["images"]
    paths = [images / _inside(entry["file_name"], annotations) for entry in entries]
    if not any(os.path.exists(path) for path in paths):
        raise CommandError(f"{images} has none of the {len(entries)} images that {annotations} lists")
    category_ids = coco.label_ids(truth)

    if distributed:
        # What processes tell each other is on the CPU on every device. A fast one may wait long for a slow one.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    # One process of each machine fetches the weights.
    if distributed and not first_here:
        dist.barrier()
    classes = f"the {len(category_ids) - 1} classes of {annotations}"
    detector = load_detector(model, weights, chosen, progress=rank == 0, classes=classes, num_classes=len(category_ids))
    if distributed and first_here:
        dist.barrier()

    results: dict[int, list[dict[str, Any]]] = {}
    bad: dict[Path, str] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(entries[rank::processes]), visible=rank == 0)
        heartbeat = Heartbeat(bar)
        for entry, path in zip(entries[rank::processes], paths[rank::processes], strict=True):
            try:
                picture = read_picture(path, (entry["width"], entry["height"]))
                found = detect_objects(detector, picture, chosen)
                results[entry["id"]] = coco.to_results(found, entry["id"], category_ids)
            except CommandError as error:
                bad[path] = str(error)
            bar.advance(task)
            if rank == 0:
                heartbeat.beat(f"{len(results) + len(bad)} of {len(entries[rank::processes])} images")
    if distributed:
        gathered: list[Any] | None = [None] * processes if rank == 0 else None
        dist.gather_object((results, bad), gathered)
        # PyTorch 2.7 ends the group's threads with Python's lock, which one wants that still drops what was gathered.
        dist.barrier()
        dist.destroy_process_group()
        if gathered is None:
            return
        for some_results, some_bad in gathered:
            results.update(some_results)
            bad.update(some_bad)

    if not results:  # nothing to judge
        fail_for(bad, len(entries))

    # In the file's order, however many processes there were: among equal scores the first counts.
    ordered = [result for entry in entries for result in results.get(entry["id"], ())]
    figures = {"bbox": coco.average_precision(truth, ordered, results)}
    if model is Model.MASK and coco.has_masks(truth):
        figures["segm"] = coco.average_precision(truth, ordered, results, masks=True)

    table = Table(
        "",
        *coco.FIGURES,
        title=f"{len(results)} images, {model.value}, {devices.title(chosen)}",
        box=SIMPLE_HEAD,
    )
    for name, kind in (("bbox", "boxes"), ("segm", "masks")):
        if name in figures:
            values = figures[name].values()
            table.add_row(kind, *("" if value is None else f"{100 * value:.1f}" for value in values))
    console = output()
    console.print(table)
    if model is Model.MASK and "segm" not in figures:
        console.print("Masks were not judged: some annotations have none.")
    if json_file is not None:
        report = {
            "model": model.value,
            "weights": weights or "random",
            "annotations": str(annotations),
            "images": len(results),
            "failed": [str(path) for path in bad],
            "device": devices.title(chosen),
            "versions": versions(),
            **figures,
        }
        write_json(json_file, report, overwrite, indent=1)
    fail_for(bad, len(entries))


def _inside(name: str, annotations: Path) -> Path:
    """The path of a picture from its folder; raise where an annotation file's name leads out of that folder."""
    path = Path(os.path.normpath(name))  # as written: where links inside the folder lead is up to who made them
    if path.anchor or ".." in path.parts:
        raise CommandError(
            f"{annotations} is refused: it names the picture {name}, which is not in the folder that --images names: "
            "give the names from that folder on"
        )
    return path


def _choose_device(name: str | None, distributed: bool) -> torch.device:
    """As every command; but of several processes each takes its own GPU where none is named by its number."""
    chosen = choose_device(name)
    if distributed and chosen.type != "cpu" and ":" not in (name or ""):
        return choose_device(f"{chosen.type}:{os.environ['LOCAL_RANK']}")
    return chosen
