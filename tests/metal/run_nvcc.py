"""The Metal kernels on an NVIDIA GPU, through the CUDA shim.

    python tests/metal/run_nvcc.py compile             compile the sources, for a GPU on a machine without nvcc
    python tests/metal/run_nvcc.py check               every operator and dtype against the reference
    python tests/metal/run_nvcc.py time --json FILE    time and bytes of each against a copy's bandwidth

``check`` exits with 1 on a failure; each operator has to give the same bits twice. Its shapes are small and PyTorch's
caching allocator is off, so that ``compute-sanitizer --tool memcheck python tests/metal/run_nvcc.py check`` sees every
tensor's bounds, and racecheck ends in reasonable time. For the latter set METAL_STORES_FOR_RACECHECK: it takes atomic
stores for others.

``time`` takes the operators, and the kernels of those that are launches around PyTorch's matrix products by themselves.
Bytes are those of all tensors that are read or written, once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

if "check" in sys.argv:
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import nvcc_shim  # noqa: E402
import torch  # noqa: E402
from problems import (  # noqa: E402
    EXACT,
    OPERATORS,
    TOLERANCES,
    Carafe,
    Case,
    ConnectedComponents,
    DeformConv2d,
    MultiScaleDeformAttn,
    arguments,
    error,
    oracle,
    results,
)
from torch import Tensor  # noqa: E402


def _compile(source: str) -> nvcc_shim.CudaLibrary:
    """deform_conv2d waits for memory more than it computes: the more threads there are, the better."""
    return nvcc_shim.compile_shader(source, registers=64 if "void deform_conv2d_sample(" in source else 128)


torch.mps.compile_shader = _compile

from omniops.backends.columns import Geometry  # noqa: E402
from omniops.backends.mps import (  # noqa: E402
    carafe,
    connected_components,
    deform_conv2d,
    multi_scale_deform_attn,
)
from omniops.backends.mps._library import METAL_TYPES, library  # noqa: E402
from omniops.backends.reference import carafe as carafe_reference  # noqa: E402
from omniops.backends.reference import connected_components as connected_components_reference  # noqa: E402
from omniops.backends.reference import deform_conv2d as deform_conv2d_reference  # noqa: E402
from omniops.backends.reference import multi_scale_deform_attn as multi_scale_deform_attn_reference  # noqa: E402

# The dtypes that each source is compiled for.
SOURCES: dict[str, Sequence[torch.dtype | None]] = {
    "carafe": tuple(METAL_TYPES),
    "carafe_doubling": tuple(METAL_TYPES),
    "deform_conv2d": tuple(METAL_TYPES),
    "connected_components": (None,),
    "multi_scale_deform_attn": tuple(METAL_TYPES),
    "segments": (None,),
}

# The levels of an image of 800 x 1066 pixels in Deformable DETR.
LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))


# The columns of the chunk whose kernels are timed. Those that ship are smaller, for Apple's caches, and would leave a
# GPU of this size idle between launches.
CHUNK_BYTES = 2**27


class Subject(NamedTuple):
    """A file of operators: its kernels, their oracle, and the cases to check and to time."""

    metal: ModuleType
    reference: ModuleType
    cases: Sequence[Case]
    timed: Sequence[Case]
    tolerances: Mapping[torch.dtype, float] = TOLERANCES
    timed_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16)


SUBJECTS = (
    Subject(
        carafe,
        carafe_reference,
        (
            Carafe(1, 8, 1, 1, 5, 1, 2, 1),
            Carafe(2, 20, 5, 6, 5, 2, 2, 1),
            Carafe(1, 21, 6, 7, 5, 1, 2, 1),
            Carafe(1, 24, 4, 34, 3, 3, 2, 1),
            Carafe(1, 9, 1, 37, 3, 1, 2, 1),
            Carafe(2, 17, 6, 5, 9, 1, 2, 1),
            Carafe(2, 6, 5, 7, 3, 2, 3, 2),
            Carafe(1, 12, 33, 1, 1, 3, 1, 3),
            Carafe(1, 8, 9, 10, 5, 8, 4, 1),
            Carafe(1, 19, 3, 70, 5, 1, 1, 2),
        ),
        (Carafe(2, 256, 100, 152, 5, 1, 2, 1),),
    ),
    Subject(
        deform_conv2d,
        deform_conv2d_reference,
        (
            DeformConv2d(2, 16, 11, 14, 8),
            DeformConv2d(2, 6, 5, 4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
            DeformConv2d(1, 24, 5, 4, 6, (1, 3), (1, 2), (0, 2), groups=3, offset_groups=2, masked=False),
            DeformConv2d(3, 300, 6, 7, 5),
            DeformConv2d(1, 37, 9, 9, 2, masked=False),
            DeformConv2d(3, 8, 1, 1, 8, groups=8, offset_groups=2),
            DeformConv2d(1, 64, 13, 17, 16, groups=4, offset_groups=16),
            DeformConv2d(2, 8, 2, 2, 4, (7, 7), padding=(6, 6)),  # hundreds of samples in a cell
        ),
        (
            DeformConv2d(2, 256, 100, 152, 256),
            DeformConv2d(8, 64, 128, 128, 64),
            DeformConv2d(1, 64, 180, 320, 64, offset_groups=16),
        ),
    ),
    Subject(
        connected_components,
        connected_components_reference,
        [
            ConnectedComponents(*shape, connectivity, masks)
            for connectivity in (4, 8)
            for shape, masks in (
                ((14, 37, 71), "adversarial"),
                ((14, 64, 96), "adversarial"),
                ((14, 257, 301), "adversarial"),
                ((3, 1, 200), 0.8),
                ((3, 97, 1), 0.8),
                ((2, 41, 135), 0.02),
                ((2, 150, 135), 0.41),
                ((2, 150, 135), 0.593),
                ((2, 41, 135), 0.95),
            )
        ],
        [
            ConnectedComponents(*shape, 8, masks)
            for shape, rest in (((1, 1024, 1024), "spiral"), ((256, 256, 256), "adversarial"))
            for masks in (0.1, 0.41, 0.7, "all", rest)
        ],
        EXACT,
        (torch.bool,),
    ),
    Subject(
        multi_scale_deform_attn,
        multi_scale_deform_attn_reference,
        [
            case._replace(discrete=discrete)
            for discrete in (False, True)
            for case in (
                MultiScaleDeformAttn(2, ((6, 5), (3, 3), (2, 1)), 41, 2, 32, (2, 3, 1)),
                MultiScaleDeformAttn(1, ((9, 20),), 70, 3, 5, (4,), wide="locations weights"),
                MultiScaleDeformAttn(2, ((0, 7), (8, 9), (1, 1)), 19, 1, 37, (2, 33, 0), wide="weights"),
                MultiScaleDeformAttn(1, ((7, 7), (4, 4)), 65, 4, 12, (5, 2), wide="locations"),
                MultiScaleDeformAttn(1, ((17, 40), (2, 2)), 33, 2, 264, (3, 3)),
                MultiScaleDeformAttn(1, ((1, 1), (2, 2)), 300, 2, 8, (4, 4)),  # hundreds of samples in a cell
            )
        ],
        (
            MultiScaleDeformAttn(2, LEVELS, 17821, 8, 32, (4, 4, 4, 4)),
            MultiScaleDeformAttn(2, LEVELS, 300, 8, 32, (4, 4, 4, 4)),
        ),
    ),
)


def check(subjects: Sequence[Subject]) -> bool:
    """Whether every result is right; prints one line for each operator, dtype, case and layout."""
    # So that these cases too take several launches, and threadgroups several tiles.
    deform_conv2d.MAX_SAMPLES, deform_conv2d.GROUPS, multi_scale_deform_attn.MAX_SAMPLES = 2**11, 2, 2**10
    passed = True
    for subject in subjects:
        for operator in OPERATORS[type(subject.cases[0])]:
            for case in subject.cases:
                expected: tuple[Tensor, ...] = ()
                for dtype, tolerance in subject.tolerances.items():
                    args = arguments(operator, case, dtype)
                    if not expected or tolerance:  # a mask's components are the same in every dtype
                        expected = oracle(subject.reference, operator, args)
                    for layout in (torch.contiguous_format, torch.channels_last):
                        # Of CARAFE's kernels those with 64-bit offsets get the second layout.
                        carafe.WIDE_ELEMENTS = 2**31 if layout == torch.contiguous_format else 1
                        on_gpu = [_on_gpu(value, layout) for value in args]
                        found, again = (results(getattr(subject.metal, operator)(*on_gpu)) for _ in range(2))
                        worst = max(error(x.cpu(), y) for x, y in zip(found, expected, strict=True))
                        same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
                        good = worst <= tolerance and same
                        passed &= good
                        print(
                            f"{'ok  ' if good else 'FAIL'} {operator:29} {dtype!s:15} {case} {layout} {worst:.1e}"
                            f"{'' if same else ', other bits the second time'}"
                        )
    print("all right" if passed else "WRONG RESULTS")
    return passed


def _on_gpu(value: Any, layout: torch.memory_format = torch.contiguous_format) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.cuda().contiguous(memory_format=layout) if value.ndim == 4 else value.cuda()


def seconds(launches: Sequence[Callable[[], object]], repeats: int = 30) -> tuple[float, float]:
    """Median and spread (of the middle half) of the time of one launch; the launches follow each other in a CUDA graph.

    They should work on memory of their own, so that none finds its inputs in the cache.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph, stream=stream):
        kept.extend(launch() for launch in launches)
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3 / len(launches))
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def copy_bandwidth() -> float:
    """Bytes read and written a second, by an elementwise kernel: in a graph, copy_ is the slower copy engine's."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    median, _ = seconds([lambda: torch.neg(source, out=target)] * 4)
    return 2 * source.numel() * source.element_size() / median


class Timed(NamedTuple):
    name: str
    case: Case
    launch: Callable[[], Any]
    bytes: int


def timed(subjects: Sequence[Subject], dtype: torch.dtype, seed: int) -> Iterator[Callable[[], Timed]]:
    """What is timed in this dtype, each made when called, on memory of its own."""
    for subject in subjects:
        for case in subject.timed if dtype in subject.timed_dtypes else ():
            for operator in OPERATORS[type(case)]:
                yield lambda operator=operator, case=case, metal=subject.metal: _operator(
                    getattr(metal, operator), operator, case, dtype, seed
                )
            if isinstance(case, DeformConv2d):
                yield lambda case=case: _sample(case, dtype, seed)
                yield lambda case=case: _gradients(case, dtype, seed)


def _operator(function: Callable[..., Any], operator: str, case: Case, dtype: torch.dtype, seed: int) -> Timed:
    args = [_on_gpu(value) for value in arguments(operator, case, dtype, seed)]
    return Timed(operator, case, lambda: function(*args), _bytes(*args, *results(function(*args))))


def _chunk(case: DeformConv2d, dtype: torch.dtype, seed: int) -> tuple[list[Any], Tensor]:
    """What the kernels of deform_conv2d take for the positions of the first chunk, and its columns."""
    input, offset, weight, _, mask, *pairs = arguments("deform_conv2d", case, dtype, seed)
    taps, (height, width) = weight.shape[2] * weight.shape[3], offset.shape[2:]
    positions = min(case.n * height * width, CHUNK_BYTES // (taps * case.c * dtype.itemsize))
    columns = torch.randn(case.groups, positions, taps, case.c // case.groups, dtype=dtype, device="cuda")
    image = _on_gpu(input).permute(0, 2, 3, 1).contiguous()
    geometry = Geometry(case.kernel_size, *pairs, case.groups, case.offset_groups)
    return [image, _on_gpu(offset), _on_gpu(mask), geometry, 0], columns


def _sample(case: DeformConv2d, dtype: torch.dtype, seed: int) -> Timed:
    args, columns = _chunk(case, dtype, seed)
    share = columns.shape[1] / (args[1].numel() / args[1].shape[1])  # of all positions
    moved = int(share * _bytes(*args)) + _bytes(columns)
    return Timed("columns", case, lambda: deform_conv2d._sample(*args, columns), moved)


def _gradients(case: DeformConv2d, dtype: torch.dtype, seed: int) -> Timed:
    args, columns = _chunk(case, dtype, seed)
    image, offset, mask = args[:3]
    written = torch.zeros_like(image, dtype=torch.float32), torch.empty_like(offset), torch.empty_like(mask)
    share = columns.shape[1] / (offset.numel() / offset.shape[1])
    # The gradient of the image is added to: read and written.
    moved = int(share * _bytes(*args, *written, written[0])) + _bytes(columns)
    return Timed("gradients of columns", case, lambda: deform_conv2d._gradients(columns, *args, *written), moved)


def _bytes(*values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))


def time(subjects: Sequence[Subject], path: str | None) -> None:
    """Print and write a row for each operator, kernel and dtype: time, bytes at least moved, floor, ratio."""
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bool):
        for alike in zip(*(timed(subjects, dtype, seed) for seed in range(4)), strict=True):
            made = [make() for make in alike]
            name, case, _, moved = made[0]
            median, spread = seconds([one.launch for one in made])
            row = {
                "operator": name,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": case._asdict(),
                "milliseconds": median * 1e3,
                "spread": spread * 1e3,
                "bytes": moved,
                "floor_milliseconds": moved / bandwidth * 1e3,
                "ratio": median * bandwidth / moved,
            }
            rows.append(row)
            print(
                f"{name:29} {row['dtype']:8} {case} {median * 1e3:.4f} ms +- {spread * 1e3:.4f}, "
                f"{moved / 1e6:.1f} MB, floor {row['floor_milliseconds']:.4f} ms, ratio {row['ratio']:.2f}"
            )
    if path:
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": " ".join(("python tests/metal/run_nvcc.py", *sys.argv[1:])),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "nvcc": library("connected_components").nvcc,
            "copy_bytes_per_second": bandwidth,
            "rows": rows,
        }
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("compile", "check", "time"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", choices=SOURCES, metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    options = parser.parse_args()
    subjects = [x for x in SUBJECTS if options.only in (None, x.metal.__name__.rpartition(".")[2])]
    if options.mode == "compile":
        for name, dtypes in SOURCES.items():
            for dtype in dtypes if options.only in (None, name) else ():
                compiled = library(name, dtype)
                print(f"{name}, {dtype}: {len(dir(compiled))} kernels, nvcc {compiled.nvcc}")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    if options.mode == "check":
        return 0 if check(subjects) else 1
    time(subjects, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
