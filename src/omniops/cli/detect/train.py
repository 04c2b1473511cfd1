"""``omniops detect-train``: a detector fine-tuned on a data set in COCO's format, on one process or on several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from omniops import device as devices
from omniops.cli.common import CommandError, DeviceOption, print_lines, progress
from omniops.cli.detect.detector import choose_own_device, errors_of_weights, read_coco, require_detection
from omniops.cli.detect.options import AnnotationsOption, FolderOption, Model, require_weights
from omniops.cli.detect.training_options import (
    AmpOption,
    BatchSizeOption,
    CheckpointStepsOption,
    EpochsOption,
    FlipOption,
    HoldOutOption,
    LrOption,
    MaxSizeOption,
    MinSizeOption,
    Precision,
    PrecisionOption,
    RandomStartOption,
    ResumeOption,
    Schedule,
    ScheduleOption,
    SeedOption,
    StartOption,
    TrainedModelOption,
    TrainingOutOption,
    ValAnnotationsOption,
    ValImagesOption,
    WarmupOption,
    WorkersOption,
)
from omniops.cli.errors import cause, exit_status, raise_received, reason, say
from omniops.cli.outputs import OverwriteOption, require_new
from omniops.cli.pictures import read_picture
from omniops.distributed import Processes

if TYPE_CHECKING:
    from omniops.detection.training import CocoDataset, Settings, Training

DEFAULT_OUT = Path("omniops-training")
_MOMENT = 0.2
"""Seconds within which a signal comes to all processes."""


def detect_train(
    images: FolderOption,
    annotations: AnnotationsOption,
    weights: StartOption = None,
    model: TrainedModelOption = Model.MASK,
    random_weights: RandomStartOption = False,
    val_images: ValImagesOption = None,
    val_annotations: ValAnnotationsOption = None,
    hold_out: HoldOutOption = 0.1,
    out: TrainingOutOption = DEFAULT_OUT,
    resume: ResumeOption = False,
    epochs: EpochsOption = 12,
    batch_size: BatchSizeOption = 2,
    lr: LrOption = None,
    schedule: ScheduleOption = Schedule.STEP,
    warmup: WarmupOption = None,
    precision: PrecisionOption = None,
    amp: AmpOption = False,
    min_size: MinSizeOption = 800,
    max_size: MaxSizeOption = 1333,
    flip: FlipOption = True,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    checkpoint_steps: CheckpointStepsOption = 1000,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Fine-tune a detector on pictures with COCO annotations, of any categories.

    After each epoch losses and average precision are printed, of the pictures of --val-annotations or of those held
    out. DIR gets last.pth, all that it takes to go on; best.pth, the weights of the epoch with the highest AP, of masks
    where the model has them; and history.json. Either file is --weights of omniops detect and detect-eval, which know
    its categories. Crowds and boxes without area are left out; pictures without objects are trained on.

    The same settings and seed give the same losses on a CPU. After Ctrl-C, or whatever else ended it, the same command
    with --resume goes on from last.pth as if it had not ended.

    Under torchrun the processes share the pictures of each step, each on a GPU of its own: torchrun --nproc-per-node 2
    --no-python omniops detect-train ...

    Example: omniops detect-train --images photos --annotations photos.json --weights coco --out boats
    """
    require_detection()
    processes = Processes()
    chosen = _choose_device(device, processes)
    _require_shares(batch_size, processes)
    state = _read_state(out, resume)
    read = [path for path in (annotations, val_annotations) if path is not None]
    start = _require_start(state, weights, random_weights, out, read, overwrite, processes)
    more = {"dtype": _dtype(precision, amp, chosen), "seed": seed, "flip": flip, "random_weights": start is None}
    settings = _settings(epochs, batch_size, lr, schedule.value, warmup, **more)
    train, validation = _datasets(model, images, annotations, val_images, val_annotations, hold_out, seed)
    processes.start(gpus=chosen.type == "cuda")
    training = _prepare(model, train, settings, chosen, processes, workers, start, (min_size, max_size))
    _load(training, state, out)
    _fit(training, validation, out, checkpoint_steps)
    processes.end()


@contextmanager
def _errors(prefix: str = "", status: int = 2) -> Iterator[None]:
    """What the training refuses, as errors of the command."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(f"{prefix}{error}", status) from None


def _choose_device(name: str | None, processes: Processes) -> torch.device:
    chosen = choose_own_device(name, processes)
    if processes.are_several and chosen.type not in ("cpu", "cuda"):
        raise CommandError(f"several processes train on CPUs or on NVIDIA GPUs, not on {chosen}: --device cpu")
    return chosen


def _require_shares(batch_size: int, processes: Processes) -> None:
    if batch_size % processes.count:
        raise CommandError(
            f"--batch-size {batch_size} is of all processes together: {processes.count} of them need a multiple of that"
        )


def _read_state(out: Path, resume: bool) -> dict[str, Any] | None:
    """What last.pth has; None where a training begins."""
    from omniops.detection.training import LAST, read_checkpoint

    if not resume:
        return None
    if not (out / LAST).is_file():
        say(f"there is no {out / LAST}: beginning anew")
        return None
    with _errors(status=1):
        return read_checkpoint(out / LAST)


def _require_start(
    state: Mapping[str, Any] | None,
    weights: str | None,
    random_weights: bool,
    out: Path,
    read: Sequence[Path],
    overwrite: bool,
    processes: Processes,
) -> str | None:
    """The weights to start from, None for random ones; raise where there are none, or files would be overwritten."""
    from omniops.detection.training import BEST, HISTORY, LAST

    if state is not None:
        settings = state["settings"]
        is_random = isinstance(settings, dict) and settings.get("random_weights") is True
        return None if is_random else str(out / LAST)
    require_weights(weights, random_weights, "trains the whole network from the beginning")
    if processes.rank == 0:  # another process may be slower than the first one is
        sources = [*read, *([] if weights is None else [Path(weights)])]
        require_new([out / name for name in (LAST, BEST, HISTORY)], overwrite, sources)
    return weights


def _dtype(precision: Precision | None, amp: bool, device: torch.device) -> str:
    if amp and precision not in (None, Precision.AUTO):
        raise CommandError("--amp is --precision auto: give one of the two")
    if amp or precision is Precision.AUTO:
        if device.type == "mps":
            return "bfloat16"  # float16 needs scaled losses, whose operators older PyTorch lacks there
        return str(devices.autocast_dtype(device)).removeprefix("torch.")
    return str((precision or Precision.FLOAT32).value)


def _settings(*arguments: Any, **more: Any) -> Settings:
    from omniops.detection.training import Settings

    with _errors():
        return Settings(*arguments, **more)


def _datasets(
    model: Model,
    images: Path,
    annotations: Path,
    val_images: Path | None,
    val_annotations: Path | None,
    share: float,
    seed: int,
) -> tuple[CocoDataset, CocoDataset | None]:
    """What is trained on, and by what it is judged."""
    from omniops.detection.training import CocoDataset, hold_out

    for folder in (images, val_images or images):
        if not folder.is_dir():
            raise CommandError(f"no such folder: {folder}")
    if val_images is not None and val_annotations is None:
        raise CommandError("--val-images needs --val-annotations")
    masks = model is Model.MASK
    content, held_out = read_coco(annotations), None
    train_ids = None
    if val_annotations is None and share > 0:
        if len(content["images"]) < 2:
            raise CommandError(f"{annotations}: nothing can be held out of a single picture: --hold-out 0")
        train_ids, held_out = hold_out(content, share, seed)
    with _errors(f"{annotations}: "):
        train = CocoDataset(images, content, masks=masks, image_ids=train_ids, read=_read)
        if not train.object_count:
            left_out = _count_left_out(train)
            raise CommandError(
                f"{annotations}: there are no objects to train on in {len(train)} pictures"
                + (f", but for {left_out}, which are left out" if left_out else "")
            )
        if held_out is not None:
            return train, CocoDataset(images, content, masks=False, image_ids=held_out, read=_read)
    if val_annotations is None:
        return train, None
    with _errors(f"{val_annotations}: "):
        judge = read_coco(val_annotations)
        return train, CocoDataset(val_images or images, judge, masks=False, categories=train.categories, read=_read)


def _read(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """As ``CocoDataset`` has it, with the command's readers of pictures."""
    try:
        return np.array(read_picture(path, size), dtype=np.uint8)
    except CommandError as error:
        raise ValueError(str(error)) from None


def _prepare(
    model: Model,
    dataset: CocoDataset,
    settings: Settings,
    device: torch.device,
    processes: Processes,
    workers: int,
    start: str | None,
    sizes: tuple[int, int],
) -> Training:
    """The training, at its beginning."""
    from omniops.detection.trained import Description
    from omniops.detection.training import Training, build

    if processes.rank == 0:
        say(f"loading {model.value}" + (" with random weights" if start is None else f" from {start}"))
    torch.manual_seed(settings.seed)
    description = Description(model.architecture, dataset.categories, *sizes)
    with processes.local_rank_zero_first(), errors_of_weights(f"--model is {model.value}"):
        detector, has_heads = build(description, start, progress=processes.rank == 0)
    raise_received()
    if start is not None and not has_heads and processes.rank == 0:
        say("its categories are others: what tells them apart begins anew")
    with _errors():
        return Training(
            detector.to(device), dataset, settings, device, model.architecture, processes=processes, workers=workers
        )


def _load(training: Training, state: Mapping[str, Any] | None, out: Path) -> None:
    from omniops.detection.training import LAST

    if state is not None:
        with _errors(f"{out / LAST}: "):
            training.load_state(state)


def _fit(training: Training, validation: CocoDataset | None, out: Path, checkpoint_steps: int) -> None:
    from omniops.cli.detect.training_report import Reporter
    from omniops.detection.training import BEST, HISTORY, LAST, fit

    is_first = training.processes.rank == 0
    if is_first:
        _describe(training, validation)
    was_done = training.epoch == training.settings.epochs
    before = None if training.epoch or training.step else _written_at(out / LAST)
    try:
        with progress() as bar, _failures(training):
            fit(training, out, validation, Reporter(training, bar, out), checkpoint_steps)
    except KeyboardInterrupt as stopped:
        _end_readers(stopped)
        if not is_first:
            raise SystemExit(exit_status(stopped)) from None
        is_kept = _written_at(out / LAST) != before
        advice = f"{out / LAST} has what came before, and --resume goes on from there" if is_kept else "nothing is kept"
        raise CommandError(f"{cause(stopped)} in epoch {training.epoch + 1}: {advice}", exit_status(stopped)) from None
    if is_first:
        names = (LAST, BEST, HISTORY) if (out / BEST).is_file() else (LAST, HISTORY)
        files = ", ".join(str(out / name) for name in names)
        print_lines(f"Nothing was left to do: {files}" if was_done else f"Wrote {files}")


def _end_readers(stopped: KeyboardInterrupt) -> None:
    """End the processes that read pictures, which a signal to all may have ended: when Python ends they complain."""
    with suppress(RuntimeError):  # of PyTorch, once, for all that the signal ended
        sleep(_MOMENT)
    stopped.__traceback__ = stopped.__context__ = None  # which hold them


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


@contextmanager
def _failures(training: Training) -> Iterator[None]:
    """What ends a training, as errors of the command."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise CommandError(str(error), status=1) from None
    except RuntimeError as error:
        sleep(_MOMENT)  # a signal to all may have ended another process first, or was lost within compiled code
        raise_received()
        if "DataLoader worker" in str(error):
            raise CommandError(f"a process that reads pictures ended ({reason(error)}): try --workers 0", 1) from None
        if training.processes.are_several and "closed by peer" in str(error):
            raise CommandError("another process of the training ended", status=1) from None
        raise


def _count_left_out(dataset: CocoDataset) -> str:
    return " and ".join(f"{count} {what}" for what, count in dataset.left_out.items() if count)


def _describe(training: Training, validation: CocoDataset | None) -> None:
    dataset, settings = training.dataset, training.settings
    objects = f"{dataset.object_count} objects of {len(dataset.categories.ids) - 1} categories"
    judged = "" if validation is None else f", and judging by {len(validation)}"
    say(f"training on {len(dataset)} pictures with {objects}{judged}, on {devices.title(training.device)}")
    if left_out := _count_left_out(dataset):
        say(f"left out are {left_out}")
    if validation is not None and not validation.object_count:
        say("the pictures to judge by have no objects: there will be no average precision and no best.pth", "warning")
    if training.epoch or training.step:
        say(f"going on after {training.epoch} of {settings.epochs} epochs and {training.step} steps")
