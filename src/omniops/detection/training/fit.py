"""A whole training: epochs, the average precision after each, and the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from omniops.detection.carafe_rcnn import CARAFERCNN
from omniops.detection.evaluation import CocoEvaluator
from omniops.detection.inference import detect
from omniops.detection.training.checkpoints import BEST, HISTORY, LAST, write_checkpoint, write_history
from omniops.detection.training.dataset import CocoDataset
from omniops.detection.training.loop import Step, Training
from omniops.distributed import Processes

Figures = dict[str, dict[str, float | None]]


class Observer:
    """What is told of a training while it runs; to be derived from.

    Example:
        >>> class Printer(Observer):
        ...     def on_epoch(self, record, is_best):
        ...         print(record["epoch"], round(record["loss"], 2), "best" if is_best else "")
        >>> Printer().on_epoch({"epoch": 3, "loss": 0.512}, is_best=True)
        3 0.51 best
    """

    def on_step(self, step: Step) -> None:
        """A step was done."""

    def on_validation(self, done: int, total: int) -> None:
        """So many of this process's pictures were looked at."""

    def on_epoch(self, record: Mapping[str, Any], is_best: bool) -> None:
        """An epoch was done, and its checkpoints are written. Told in the first process alone."""


def fit(
    training: Training,
    folder: str | PathLike[str],
    validation: CocoDataset | None = None,
    observer: Observer | None = None,
    checkpoint_steps: int | None = None,
) -> list[dict[str, Any]]:
    """Train until all epochs are done, and write the checkpoints after each.

    The folder gets ``last.pth``, all that it takes to go on; with a validation set ``best.pth``, the weights of the
    epoch with the highest AP, of masks where they can be judged and else of boxes, unless there is no object to find
    in it; and ``history.json``. Files of those names are replaced. ``omniops detect --weights`` reads both.

    Args:
        training: new, or with a state that was loaded.
        folder: to write to; made if need be.
        validation: of the same categories.
        observer: told how it goes.
        checkpoint_steps: after how many steps within an epoch ``last.pth`` is written too.

    Returns:
        For each epoch a dict of ``epoch``, ``loss``, ``losses``, ``lr``, ``images_per_second``, and with a validation
        set ``bbox`` and perhaps ``segm``, by the names in ``omniops.detection.coco.FIGURES``. In the first process.

    Raises:
        ValueError, FloatingPointError: as ``Training.run_epoch``.
        OSError: where a checkpoint cannot be written.

    Example:
        >>> from omniops.detection import faster_rcnn_resnet50_fpn_carafe
        >>> from omniops.detection.training import Settings
        >>> annotations = {
        ...     "images": [{"id": 7, "file_name": "street.png", "width": 64, "height": 48}],
        ...     "categories": [{"id": 8, "name": "truck"}],
        ...     "annotations": [{"image_id": 7, "category_id": 8, "bbox": [10, 10, 40, 30]}],
        ... }
        >>> model = faster_rcnn_resnet50_fpn_carafe(num_classes=2, min_size=64, box_batch_size_per_image=16)
        >>> device = torch.device("cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (64, 48)).save(f"{folder}/street.png")
        ...     dataset = CocoDataset(folder, annotations, masks=False)
        ...     settings = Settings(epochs=1, batch=1, lr=0.001)
        ...     training = Training(model, dataset, settings, device, "faster_rcnn_resnet50_fpn_carafe")
        ...     history = fit(training, folder)
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['history.json', 'last.pth', 'street.png']
        >>> history[0]["epoch"]
        1
    """
    observer = Observer() if observer is None else observer
    path = Path(folder)
    is_first = training.processes.rank == 0
    if is_first:
        path.mkdir(parents=True, exist_ok=True)
    while training.epoch < training.settings.epochs:
        record = _epoch(training, observer, path, checkpoint_steps)
        if validation is not None:
            figures = evaluate(
                training.model,
                validation,
                training.device,
                training.processes,
                training.workers,
                observer.on_validation,
            )
            record.update(figures or {})
        before = [judged(past) for past in training.history]
        training.history.append(record)
        if not is_first:
            continue
        is_best = judged(record) >= 0 and all(judged(record) > other for other in before)
        if is_best:
            write_checkpoint(path / BEST, training.weights())
        elif not before:  # of another training
            (path / BEST).unlink(missing_ok=True)
        write_history(path / HISTORY, training.history)
        # Last, as the others are written again where this one was not.
        write_checkpoint(path / LAST, training.state())
        observer.on_epoch(record, is_best)
    return training.history


def judged(record: Mapping[str, Any]) -> float:
    """The AP that tells which epoch is the best: of masks, or else of boxes; -1 where there is none."""
    figures = record.get("segm") or record.get("bbox") or {}
    value = figures.get("AP")
    return -1.0 if value is None else float(value)


def evaluate(
    model: CARAFERCNN,
    dataset: CocoDataset,
    device: torch.device,
    processes: Processes | None = None,
    workers: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Figures | None:
    """COCO's figures of a detector, as ``CocoEvaluator.figures``, in float32; in the first process, else None.

    Raises:
        ValueError: for a picture that cannot be read.
        FloatingPointError: where detections are no finite numbers.

    Example:
        >>> from omniops.detection import faster_rcnn_resnet50_fpn_carafe
        >>> truck = {"image_id": 7, "category_id": 8, "bbox": [10, 10, 40, 30]}
        >>> annotations = {
        ...     "images": [{"id": 7, "file_name": "street.png", "width": 64, "height": 48}],
        ...     "categories": [{"id": 8, "name": "truck"}],
        ...     "annotations": [truck],
        ... }
        >>> model = faster_rcnn_resnet50_fpn_carafe(num_classes=2, min_size=64, max_size=64)  # random weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (64, 48)).save(f"{folder}/street.png")
        ...     figures = evaluate(model, CocoDataset(folder, annotations, masks=False), torch.device("cpu"))
        >>> sorted(figures["bbox"])[:3]
        ['AP', 'AP50', 'AP75']
    """
    processes = Processes() if processes is None else processes
    evaluator = CocoEvaluator(dataset.annotations, dataset.categories.ids)
    own = list(processes.share(range(len(dataset))))
    generator = torch.Generator().manual_seed(0)  # so that the loader draws none of the training's numbers
    pictures: DataLoader[Any] = DataLoader(
        _Pictures(dataset), batch_size=None, sampler=own, num_workers=workers, collate_fn=_same, generator=generator
    )
    was_training = model.training
    model.eval()
    try:
        for done, (index, pixels) in enumerate(zip(own, pictures, strict=True), 1):
            if isinstance(pixels, str):
                raise ValueError(pixels)
            evaluator.update(dataset.images[index]["id"], detect(model, pixels, device))
            if report is not None:
                report(done, len(own))
    finally:
        model.train(was_training)
    gathered = processes.gather(evaluator.results)
    if gathered is None:
        return None
    for results in gathered:
        evaluator.results.update(results)
    return evaluator.figures(masks=model.roi_heads.has_mask())


def _epoch(training: Training, observer: Observer, folder: Path, checkpoint_steps: int | None) -> dict[str, Any]:
    last: Step | None = None

    def report(step: Step) -> None:
        nonlocal last
        last = step
        is_due = checkpoint_steps is not None and step.number % checkpoint_steps == 0
        if is_due and step.number < step.steps and training.processes.rank == 0:
            write_checkpoint(folder / LAST, training.state())
        observer.on_step(step)

    losses = training.run_epoch(report)
    assert last is not None
    return {
        "epoch": training.epoch,
        "loss": sum(losses.values()),
        "losses": losses,
        "lr": last.lr,
        "images_per_second": last.images_per_second,
    }


class _Pictures(Dataset[NDArray[np.uint8] | str]):
    """A data set's pictures alone; the text of an error for what cannot be read."""

    def __init__(self, dataset: CocoDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> NDArray[np.uint8] | str:
        try:
            return self._dataset.picture(index)
        except (OSError, ValueError) as error:
            return str(error)


def _same(value: Any) -> Any:
    return value
