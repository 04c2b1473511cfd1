"""Mistakes put into the shipped sources, each of which the emulator, or a comparison with the oracle, has to catch."""

import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import emulator
import pytest
import torch
from emulator import CompileError, KernelError
from problems import DeformConv2d, arguments, doubled, error, results
from torch import Tensor

from omniops.backends.mps import carafe as shipped
from omniops.backends.mps import connected_components, deform_conv2d
from omniops.backends.reference import connected_components as labelled
from omniops.backends.reference import deform_conv2d as reference

SOURCE = (Path(shipped.__file__).parent / "carafe.metal").read_text(encoding="ascii")
LAUNCHES = inspect.getsource(shipped)

# N, C, H, W, kernel_size, group_size, scale_factor, stride. 11 channels: a block of eight and one that overlaps it.
GENERAL = (1, 11, 5, 5, 3, 1, 3, 2)
FEW_CHANNELS = (2, 3, 5, 5, 3, 1, 3, 2)
DOUBLING = (1, 11, 5, 6, 5, 1, 2, 1)


@pytest.fixture(autouse=True)
def the_same_orders_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every test, whichever ran before: a bug that shows only in some orders is caught each time or never."""
    monkeypatch.setattr(emulator, "_seeds", itertools.count())


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"the shipped source no longer has {old!r}: plant the bug elsewhere"
    return text.replace(old, new)


def run(metal: str, python: str, case: tuple[int, ...], operator: str) -> Tensor:
    """The operator with these sources instead of the shipped ones, in float32."""
    module: Any = ModuleType("planted")
    exec(compile(python, "planted.py", "exec"), module.__dict__)
    library = emulator.compile_shader(metal)
    module.library = lambda name, dtype: library
    n, c, h, w, k, g, s, t = case
    rows, columns = -(-h // t) * s, -(-w // t) * s
    features, masks, grad = (
        torch.ones(shape) for shape in ((n, c, h, w), (n, g * k * k, rows, columns), (n, c, rows, columns))
    )
    tensors = {"carafe": (features, masks), "carafe_backward_features": (grad, masks, h, w)}
    result: Tensor = emulator.launched(getattr(module, operator), *tensors.get(operator, (grad, features)), k, g, s, t)
    return result


@pytest.mark.parametrize("operator", ["carafe", "carafe_backward_features", "carafe_backward_masks"])
@pytest.mark.parametrize("case", [GENERAL, FEW_CHANNELS, DOUBLING], ids=str)
def test_the_shipped_sources_pass(operator: str, case: tuple[int, ...]) -> None:
    run(SOURCE, LAUNCHES, case, operator)


OUTSIDE = r"line \d+: thread \(\d+, \d+, \d+\) of the grid (reads|writes) \d+ bytes outside argument \d"


@pytest.mark.parametrize(
    ("old", "new", "case", "operator", "error", "message"),
    [
        pytest.param("min(K, height + P - y)", "min(K, height + P - y + 1)", DOUBLING, "carafe", KernelError, OUTSIDE,
                     id="one row too many at the lower border"),
        pytest.param("max(0, P - y)", "max(0, P - y - 1)", DOUBLING, "carafe", KernelError, OUTSIDE,
                     id="one row too many at the upper border"),
        pytest.param("min(z.k, z.width - x)", "min(z.k, z.width - x + 1)", GENERAL, "carafe", KernelError, OUTSIDE,
                     id="one column too many at the right border"),
        pytest.param("min(z.k, z.height - y)", "z.k", GENERAL, "carafe", KernelError, OUTSIDE,
                     id="no lower border"),
        pytest.param("clamp(x + v, 0, z.width - 1)", "x + v", GENERAL, "carafe_backward_masks", KernelError, OUTSIDE,
                     id="no left and right border"),
        pytest.param("out[c * z.result_plane] =", "out[(c + 1) * z.result_plane] =", GENERAL, "carafe", KernelError,
                     OUTSIDE + r" .*device float\* out", id="a write past the end"),
        pytest.param("c >= block.skip && c < block.count", "c >= block.skip", FEW_CHANNELS, "carafe", KernelError,
                     "data race|" + OUTSIDE, id="channels that are not there"),
        pytest.param("c >= block.skip && c < block.count", "c < block.count", GENERAL, "carafe_backward_features",
                     KernelError, "a data race", id="two threads write one element"),
        pytest.param("c >= block.skip && c < block.count", "c > block.skip && c < block.count", GENERAL, "carafe",
                     AssertionError, "nothing wrote", id="a channel that nobody writes"),
        pytest.param("out[c * z.plane] = T(sums[c]);", "out[c * z.plane] = out[c * z.plane] + T(sums[c]);", GENERAL,
                     "carafe_backward_features", KernelError, "memory that nothing wrote: argument 2",
                     id="a read of memory that nothing wrote"),
        pytest.param("device const T* weights = masks", "constant T* weights = masks", GENERAL, "carafe", CompileError,
                     "address space|cannot initialize", id="mixed address spaces"),
        pytest.param("device T* out [[buffer(2)]]", "device const T* out [[buffer(2)]]", GENERAL, "carafe",
                     CompileError, "read-only variable is not assignable", id="a write to const"),
        pytest.param("constant int* sizes", "constant long* sizes", GENERAL, "carafe", TypeError,
                     r"\(constant long\* sizes\): .* arrives as int", id="sizes of another type"),
        pytest.param("  for (int distance = SIMD / 2;",
                     "  if (int(lane) >= tile) return;\n  for (int distance = SIMD / 2;", DOUBLING,
                     "carafe_backward_masks", KernelError, "lane of its simdgroup that is not active",
                     id="lanes that leave before a shuffle"),
    ],
)  # fmt: skip
def test_bugs_in_the_kernels(
    old: str, new: str, case: tuple[int, ...], operator: str, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(replaced(SOURCE, old, new), LAUNCHES, case, operator)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        pytest.param("out, sizes, threads", "out, [True, *sizes[1:]], threads", TypeError, "got bool", id="a bool"),
        pytest.param("group_size=group_size,", "group_size=group_size[:2],", ValueError,
                     "group_size has 2 axes, threads has 3", id="group_size of the wrong rank"),
        pytest.param("group_size=group_size,", "group_size=(32, 32, 2),", ValueError, "more than 1024", id="too large"),
        pytest.param("group_size=group_size,", "group_size=(16, 2, 16),", ValueError,
                     r"more than its max_total_threads_per_threadgroup\(256\)", id="larger than the kernel says"),
        pytest.param(', arg_casts={3: "int32"}', "", TypeError, "arrives as long", id="sizes that are not narrowed"),
        pytest.param("kernel(first, second, out, sizes,", "kernel(first, out, sizes,", TypeError,
                     "3 arguments for 4 buffers", id="too few arguments"),
        pytest.param("kernel(first, second,", "kernel(first, second.half(),", TypeError,
                     "argument 1 .*: got a torch.float16 tensor", id="another dtype"),
        pytest.param("threads=threads,", "threads=(threads[0] - 1, *threads[1:]),", AssertionError, "nothing wrote",
                     id="a thread too few"),
        pytest.param("out = empty(shape,", "out = empty(shape[:3] + (shape[3] - 1,),", KernelError, OUTSIDE,
                     id="a result too small"),
    ],
)  # fmt: skip
def test_bugs_in_the_launch(old: str, new: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        run(SOURCE, replaced(LAUNCHES, old, new), GENERAL, "carafe")


def test_unaligned_vectors() -> None:
    """The kernels load vectors, so the launch code must not hand them an input that begins in the middle of one."""
    careless = re.sub(r"return tensor\.clone\(\) if .*", "return tensor", LAUNCHES)
    assert careless != LAUNCHES

    def shifted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def ones(shape: tuple[int, ...]) -> Tensor:
            return make(int(torch.tensor(shape).prod()) + 1)[1:].view(shape)

        return ones

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "ones", shifted(torch.ones))
        run(SOURCE, LAUNCHES, DOUBLING, "carafe")
        with pytest.raises(KernelError, match="which is not aligned to 8 bytes"):
            run(SOURCE, careless, DOUBLING, "carafe")


DEFORM_CONV2D = (Path(deform_conv2d.__file__).parent / "deform_conv2d.metal").read_text(encoding="ascii")


def run_deform_conv2d(metal: str, case: DeformConv2d, patch: pytest.MonkeyPatch) -> None:
    """The kernels of deform_conv2d from this source, in float32, against the oracle."""
    for dtype in ("half", "bfloat"):
        metal = re.sub(rf"INSTANTIATE_ALL\({dtype}, \d\)\n", "", metal)
    library = emulator.compile_shader(metal)
    patch.setattr(deform_conv2d, "library", lambda name: library)
    for operator in ("deform_conv2d", "deform_conv2d_backward_data"):
        given = arguments(operator, case, torch.float32)
        expected = results(getattr(reference, operator)(*doubled(given)))
        found = results(emulator.launched(getattr(deform_conv2d, operator), *given))
        for result, wanted in zip(found, expected, strict=True):
            assert error(result, wanted) < 1e-5, "wrong result"


FOURS = DeformConv2d(2, 40, 5, 4, 3, offset_groups=2)
ONES = DeformConv2d(2, 6, 5, 4, 6, groups=3, offset_groups=2)


@pytest.mark.parametrize("case", [FOURS, ONES], ids=str)
def test_the_shipped_deform_conv2d_passes(case: DeformConv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    run_deform_conv2d(DEFORM_CONV2D, case, monkeypatch)


@pytest.mark.parametrize("case", [FOURS, ONES], ids=str)
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        pytest.param("s.row + 1 < z.height", "s.row < z.height", KernelError, OUTSIDE, id="a row below the map"),
        pytest.param("s.row >= 0", "s.row >= -1", KernelError, OUTSIDE, id="a row above the map"),
        pytest.param("y >= -1.0f && y < float(z.height) && ", "", KernelError, OUTSIDE, id="rows far outside"),
        pytest.param("s.column + 1 < z.width", "true", (KernelError, AssertionError), f"wrong result|{OUTSIDE}",
                     id="the next row for the right border"),
        pytest.param("if (lane != 0)", "if (lane > 1)", KernelError, "a data race", id="two lanes write a sample"),
        pytest.param("(d * z.positions + p) * taps", "p * taps", KernelError, "a data race", id="groups share samples"),
        pytest.param("distance > 0;", "distance > 1;", AssertionError, "wrong result", id="a shuffle too few"),
        pytest.param("if (s.inside) {", "if (!s.inside) {", (KernelError, AssertionError), "wrong result|nothing wrote",
                     id="the samples outside are linked"),
        pytest.param("atomic_exchange_explicit(&heads[cell], sample, memory_order_relaxed);",
                     "atomic_load_explicit(&heads[cell], memory_order_relaxed); "
                     "atomic_store_explicit(&heads[cell], sample, memory_order_relaxed);",
                     AssertionError, "wrong result", id="an exchange in two steps"),
        pytest.param("link.w", "-1", AssertionError, "wrong result", id="the first sample of a list only"),
        pytest.param("if (first + q * step < end) {", "{", KernelError, f"a data race|not aligned|{OUTSIDE}",
                     id="channels that are not there"),
        pytest.param("grid - n * z.offset_groups", "0", (KernelError, AssertionError),
                     f"a data race|wrong result|{OUTSIDE}", id="one offset group only"),
    ],
)  # fmt: skip
def test_bugs_in_deform_conv2d(
    old: str, new: str, case: DeformConv2d, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        run_deform_conv2d(replaced(DEFORM_CONV2D, old, new), case, monkeypatch)


CONNECTED_COMPONENTS = (Path(connected_components.__file__).parent / "connected_components.metal").read_text(
    encoding="ascii"
)
# A row, and a pixel above each of its words but the first: their threads all change the parent of the row's first run.
MEETING = torch.zeros(1, 1, 2, 512, dtype=torch.bool)
MEETING[..., 1, :] = MEETING[..., 0, 48::32] = True


def run_connected_components(metal: str, group_size: int, patch: pytest.MonkeyPatch) -> None:
    """The kernels of connected components from this source, in 60 orders of threads, against the oracle."""
    library = emulator.compile_shader(metal)
    patch.setattr(connected_components, "library", lambda name: library)
    patch.setattr(connected_components, "WORD_GROUP", (group_size, 1))
    expected = labelled.connected_components(MEETING, 8)
    for _ in range(60):
        found = emulator.launched(connected_components.connected_components, MEETING, 8)
        for result, wanted in zip(found, expected, strict=True):
            assert torch.equal(result, wanted), "wrong result"


within_and_across = pytest.mark.parametrize("group_size", [64, 1], ids=["within a group", "across groups"])


@within_and_across
def test_the_shipped_connected_components_pass(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_connected_components(CONNECTED_COMPONENTS, group_size, monkeypatch)


MINIMUM = "a = atomic_fetch_min_explicit(labels + (later - 1u), b, memory_order_relaxed);"


@within_and_across
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        pytest.param("if (a == later) {\n      return;\n    }", "return;", AssertionError, "wrong result",
                     id="no second try when another thread was first"),
        pytest.param(MINIMUM, "a = parent_of(labels, later); "
                     "atomic_store_explicit(labels + (later - 1u), b, memory_order_relaxed);",
                     AssertionError, "wrong result", id="a minimum in two steps"),
        pytest.param(MINIMUM, "a = later; *(device uint*)(labels + (later - 1u)) = b;", KernelError, "a data race",
                     id="a minimum by a plain write"),
        pytest.param("atomic_fetch_add_explicit(counts + (root - 1u), run.end - run.first, memory_order_relaxed);",
                     "atomic_store_explicit(counts + (root - 1u), run.end - run.first + atomic_load_explicit("
                     "counts + (root - 1u), memory_order_relaxed), memory_order_relaxed);",
                     AssertionError, "wrong result", id="a sum in two steps"),
    ],
)  # fmt: skip
def test_bugs_in_connected_components(
    old: str, new: str, group_size: int, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        run_connected_components(replaced(CONNECTED_COMPONENTS, old, new), group_size, monkeypatch)


def test_a_kernel_that_does_not_say_how_many_threads_a_group_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlimited(source: str) -> str:
        return replaced(re.sub(r"max_total_threads_per_threadgroup\(\d+\)", "", source), "[[kernel, ]]", "[[kernel]]")

    message = r"it has no \[\[max_total_threads_per_threadgroup\(n\)\]\]"
    with pytest.raises(ValueError, match=message):
        run(unlimited(SOURCE), LAUNCHES, GENERAL, "carafe")
    with pytest.raises(ValueError, match=message):
        run_deform_conv2d(unlimited(DEFORM_CONV2D), FOURS, monkeypatch)
    with pytest.raises(ValueError, match=message):
        run_connected_components(unlimited(CONNECTED_COMPONENTS), 64, monkeypatch)
