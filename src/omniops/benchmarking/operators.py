"""How fast is every operator on this machine, beside what a user would call instead?

What is timed of an operator is its case: a module like those of ``omniops.cli.cases``, which says what it holds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from omniops import device as devices
from omniops.benchmarking import timing
from omniops.benchmarking.contenders import BOTH, FLOOR, FORWARD, Contender, Shape, bare_function
from omniops.benchmarking.timing import CALL, GRAPH, HOST
from omniops.environment import serving
from omniops.formatting import dtype_name, first_line


@dataclass(frozen=True)
class Result:
    """The times of one contender in one setting, in milliseconds."""

    operator: str
    shape: Shape
    dtype: str
    direction: str
    contender: str
    mode: str
    """As ``timing.METHOD`` has it, or "" for the byte floor and for times from elsewhere."""
    median_ms: float | None
    lower_quartile_ms: float | None = None
    upper_quartile_ms: float | None = None
    samples: int = 0
    measured: bool = True
    """False for the byte floor, which is computed, and for times that were not taken in this run."""
    error: str = ""
    """Why there is no time."""

    @property
    def setting(self) -> tuple[str, Shape, str, str]:
        """What the contenders of have in common that are compared."""
        return self.operator, self.shape, self.dtype, self.direction

    @property
    def label(self) -> str:
        """The contender's name, starred where its time is from elsewhere."""
        return self.contender if self.measured or self.contender == FLOOR else f"{self.contender}*"


class Setting(NamedTuple):
    """What is timed in turns."""

    case: ModuleType
    shape: Shape
    dtype: torch.dtype
    dtype_label: str
    """ "tf32" for float32 while PyTorch is told to allow TF32."""
    on_host: bool = False
    """Whether the host's time is taken, and not the device's."""


def settings(cases: Iterable[ModuleType], device: torch.device, quick: bool = False) -> Iterator[Setting]:
    """The settings of operators on a device: all shapes and dtypes, or with ``quick`` one tiny shape.

    TF32 is allowed while a setting of it is the current one.
    """
    matmul = torch.backends.cuda.matmul
    for case in cases:
        dtypes = timed_dtypes(case, serving(case.NAME, device.type))
        for shape in case.shapes(device.type, quick):
            for dtype in dtypes:
                yield Setting(case, shape, dtype, dtype_name(dtype))
                if device.type == "cuda" and dtype == torch.float32 and getattr(case, "IN_TF32", False):
                    before = matmul.allow_tf32
                    matmul.allow_tf32 = True
                    try:
                        yield Setting(case, shape, dtype, "tf32")
                    finally:
                        matmul.allow_tf32 = before
        # The host takes as long in every dtype.
        yield Setting(case, case.host_shape(device.type), dtypes[0], dtype_name(dtypes[0]), on_host=True)


def timed_dtypes(case: ModuleType, backend: ModuleType) -> tuple[torch.dtype, ...]:
    """The dtypes of an operator that are timed: nobody waits for float64."""
    dtypes = getattr(case, "DTYPES", backend.DTYPES)
    return tuple(getattr(case, "TIMED_DTYPES", (dtype for dtype in dtypes if dtype != torch.float64)))


def measurement_count(cases: Iterable[ModuleType], device: torch.device, quick: bool = False) -> int:
    """How many lists of results ``measure`` yields."""
    return sum(len(setting.case.traffic(setting.shape)) for setting in settings(cases, device, quick))


def measure(
    cases: Iterable[ModuleType],
    device: torch.device,
    seconds: float = 0.5,
    *,
    quick: bool = False,
    bytes_per_second: float | None = None,
    on_start: Callable[[str], object] = lambda name: None,
) -> Iterator[list[Result]]:
    """The results of each direction in each setting, as they are taken.

    Args:
        cases: those of the operators.
        device: where they run.
        seconds: the time spent on each measurement.
        quick: one tiny shape an operator.
        bytes_per_second: what the byte floor is computed with; ``copy_bandwidth`` where it is not given.
        on_start: called before each measurement with its name.

    Example:
        >>> from omniops.cli.cases import carafe
        >>> results = next(measure([carafe], torch.device("cpu"), seconds=0, quick=True, bytes_per_second=1e10))
        >>> [result.contender for result in results]
        ['omniops', 'reference kernels', 'unfold + einsum', 'bilinear', 'byte floor']
    """
    bandwidth = copy_bandwidth(device, quick) if bytes_per_second is None else bytes_per_second
    for setting in settings(cases, device, quick):
        case, shape, dtype, dtype_label, on_host = setting
        contenders: list[Contender] = list(case.contenders(shape, dtype, device))
        traffic = case.traffic(shape)
        if on_host:
            contenders = [contender for contender in contenders if contender.on_host]
            contenders += [bare_function(device)] if BOTH in traffic else []
        for direction, elements in traffic.items():
            on_start(f"{case.NAME} {shape} {dtype_label} {direction}{', host' if on_host else ''}")
            results = list(_time_contenders(setting, direction, contenders, device, seconds))
            if not on_host:
                floor = elements * dtype.itemsize / bandwidth * 1e3
                results.append(Result(case.NAME, shape, dtype_label, direction, FLOOR, "", floor, measured=False))
            yield results


def copy_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Bytes read and written a second by a large copy; with ``quick`` by a small one."""
    size = 2**28 if device.type == "cpu" else 2**30
    if quick:
        size = 2**24
    limit = devices.memory(device).limit
    return timing.copy_bandwidth(device, size if limit is None else min(size, limit // 8))


def read_report(path: Path) -> tuple[list[Result], str, str]:
    """The results that ``omniops bench --json`` wrote, without floors: none is of this run.

    Returns:
        The results, the device that they were taken on, and where they are from.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is another.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [{**row, "shape": tuple(row["shape"]), "measured": False} for row in report["results"]]
        results = [Result(**row) for row in rows if row["contender"] != FLOOR]
        measured = f"not measured in this run, but with {report.get('command')} on {report.get('date')}"
        return results, str(report.get("device")), report.get("origin", measured)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a file that omniops bench --json wrote") from None


def _time_contenders(
    setting: Setting, direction: str, contenders: Sequence[Contender], device: torch.device, seconds: float
) -> Iterator[Result]:
    """Each contender's times, or why it has none."""
    key = setting.case.NAME, setting.shape, setting.dtype_label, direction
    calls: dict[tuple[str, str], timing.Call] = {}
    slow: set[str] = set()
    failed: list[Result] = []
    for contender in contenders:
        call = contender.forward if direction == FORWARD else contender.forward_backward
        if call is None:
            continue
        mode = HOST if setting.on_host else CALL
        try:
            if timing.warm_up(call, device, seconds / 2):
                slow.add(contender.name)
            calls[contender.name, mode] = call
            if mode == CALL and device.type == "cuda" and contender.capturable:
                mode = GRAPH
                calls[contender.name, mode] = timing.captured(call)
        except (RuntimeError, NotImplementedError) as error:
            failed.append(Result(*key, contender.name, mode, None, error=first_line(error)))
    for (name, mode), times in timing.milliseconds(calls, device, seconds, slow).items():
        lower, upper = timing.quartiles(times)
        yield Result(*key, name, mode, statistics.median(times), lower, upper, len(times))
    yield from failed
