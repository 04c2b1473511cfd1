"""Mistakes put into CARAFE's kernels and launch code: the emulator, or the comparison with the oracle, catches them."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import emulator
import pytest
import torch
from emulator import CompileError, KernelError
from test_planted_bugs import OUTSIDE, replaced
from torch import Tensor

from omniops.backends.mps import carafe as shipped

SOURCES = {
    name: (Path(shipped.__file__).parent / f"{name}.metal").read_text(encoding="ascii")
    for name in ("carafe", "carafe_doubling")
}
LAUNCHES = inspect.getsource(shipped)

# N, C, H, W, kernel_size, group_size, scale_factor, stride. 11 channels: a block of eight and one that overlaps it.
GENERAL = (1, 11, 5, 5, 3, 1, 3, 2)
FEW_CHANNELS = (2, 3, 5, 5, 3, 1, 3, 2)
DOUBLING = (1, 11, 5, 6, 5, 1, 2, 1)


def run(metal: dict[str, str], python: str, case: tuple[int, ...], operator: str) -> Tensor:
    """The operator with these sources instead of the shipped ones, in float32."""
    module: Any = ModuleType("planted")
    exec(compile(python, "planted.py", "exec"), module.__dict__)
    module.library = lambda name, dtype: emulator.compile_shader(metal[name])
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
    run(SOURCES, LAUNCHES, case, operator)


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
        pytest.param("device const T* from", "constant T* from", DOUBLING, "carafe", CompileError,
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
    name = "carafe_doubling" if case == DOUBLING else "carafe"
    with pytest.raises(error, match=message):
        run({name: replaced(SOURCES[name], old, new)}, LAUNCHES, case, operator)


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
        run(SOURCES, replaced(LAUNCHES, old, new), GENERAL, "carafe")


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
        run(SOURCES, LAUNCHES, DOUBLING, "carafe")
        with pytest.raises(KernelError, match=r"which is not aligned to (8|16) bytes"):
            run(SOURCES, careless, DOUBLING, "carafe")
