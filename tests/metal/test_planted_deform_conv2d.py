"""Mistakes put into deform_conv2d's kernels: the emulator, or a comparison with the oracle, has to catch them."""

from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import DeformConv2d, arguments, error, oracle, results
from test_planted_bugs import OUTSIDE, replaced

from omniops.backends.mps import _segments, deform_conv2d
from omniops.backends.mps._library import source
from omniops.backends.reference import deform_conv2d as reference

DEFORM_CONV2D, SEGMENTS = source("deform_conv2d"), source("segments")


def run_deform_conv2d(metal: str, case: DeformConv2d, patch: pytest.MonkeyPatch, segments: str = SEGMENTS) -> None:
    """The kernels of deform_conv2d from these sources, in float32, against the oracle."""
    library, of_segments = emulator.compile_shader(metal), emulator.compile_shader(segments)
    patch.setattr(deform_conv2d, "library", lambda name, dtype: library)
    patch.setattr(_segments, "library", lambda name: of_segments)
    for operator in ("deform_conv2d", "deform_conv2d_backward"):
        args = arguments(operator, case, torch.float32)
        expected = oracle(reference, operator, args)
        found = results(emulator.launched(getattr(deform_conv2d, operator), *args))
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
        pytest.param("row + 1 < height", "row < height", KernelError, OUTSIDE, id="a row below the map"),
        pytest.param("row >= 0", "row >= -1", KernelError, OUTSIDE, id="a row above the map"),
        pytest.param("y >= -1.0f && y < float(z.height) && ", "", KernelError, OUTSIDE, id="rows far outside"),
        pytest.param("column + 1 < width", "true", (KernelError, AssertionError), f"wrong result|{OUTSIDE}",
                     id="the next row for the right border"),
        pytest.param("if (lane == 0 && i < count)", "if (lane < 2 && i < count)", KernelError, "a data race",
                     id="two lanes write a sample"),
        pytest.param("z.offset_groups + d) * (z.kernel_height", "z.offset_groups) * (z.kernel_height",
                     (KernelError, AssertionError), "a data race|wrong result", id="groups share offsets"),
        pytest.param("distance > 0;", "distance > 1;", AssertionError, "wrong result", id="a shuffle too few"),
        pytest.param("if (s.inside) {\n    atomic", "if (!s.inside) {\n    atomic", (KernelError, AssertionError),
                     f"wrong result|a data race|nothing wrote|{OUTSIDE}", id="the samples outside are counted"),
        pytest.param("atomic_fetch_add_explicit(&cells[2 * uint(s.cell(z))], 1, memory_order_relaxed);",
                     "atomic_store_explicit(&cells[2 * uint(s.cell(z))], "
                     "atomic_load_explicit(&cells[2 * uint(s.cell(z))], memory_order_relaxed) + 1, "
                     "memory_order_relaxed);",
                     (KernelError, AssertionError), f"wrong result|a data race|nothing wrote|{OUTSIDE}",
                     id="counted in two steps"),
        pytest.param("rows[other] < row", "rows[other] <= row", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}|a data race|nothing wrote", id="slots from one on"),
        pytest.param("k < cell.y; k +=", "k < cell.y - 1; k +=", AssertionError, "wrong result",
                     id="not the last samples of a cell"),
        pytest.param("c < z.offset_group_channels;", "true;", KernelError, f"a data race|not aligned|{OUTSIDE}",
                     id="channels that are not there"),
        pytest.param("grid - n * z.offset_groups", "0", (KernelError, AssertionError),
                     f"a data race|wrong result|{OUTSIDE}", id="one offset group only"),
        pytest.param("threadgroup_barrier(mem_flags::mem_threadgroup);", "", KernelError, "a data race|nothing wrote",
                     id="no barriers"),
    ],
)  # fmt: skip
def test_bugs_in_deform_conv2d(
    old: str, new: str, case: DeformConv2d, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        run_deform_conv2d(replaced(DEFORM_CONV2D, old, new), case, monkeypatch)


@pytest.mark.parametrize("case", [FOURS, ONES], ids=str)
def test_segments_that_cells_share(case: DeformConv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = replaced(SEGMENTS, "ushort(31)) + before", "ushort(31))")
    with pytest.raises((KernelError, AssertionError), match=r"a data race|wrong result|nothing wrote"):
        run_deform_conv2d(DEFORM_CONV2D, case, monkeypatch, bug)
