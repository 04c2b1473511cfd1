"""Operators and models in onnxruntime and OpenVINO beside omniops itself, on the CPU.

Weights are random. Files are written by ``omniops.export`` into a temporary folder and compared with the module once;
then the runtimes take turns, each on as many threads as --threads says, in float32. The operators have the shapes of
``omniops bench``; SAM 2 is "tiny" at 1024 x 1024, and the detector's picture 640 x 480.

pip install 'omniops[all]' onnxruntime openvino
python benchmarks/exported.py --json exported.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

import omniops
from omniops import export
from omniops.benchmarking.circumstances import circumstances
from omniops.benchmarking.timing import CALL, milliseconds, quartiles
from omniops.cli import errors
from omniops.cli.common import CommandError, output
from omniops.cli.errors import say
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.formatting import digits

OURS, ONNXRUNTIME, OPENVINO = "omniops", "onnxruntime", "openvino"
SUFFIXES = {ONNXRUNTIME: ".onnx", OPENVINO: ".xml"}


@dataclass(frozen=True)
class Case:
    """What is timed."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    is_compared: bool = True
    """False where random weights give results in an order that rounding changes."""


class Carafe(nn.Module):
    """CARAFE with given masks."""

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Five by five, twice the size."""
        return omniops.carafe(features, masks, 5, 1, 2)


class DeformConv2d(nn.Module):
    """Modulated deformable convolution with given offset and mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / (3 * channels**0.5))

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Three by three."""
        return omniops.deform_conv2d(input, offset, self.weight, padding=1, mask=mask)


class Attention(nn.Module):
    """Multi-scale deformable attention to given locations."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """One call of an encoder's layer."""
        return omniops.multi_scale_deform_attn(value, self.sizes, locations, weights)


def operators(quick: bool) -> Iterator[Case]:
    """With the inputs that a network would give them."""
    side, c = (8, 16) if quick else (64, 256)
    yield Case(
        f"carafe (1, {c}, {side}, {side}), k 5, s 2",
        Carafe(),
        (torch.randn(1, c, side, side), torch.randn(1, 25, 2 * side, 2 * side).softmax(1)),
    )
    offset, mask = torch.randn(1, 18, side, side), torch.rand(1, 9, side, side)
    yield Case(
        f"deform_conv2d (1, {c} -> {c}, {side}, {side}), 3 x 3",
        DeformConv2d(c),
        (torch.randn(1, c, side, side), offset, mask),
    )
    sizes = [(side >> level, side >> level) for level in range(3)]
    pixels = sum(height * width for height, width in sizes)
    locations, weights = torch.rand(1, pixels, 8, 3, 4, 2), torch.rand(1, pixels, 8, 12).softmax(-1)
    yield Case(
        f"multi_scale_deform_attn, {pixels} queries, 8 heads of {c // 8}, 3 levels, 4 points",
        Attention(sizes),
        (torch.randn(1, pixels, 8, c // 8), locations, weights.unflatten(-1, (3, 4))),
    )


def models(quick: bool) -> Iterator[Case]:
    """SAM 2's parts and a detector."""
    from omniops.detection import faster_rcnn_resnet50_fpn_carafe
    from omniops.export import detection, sam2
    from omniops.sam2 import load

    size = 128 if quick else 1024
    network = load("tiny", "cpu", "float32", random_weights=True, image_size=size)
    for part in sam2.parts(network, dynamic=False):
        yield Case(f"SAM 2 tiny, {part.name}", part.module, part.args)
    detector = faster_rcnn_resnet50_fpn_carafe(None).eval()
    height, width = (64, 80) if quick else (480, 640)
    (part,) = detection.parts(detector, dynamic=False, size=(height, width))
    yield Case(f"Faster R-CNN, {width} x {height}", part.module, part.args, is_compared=False)


def onnxruntime_session(path: Path, args: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A call of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), args, strict=True)}
    return lambda: session.run(None, inputs)


def openvino_session(path: Path, args: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A call of the file."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(path, "CPU", settings)
    inputs = [tensor.numpy() for tensor in args]
    return lambda: compiled(inputs)


SESSIONS = {ONNXRUNTIME: onnxruntime_session, OPENVINO: openvino_session}


def measure(case: Case, seconds: float, threads: int) -> dict[str, Any]:
    """A row: for each runtime its times in milliseconds, and how far its results are from omniops'."""
    row: dict[str, Any] = {"what": case.name, "difference": {}, "errors": {}}
    tensors = [argument for argument in case.args if isinstance(argument, Tensor)]

    def ours() -> object:
        with torch.no_grad():
            return case.module(*case.args)

    calls: dict[tuple[str, str], Callable[[], object]] = {(OURS, CALL): ours}
    with tempfile.TemporaryDirectory() as folder:
        for runtime, session in SESSIONS.items():
            say(f"{case.name}: writing it for {runtime}")
            try:
                written = export.write(case.module, case.args, Path(folder) / f"file{SUFFIXES[runtime]}")
                if case.is_compared:
                    row["difference"][runtime] = export.largest_difference(written, case.module, case.args)
                calls[runtime, CALL] = session(written.path, tensors, threads)
            except export.ExportError as error:
                row["errors"][runtime] = str(error)
        say(f"{case.name}: timing it")
        for call in calls.values():
            call()
        times = milliseconds(calls, torch.device("cpu"), seconds)
    row["ms"] = {runtime: statistics.median(taken) for (runtime, _), taken in times.items()}
    row["quartiles"] = {runtime: quartiles(taken) for (runtime, _), taken in times.items()}
    return row


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds, and in brackets how many times as long as omniops."""
    shown = Table("what", *(f"{name}, ms" for name in (OURS, *SESSIONS)), "difference", box=SIMPLE_HEAD)
    for row in rows:
        cells = [
            f"{digits(row['ms'][name])} ({row['ms'][name] / row['ms'][OURS]:.2f})" if name in row["ms"] else "-"
            for name in SESSIONS
        ]
        difference = f"{max(row['difference'].values()):.0e}" if row["difference"] else "-"
        shown.add_row(row["what"], digits(row["ms"][OURS]), *cells, difference)
    return shown


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of each runtime.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="Spent on each runtime and case.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Small networks and maps, in a minute.")] = False,
    only: Annotated[str, typer.Option(help="Cases with this in their name.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Time operators and models in onnxruntime and OpenVINO beside omniops."""
    require_new([json_file], overwrite, [])
    missing = [package for package in SESSIONS if find_spec(package) is None]
    if missing:
        raise CommandError(f"{' and '.join(missing)} must be installed: pip install {' '.join(missing)}", status=1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = [
        measure(case, seconds, threads) for make in (operators, models) for case in make(quick) if only in case.name
    ]
    output().print(table(rows))
    if json_file is not None:
        report = {**circumstances("CPU", tuple(SESSIONS)), "quick": quick, "rows": rows}
        write_json(json_file, report, overwrite, indent=1)


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
