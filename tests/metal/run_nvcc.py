"""The Metal kernels of CARAFE on an NVIDIA GPU, through the CUDA shim.

    python tests/metal/run_nvcc.py check               every dtype and operator against the float64 oracle
    python tests/metal/run_nvcc.py time --json FILE    time and bytes of each operator against a copy's bandwidth

``check`` exits with 1 on a failure. Its shapes are small and PyTorch's caching allocator is off, so that
``compute-sanitizer --tool memcheck python tests/metal/run_nvcc.py check`` sees every tensor's bounds, and racecheck
ends in reasonable time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if "check" in sys.argv:
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import nvcc_shim
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
torch.mps.compile_shader = nvcc_shim.compile_shader

from omniops.backends.mps import carafe as metal  # noqa: E402
from omniops.backends.reference import carafe as reference  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
OPERATORS = ("carafe", "carafe_backward_features", "carafe_backward_masks")
# N, C, H, W, kernel_size, group_size, scale_factor, stride
SHAPES = (
    (1, 8, 1, 1, 5, 1, 2, 1),
    (2, 20, 5, 6, 5, 2, 2, 1),
    (1, 21, 6, 7, 5, 1, 2, 1),
    (1, 24, 4, 34, 3, 3, 2, 1),
    (1, 9, 1, 37, 3, 1, 2, 1),
    (2, 17, 6, 5, 9, 1, 2, 1),
    (2, 6, 5, 7, 3, 2, 3, 2),
    (1, 12, 33, 1, 1, 3, 1, 3),
    (1, 8, 9, 10, 5, 8, 4, 1),
    (1, 19, 3, 70, 5, 1, 1, 2),
)
TIMED = (2, 256, 100, 152, 5, 1, 2, 1)


def arguments(operator: str, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[int]]:
    """The tensors of an operator, on the CPU, and the integers behind them."""
    n, c, h, w, k, g, s, t = shape
    rows, columns = -(-h // t) * s, -(-w // t) * s
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    features, masks, grad = random(n, c, h, w), random(n, g * k * k, rows, columns), random(n, c, rows, columns)
    tensors, extent = {
        "carafe": ([features, masks], []),
        "carafe_backward_features": ([grad, masks], [h, w]),
        "carafe_backward_masks": ([grad, features], []),
    }[operator]
    return tensors, [*extent, k, g, s, t]


def check() -> bool:
    """Whether every result is right; prints one line for each."""
    passed = True
    for operator in OPERATORS:
        for dtype, tolerance in TOLERANCES.items():
            for shape in SHAPES:
                tensors, numbers = arguments(operator, shape, dtype)
                expected = getattr(reference, operator)(*(tensor.double() for tensor in tensors), *numbers)
                for layout in (torch.contiguous_format, torch.channels_last):
                    on_gpu = [tensor.cuda().contiguous(memory_format=layout) for tensor in tensors]
                    result = getattr(metal, operator)(*on_gpu, *numbers).double().cpu()
                    error = ((result - expected).abs().max() / expected.abs().max()).item()
                    good = error < tolerance
                    passed &= good
                    print(f"{'ok  ' if good else 'FAIL'} {operator:25} {dtype!s:15} {shape} {layout} {error:.1e}")
    print("all right" if passed else "WRONG RESULTS")
    return passed


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


def time(path: str | None) -> None:
    """Print and write a row for each operator and dtype: time, bytes at least moved, floor, ratio."""
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for dtype in (torch.float32, torch.float16):
        for operator in OPERATORS:
            sets = []
            for seed in range(4):
                tensors, numbers = arguments(operator, TIMED, dtype, seed)
                sets.append([*(tensor.cuda() for tensor in tensors), *numbers])
            function = getattr(metal, operator)
            result = function(*sets[0])
            moved = sum(x.numel() * x.element_size() for x in [result, *sets[0]] if isinstance(x, Tensor))
            del result
            median, spread = seconds([lambda values=values, function=function: function(*values) for values in sets])
            row = {
                "operator": operator,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": TIMED,
                "milliseconds": median * 1e3,
                "spread": spread * 1e3,
                "bytes": moved,
                "floor_milliseconds": moved / bandwidth * 1e3,
                "ratio": median * bandwidth / moved,
            }
            rows.append(row)
            print(
                f"{operator:25} {row['dtype']:8} {median * 1e3:.4f} ms +- {spread * 1e3:.4f}, {moved / 1e6:.1f} MB, "
                f"floor {row['floor_milliseconds']:.4f} ms, ratio {row['ratio']:.2f}"
            )
    if path:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_second": bandwidth,
            "rows": rows,
        }
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("check", "time", "compile"))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.mode == "compile":
        from omniops.backends.mps._library import library

        library("carafe")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    if options.mode == "check":
        return 0 if check() else 1
    time(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
