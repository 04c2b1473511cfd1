"""What first calls cost on an NVIDIA GPU: Triton's compilations, counted and timed in fresh processes.

For each operator and dtype a process calls forward and backward with one size of map, then with 39 others as
multi-scale training meets them: heights and widths drawn from 20 to 100, the same in every process. It begins with an
empty cache of Triton's; a second process has what the first one left on the disk. CUDA and cuBLAS are initialised
before, Triton is not: importing it is part of the first call.

A compilation is a new ``.cubin`` file in Triton's cache (TRITON_CACHE_DIR), so it is counted with every version of
Triton, and what a process finds there is none.

python benchmarks/first_call.py --json docs/benchmarks/first_call-h200.json
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import carafe, connected_components, deform_conv2d, device, multi_scale_deform_attn
from omniops.benchmarking.circumstances import circumstances
from omniops.cli import errors
from omniops.cli.common import CommandError, Heartbeat, output, progress
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.formatting import digits, dtype_name

FLOATS = (torch.float32, torch.float16)  # bfloat16 compiles like float16
DTYPES = {
    "carafe": FLOATS,
    "deform_conv2d": FLOATS,
    "multi_scale_deform_attn": FLOATS,
    "connected_components": (torch.uint8,),
}
EMPTY, ON_DISK = "empty", "on disk"
SMALLEST, LARGEST = 20, 100
MAX_SECONDS, MAX_COMPILATIONS, LAST_SIZE = 2.0, 6, 3
"""The goals with an empty cache: of a first call, of compilations in all, and the size of the last of them."""


@dataclass
class Result:
    """Of one process."""

    operator: str
    dtype: str
    cache: str
    seconds: list[float]
    """Of the first call with each size: forward and backward."""
    compilations: list[int]
    """In these calls."""

    @property
    def last_size(self) -> int:
        """The number of the last size, from 1, with which something was compiled; 0 where nothing was."""
        return max((number for number, count in enumerate(self.compilations, 1) if count), default=0)

    def met(self) -> bool:
        """Whether the goals are."""
        return (
            self.seconds[0] <= MAX_SECONDS
            and sum(self.compilations) <= MAX_COMPILATIONS
            and self.last_size <= LAST_SIZE
        )


def sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths, all different, and the same in every run."""
    lengths = range(SMALLEST, LARGEST + 1)
    return random.Random(0).sample(list(product(lengths, lengths)), count)


def call(operator: str, dtype: torch.dtype, size: tuple[int, int], device_type: str = "cuda") -> Callable[[], object]:
    """Forward and backward of an operator, its tensors made."""
    h, w = size

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device_type, requires_grad=True)

    if operator == "connected_components":
        mask = (torch.rand((2, 1, h, w), device=device_type) < 0.5).to(dtype)
        return lambda: connected_components(mask)
    if operator == "carafe":
        features, masks = leaf(2, 256, h, w), leaf(2, 25, 2 * h, 2 * w)
        return lambda: carafe(features, masks, 5, 1, 2).sum().backward()
    if operator == "multi_scale_deform_attn":
        sizes = [(-(-h // scale), -(-w // scale)) for scale in (1, 2, 4, 8)]
        pixels, queries = sum(height * width for height, width in sizes), h + w
        value, points = leaf(2, pixels, 8, 32), (leaf(2, queries, 8, 4, 4, 2), leaf(2, queries, 8, 4, 4))
        return lambda: multi_scale_deform_attn(value, sizes, *points).sum().backward()
    inputs = leaf(2, 64, h, w), leaf(2, 18, h, w), leaf(64, 64, 3, 3), leaf(64)
    mask = leaf(2, 9, h, w)
    return lambda: deform_conv2d(*inputs, padding=1, mask=mask).sum().backward()


def in_this_process(operator: str, dtype: torch.dtype, count: int) -> Iterator[tuple[float, int]]:
    """Seconds and compilations with each size."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    warm = torch.ones((8, 8), dtype=torch.float32, device="cuda", requires_grad=True)
    (warm @ warm).sum().backward()
    before = compiled(cache)
    for size in sizes(count):
        run = call(operator, dtype, size)
        torch.cuda.synchronize()
        started = perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = perf_counter() - started
        now = compiled(cache)
        yield seconds, now - before
        before = now


def compiled(cache: Path) -> int:
    """The kernels in Triton's cache."""
    return sum(1 for _ in cache.rglob("*.cubin"))


def in_a_process_of_its_own(
    operator: str, dtype: str, count: int, cache: Path, beat: Callable[[int], object]
) -> tuple[list[float], list[int]]:
    """Seconds and compilations with each size; ``beat`` is called with each number of sizes that are done."""
    command = [sys.executable, __file__, "--within", "--operator", operator, "--dtype", dtype, "--sizes", str(count)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    seconds, compilations = [], []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                took, new = json.loads(line)
                seconds.append(took)
                compilations.append(new)
                beat(len(seconds))
        except BaseException:
            process.kill()
            raise
    if process.returncode or len(seconds) != count:
        raise CommandError(f"the process of {operator} in {dtype} ended with {process.returncode}", status=1)
    return seconds, compilations


def measured(settings: Sequence[tuple[str, str]], count: int) -> Iterator[Result]:
    """Each operator and dtype with an empty cache, then with one on the disk."""
    with progress() as bar:
        task = bar.add_task("", total=2 * len(settings) * count)
        heartbeat = Heartbeat(bar)
        for number, (operator, dtype) in enumerate(settings):
            with tempfile.TemporaryDirectory() as folder:
                for turn, cache in enumerate((EMPTY, ON_DISK)):
                    what = f"{operator} {dtype}, cache {cache}"
                    done = (2 * number + turn) * count

                    def beat(sizes: int, what: str = what, done: int = done) -> None:
                        bar.update(task, description=what, completed=done + sizes)
                        heartbeat.beat(f"{what}: {sizes} of {count} sizes")

                    beat(0)
                    yield Result(
                        operator, dtype, cache, *in_a_process_of_its_own(operator, dtype, count, Path(folder), beat)
                    )


def show(results: Sequence[Result]) -> None:
    """The table."""
    table = Table(
        "operator", "dtype", "cache", "first call", "compilations", "longest later call", "compilations",
        "last one with size", "", box=SIMPLE_HEAD,
    )  # fmt: skip
    for result in results:
        longest = max(result.seconds[1:], default=0.0)
        table.add_row(
            result.operator,
            result.dtype,
            result.cache,
            f"{digits(result.seconds[0])} s",
            str(result.compilations[0]),
            f"{digits(longest)} s",
            str(sum(result.compilations[1:])),
            str(result.last_size or ""),
            "" if result.cache != EMPTY else "[green]met[/]" if result.met() else "[bold red]missed[/]",
        )
    output().print(table)
    output().print(
        f"Goals with an empty cache: a first call of {MAX_SECONDS:g} s, {MAX_COMPILATIONS} compilations in all, "
        f"the last with size {LAST_SIZE}.",
        soft_wrap=True,
    )


def main(
    operator: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    dtype: Annotated[str | None, typer.Option(help="One of those that the operator is used with.")] = None,
    count: Annotated[int, typer.Option("--sizes", min=1, help="Of maps.")] = 40,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    overwrite: OverwriteOption = False,
    within: Annotated[bool, typer.Option("--within", hidden=True)] = False,
) -> None:
    """Count and time first calls."""
    if operator not in (*DTYPES, None):
        raise CommandError(f"unknown operator {operator!r}: there are {', '.join(DTYPES)}")
    settings = [
        (name, dtype_name(known))
        for name, dtypes in DTYPES.items()
        for known in dtypes
        if operator in (name, None) and dtype in (dtype_name(known), None)
    ]
    if not settings:
        dtypes = {dtype_name(known): None for name in DTYPES if operator in (name, None) for known in DTYPES[name]}
        raise CommandError(f"unknown dtype {dtype!r}: there are {', '.join(dtypes)}")
    require_new([json_file], overwrite, [])
    if not torch.cuda.is_available():
        output().print("No first calls were timed: Triton compiles for an NVIDIA GPU, and there is none here.")
        return
    if within:
        for figures in in_this_process(settings[0][0], getattr(torch, settings[0][1]), count):
            print(json.dumps(figures), flush=True)
        return
    results = list(measured(settings, count))
    show(results)
    if json_file is not None:
        rows = [{**asdict(result), "last_size": result.last_size} for result in results]
        goals: dict[str, Any] = {
            "first_call_seconds": MAX_SECONDS,
            "compilations": MAX_COMPILATIONS,
            "last_size": LAST_SIZE,
            "met": {f"{result.operator} {result.dtype}": result.met() for result in results if result.cache == EMPTY},
        }
        report = {
            **circumstances(device.title(torch.device("cuda")), ()),
            "sizes": sizes(count),
            "results": rows,
            "goals": goals,
        }
        write_json(json_file, report, overwrite, indent=1)


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
