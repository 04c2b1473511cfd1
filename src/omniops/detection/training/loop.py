"""The training itself: batches, steps, and the state from which it goes on as if it had not been interrupted.

What is random is drawn from the seed, the epoch and the picture. So neither the number of processes and workers nor an
interruption changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from omniops import device as devices
from omniops.detection.carafe_rcnn import CARAFERCNN
from omniops.detection.inputs import Target
from omniops.detection.trained import KEY, Description
from omniops.detection.training.dataset import CocoDataset
from omniops.detection.training.sampling import JointLosses
from omniops.detection.training.settings import DTYPES, Settings
from omniops.distributed import Processes

_Sample = tuple[Tensor, Target, int]


class Step(NamedTuple):
    """What a step of the training was.

    Example:
        >>> step = Step(1, 20, 500, loss=0.9, losses={"loss_classifier": 0.9}, lr=0.0025, images_per_second=12.0)
        >>> f"{step.number} of {step.steps}: {step.loss}"
        '20 of 500: 0.9'
    """

    epoch: int
    """From 1."""
    number: int
    """Within the epoch, from 1."""
    steps: int
    """Of an epoch."""
    loss: float
    """The sum of ``losses``, over the pictures of all processes."""
    losses: dict[str, float]
    lr: float
    images_per_second: float
    """Of the epoch so far, of all processes."""


class Training:
    """A detector in training on a data set.

    The same settings give the same losses on any number of processes, up to rounding where all pictures are of one
    size (others are padded to the largest of their process), with weights whose batch normalisations keep their
    statistics.

    Args:
        model: built with as many classes as the data set's categories and the background.
        dataset: with masks where the model has them. On Apple GPUs its pictures without objects are left out.
        settings: how it is trained.
        device: where the model is.
        architecture: the name of the function that builds the model, for who reads the checkpoints: one of
            ``omniops.detection.trained.ARCHITECTURES``.
        processes: that share the batches; by default this one alone. Their group is started.
        workers: processes that read pictures, beside each of those.

    Raises:
        ValueError: for a data set of other categories or without masks, or without objects; and a batch that the
            processes cannot share evenly.

    Example:
        >>> from PIL import Image
        >>> from omniops.detection import faster_rcnn_resnet50_fpn_carafe
        >>> annotations = {
        ...     "images": [{"id": 7, "file_name": "street.png", "width": 64, "height": 48}],
        ...     "categories": [{"id": 8, "name": "truck"}],
        ...     "annotations": [{"image_id": 7, "category_id": 8, "bbox": [10, 10, 40, 30]}],
        ... }
        >>> model = faster_rcnn_resnet50_fpn_carafe(num_classes=2, min_size=64, box_batch_size_per_image=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (64, 48)).save(f"{folder}/street.png")
        ...     dataset = CocoDataset(folder, annotations, masks=False)
        ...     settings = Settings(epochs=1, batch=1, lr=0.001)
        ...     training = Training(model, dataset, settings, torch.device("cpu"), "faster_rcnn_resnet50_fpn_carafe")
        ...     losses = training.run_epoch()
        >>> sorted(losses)
        ['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg']
    """

    def __init__(
        self,
        model: CARAFERCNN,
        dataset: CocoDataset,
        settings: Settings,
        device: torch.device,
        architecture: str,
        *,
        processes: Processes | None = None,
        workers: int = 0,
    ) -> None:
        self.model, self.dataset, self.settings, self.device = model, dataset, settings, device
        self.processes = Processes() if processes is None else processes
        self.workers = workers
        _require_fit(model, dataset)
        sizes = model.transform.min_size[-1], model.transform.max_size
        self.description = Description(architecture, dataset.categories, *sizes)
        self._digest = dataset.digest()
        if settings.batch % self.processes.count:
            raise ValueError(
                f"batch must be shared evenly by the {self.processes.count} processes, got {settings.batch} pictures"
            )
        self.epoch = 0
        """How many are done."""
        self.step = 0
        """How many steps of the next are done."""
        self._totals: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        """Of each epoch that is done, its losses and figures."""
        self._pictures = [
            # Without a single object torchvision calls operators with empty tensors, which MPS gets wrong.
            number
            for number in range(len(dataset))
            if device.type != "mps" or dataset.count_objects(number)
        ]
        self.steps = math.ceil(len(self._pictures) / settings.batch)
        """Of an epoch; the last is filled up with pictures of the first."""
        self._all_steps = settings.epochs * self.steps
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
        self._is_pinned = device.type == "cuda"  # elsewhere copies have to be waited for
        self._joint = JointLosses(model, self.processes)
        self._network: nn.Module = model
        if self.processes.are_several:
            on_gpu = [device] if device.type == "cuda" else None
            self._network = DistributedDataParallel(model, device_ids=on_gpu)

    def run_epoch(self, report: Callable[[Step], None] | None = None) -> dict[str, float]:
        """Train on every picture once, or on those that are left of the epoch; returns the mean of each loss.

        ``report`` is called after every step, and ``state`` may be called there.

        Raises:
            ValueError: for a picture that cannot be read.
            FloatingPointError: where a loss is no finite number, or the norm of the gradient, unless ``max_norm`` is 0;
                the model is as it was before that step. A step whose scaled gradient overflows is left out instead.
        """
        begun, done_before = perf_counter(), self.step
        self.model.train()
        with self._joint.sampling():
            for samples in self._loader():
                lr = self.settings.lr_at(self.epoch * self.steps + self.step, self._all_steps)
                losses = self._step(_require_read(samples), lr)
                self.step += 1
                for name, value in losses.items():
                    self._totals[name] = self._totals.get(name, 0.0) + value
                if report is not None:
                    speed = (self.step - done_before) * self.settings.batch / (perf_counter() - begun)
                    report(Step(self.epoch + 1, self.step, self.steps, sum(losses.values()), losses, lr, speed))
        self._share_statistics()
        means = {name: total / self.steps for name, total in self._totals.items()}
        self.epoch, self.step, self._totals = self.epoch + 1, 0, {}
        return means

    def state(self) -> dict[str, Any]:
        """All that it takes to go on: tensors on the CPU or the device, numbers and texts."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            **self.weights(),
            "settings": self.settings.as_plain(),
            "dataset": self._digest,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "rng": rng,
            "epoch": self.epoch,
            "step": self.step,
            "totals": dict(self._totals),
            "history": self.history,
        }

    def weights(self) -> dict[str, Any]:
        """What ``omniops detect`` reads: the model's state dict, and what it is."""
        return {KEY: self.description.as_plain(), "state_dict": self.model.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            ValueError: for the state of a training with other settings, of other data or of another model, and for one
                that is damaged.
        """
        self._require_same(state)
        try:
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
            self.epoch, self.step, self.history = int(state["epoch"]), int(state["step"]), list(state["history"])
            self._totals = {str(name): float(total) for name, total in state["totals"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the state is damaged: {str(error).partition(chr(10))[0]}") from None
        records = [record for record in self.history if isinstance(record, Mapping)]
        is_position = 0 <= self.step < self.steps and self.epoch * self.steps + self.step <= self._all_steps
        if not 0 <= self.epoch == len(records) == len(self.history) or not is_position:
            raise ValueError(
                f"the state is damaged: it has {len(records)} records of {self.epoch} epochs and {self.step} steps"
            )

    def _require_same(self, state: Mapping[str, Any]) -> None:
        for key, own, what in (
            (KEY, self.description.as_plain(), "another model or other categories"),
            ("settings", self.settings.as_plain(), "other settings"),
        ):
            if state.get(key) != own:
                raise ValueError(f"the state is of a training with {what}: {_difference(state.get(key), own)}")
        if state.get("dataset") != self._digest:
            raise ValueError("the state is of a training with other pictures or annotations")

    def _share_statistics(self) -> None:
        """Give all processes the first one's batch normalisation, which they judge and write down."""
        if self.processes.are_several:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def _loader(self) -> DataLoader[Any]:
        own = [batch[self.processes.rank :: self.processes.count] for batch in self._batches()[self.step :]]
        return DataLoader(
            _Drawn(self.dataset, self.settings, self.epoch),
            batch_sampler=own,
            num_workers=self.workers,
            collate_fn=list,
            pin_memory=self._is_pinned,
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def _batches(self) -> list[list[int]]:
        """The pictures of each step of the epoch, of all processes."""
        count, batch = len(self._pictures), self.settings.batch
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, self.epoch))
        order = torch.randperm(count, generator=generator).tolist()
        filled = [self._pictures[order[position % count]] for position in range(self.steps * batch)]
        return [filled[start : start + batch] for start in range(0, len(filled), batch)]

    def _step(self, samples: Sequence[_Sample], lr: float) -> dict[str, float]:
        move = partial(Tensor.to, device=self.device, non_blocking=self._is_pinned)
        images = [move(image).float() / 255 for image, _, _ in samples]
        targets = [{name: move(value) for name, value in target.items()} for _, target, _ in samples]
        self._joint.seed([seed for _, _, seed in samples])
        with devices.autocast(self.device, DTYPES[self.settings.dtype]):
            losses = self._joint.weigh(self._network(images, targets))
        values = self._joint.mean(losses)
        if not math.isfinite(sum(values.values())):
            raise _divergence("loss", values, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        self._scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        if self.settings.max_norm:
            self._scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.settings.max_norm)
            if not self._scaler.is_enabled() and not math.isfinite(norm.item()):
                raise _divergence("gradient", values, lr)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return values


class _Drawn(Dataset[_Sample | str]):
    """Pictures and targets as an epoch shows them, half of them mirrored, and a seed for what is drawn of each.

    What cannot be read is the error's text: an exception would come out of a worker with that one's traceback.
    """

    def __init__(self, dataset: CocoDataset, settings: Settings, epoch: int) -> None:
        self._dataset, self._settings, self._epoch = dataset, settings, epoch

    def __getitem__(self, index: int) -> _Sample | str:
        try:
            image, target = self._dataset[index]
        except (OSError, ValueError) as error:
            return str(error)
        seed = seed_of(self._settings.seed, self._epoch, index + 1)
        if self._settings.flip and torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:
            image, target = mirrored(image, target)
        return image.contiguous(), target, seed


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """A picture (3, H, W) and its target, left and right exchanged."""
    x1, y1, x2, y2 = target["boxes"].unbind(dim=1)
    width = image.shape[2]
    target = {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    return image.flip(2), target


def seed_of(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    mixed = 0
    for number in numbers:
        # SplitMix64 (Steele, Lea, Flood, 2014): neighbours give unlike streams.
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & _ALL
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _ALL
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _ALL
        mixed ^= mixed >> 31
    return mixed >> 1


_ALL = 2**64 - 1


def _divergence(what: str, losses: Mapping[str, float], lr: float) -> FloatingPointError:
    shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    return FloatingPointError(
        f"the {what} is no finite number ({shown}) at a learning rate of {lr:g}: a lower rate or a longer warm-up may "
        "do"
    )


def _require_fit(model: CARAFERCNN, dataset: CocoDataset) -> None:
    classes = model.roi_heads.box_predictor.cls_score.out_features
    if classes != len(dataset.categories.ids):
        raise ValueError(
            f"model must have {len(dataset.categories.ids)} classes, the data set's and the background, got {classes}"
        )
    if model.roi_heads.has_mask() and not dataset.masks:
        raise ValueError("dataset must be made with masks=True for a model that has masks")
    if not dataset.object_count:
        raise ValueError(f"dataset must have objects to train on, got none in {len(dataset)} pictures")


def _require_read(samples: Sequence[_Sample | str]) -> list[_Sample]:
    for sample in samples:
        if isinstance(sample, str):
            raise ValueError(sample)
    return [sample for sample in samples if not isinstance(sample, str)]


def _difference(theirs: Any, own: Mapping[str, Any]) -> str:
    """The first entry that is not the same."""
    if not isinstance(theirs, Mapping):
        return f"it has {theirs!r:.60}"
    missing = object()
    name = next(name for name in [*own, *theirs] if own.get(name, missing) != theirs.get(name, missing))
    return f"{name} is {own.get(name)!r:.60} here and {theirs.get(name)!r:.60} there"
