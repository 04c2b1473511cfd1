"""transformers' Deformable DETR and RT-DETR, of ResNet-50, with and without ``omniops.enable("transformers")``.

Weights are random, so nothing is downloaded. Timed are inference, of one image, and a training step of two: forward,
the loss with its matching of boxes, backward. The two ways take turns in one process. Images are 640 x 640 and
800 x 1066; RT-DETR, whose sides have to be multiples of 32, gets 800 x 1088.

pip install transformers scipy
python benchmarks/transformers_detr.py --json transformers_detr.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

import omniops
from omniops import device as devices
from omniops.benchmarking.circumstances import circumstances
from omniops.benchmarking.timing import quartiles
from omniops.cli import errors
from omniops.cli.common import CommandError, DeviceOption, Heartbeat, choose_device, output, progress
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.formatting import digits

NEEDED = ("transformers", "scipy")  # scipy matches boxes in the losses
DEFORMABLE_DETR, RT_DETR = MODELS = "Deformable DETR", "RT-DETR"
INFERENCE, TRAINING = "inference", "training step"
BATCHES = {INFERENCE: 1, TRAINING: 2}
SIZES, QUICK_SIZES = ((640, 640), (800, 1066)), ((96, 96), (96, 150))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WITHOUT, WITH = WAYS = "transformers alone", "with omniops"
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 3, 50, 20.0
"""Rounds that are not counted, the limits of those that are, and about how long they may take for each figure."""


@dataclass
class Result:
    """Of a model, a size and what it does."""

    model: str
    size: tuple[int, int]
    """As the model takes it."""
    what: str
    batch: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    peak_memory: dict[str, int] = field(default_factory=dict)
    """In bytes: the most that PyTorch had allocated on CUDA, weights included."""
    difference: float = 0.0
    """Of logits or losses: the largest, relative to the largest value."""

    def median(self, way: str) -> float:
        """In seconds."""
        return statistics.median(self.seconds[way])

    def ratio(self) -> float:
        """How many times as fast it is with omniops."""
        return self.median(WITHOUT) / self.median(WITH)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        figures = {
            way: {"median": self.median(way), "quartiles": quartiles(times)} for way, times in self.seconds.items()
        }
        return {**asdict(self), "times": figures, "ratio": self.ratio()}


def build(model: str, quick: bool) -> Any:
    """A model with random weights."""
    import transformers

    few = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20} if quick else {}
    small = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 128], "embedding_size": 16} if quick else {}
    stages = {"out_features": ["stage2", "stage3", "stage4"]}
    torch.manual_seed(0)
    if model == RT_DETR:
        backbone = transformers.RTDetrResNetConfig(**small, **stages)
        config = transformers.RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=backbone.hidden_sizes[1:], **few
        )
        return transformers.RTDetrForObjectDetection(config)
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(**small, **stages),
        **few,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def sides(model: str, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width as the model takes them."""
    h, w = size
    return (-(-h // 32) * 32, -(-w // 32) * 32) if model == RT_DETR else size


def task(network: Any, what: str, size: tuple[int, int], dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call of the network: of inference, which returns logits, or of training, which returns the loss."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((BATCHES[what], 3, *size), generator=generator).to(device)
    labels = [
        {
            "class_labels": torch.randint(0, network.config.num_labels, (7,), generator=generator).to(device),
            "boxes": (torch.rand((7, 4), generator=generator) * 0.4 + 0.1).to(device),
        }
        for _ in images
    ]

    def infer() -> Tensor:
        with torch.no_grad(), devices.autocast(device, dtype):
            logits: Tensor = network(images).logits
        return logits

    def train() -> Tensor:
        network.zero_grad()
        torch.manual_seed(0)  # of dropout, and of queries with noise
        with devices.autocast(device, dtype):
            loss: Tensor = network(images, labels=labels).loss
        loss.backward()
        return loss.detach()

    network.train(what == TRAINING)
    return infer if what == INFERENCE else train


def measure(result: Result, call: Callable[[], Tensor], device: torch.device, quick: bool) -> Iterator[int]:
    """Time both ways in turns; yields the number of rounds that are done."""
    found: dict[str, Tensor] = {}
    started = perf_counter()
    for done in range(1 if quick else 1 - WARM_UP, 3 if quick else MAX_ROUNDS + 1):
        for way in WAYS:
            if way == WITH:
                omniops.enable("transformers")
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                devices.synchronize(device)
                before = perf_counter()
                found[way] = call()
                devices.synchronize(device)
                seconds = perf_counter() - before
            finally:
                omniops.disable("transformers")
            if done > 0:
                result.seconds[way].append(seconds)
            if device.type == "cuda":
                result.peak_memory[way] = torch.cuda.max_memory_allocated(device)
        yield done
        if done >= MIN_ROUNDS and perf_counter() - started > SECONDS:
            break
    theirs, ours = (found[way].double() for way in WAYS) if device.type != "mps" else (found[way].cpu() for way in WAYS)
    result.difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measured(models: Sequence[str], device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Result]:
    """All sizes of the models, inference and training."""
    sizes = QUICK_SIZES if quick else SIZES
    with progress() as bar:
        shown = bar.add_task("", total=len(models) * len(sizes) * len(BATCHES))
        heartbeat = Heartbeat(bar)
        for model in models:
            network = build(model, quick).to(device)
            for size, what in product(sizes, BATCHES):
                taken = sides(model, size)
                name = f"{model}, {taken[0]} x {taken[1]}, {what}"
                bar.update(shown, description=name)
                result = Result(model, taken, what, BATCHES[what])
                for done in measure(result, task(network, what, taken, dtype), device, quick):
                    heartbeat.beat(f"{name}: {max(done, 0)} rounds")
                bar.advance(shown)
                yield result


def show(results: Sequence[Result]) -> None:
    """The table."""
    table = Table(
        "model", "image", "", "batch", *(f"{way}, ms" for way in WAYS), "ratio", "difference", *(
            (f"{way}, GiB" for way in WAYS) if any(result.peak_memory for result in results) else ()
        ),
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for result in results:
        table.add_row(
            result.model,
            "{} x {}".format(*result.size),
            result.what,
            str(result.batch),
            *(digits(1e3 * result.median(way)) for way in WAYS),
            f"{result.ratio():.2f}",
            f"{result.difference:.0e}",
            *(f"{memory / 2**30:.2f}" for memory in result.peak_memory.values()),
        )
    output().print(table)


def main(
    device: DeviceOption = None,
    model: Annotated[str | None, typer.Option(help=", ".join(MODELS))] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}: below float32 by autocast.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Small networks and images, in seconds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Time transformers' models with and without omniops."""
    if model not in (*MODELS, None):
        raise CommandError(f"unknown model {model!r}: there are {', '.join(MODELS)}")
    if dtype not in DTYPES:
        raise CommandError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    require_new([json_file], overwrite, [])
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise CommandError(f"{' and '.join(missing)} must be installed: pip install {' '.join(missing)}", status=1)
    chosen = choose_device(device)
    results = list(measured(MODELS if model is None else [model], chosen, DTYPES[dtype], quick))
    output().print(f"{devices.title(chosen)}, {dtype}")
    show(results)
    if json_file is not None:
        report = {
            **circumstances(devices.title(chosen), NEEDED),
            "dtype": dtype,
            "quick": quick,
            "method": f"median of rounds in which both take turns, {WARM_UP} before; seconds",
            "results": [result.row() for result in results],
        }
        write_json(json_file, report, overwrite, indent=1)


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
