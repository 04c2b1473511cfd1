"""Mistakes put into the kernels of multi_scale_deform_attn: the emulator, or the oracle, has to catch them."""

from itertools import product
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import OPERATORS, TOLERANCES, MultiScaleDeformAttn, arguments, error, oracle, results
from test_planted_bugs import OUTSIDE, replaced

from omniops.backends.mps import _segments, multi_scale_deform_attn
from omniops.backends.mps._library import source
from omniops.backends.reference import multi_scale_deform_attn as reference

ATTENTION, SEGMENTS = source("multi_scale_deform_attn"), source("segments")


def run_attention(metal: str, case: MultiScaleDeformAttn, patch: pytest.MonkeyPatch, segments: str = SEGMENTS) -> None:
    """The kernels from these sources, in half precision beside float32 locations, against the oracle."""
    library, of_segments = emulator.compile_shader(f"#define SCALAR half\n{metal}"), emulator.compile_shader(segments)
    patch.setattr(multi_scale_deform_attn, "library", lambda name, dtype: library)
    patch.setattr(_segments, "library", lambda name: of_segments)
    forward, backward = OPERATORS[MultiScaleDeformAttn]
    # Some queries of one head at a time, and several heads.
    for discrete, (operator, samples) in product((False, True), ((forward, 0), (backward, 36), (backward, 170))):
        patch.setattr(multi_scale_deform_attn, "MAX_SAMPLES", samples)
        args = arguments(operator, case._replace(discrete=discrete), torch.float16)
        expected = oracle(reference, operator, args)
        found = results(emulator.launched(getattr(multi_scale_deform_attn, operator), *args))
        for result, wanted in zip(found, expected, strict=True):
            assert error(result, wanted) < TOLERANCES[result.dtype], "wrong result"


EIGHTS = MultiScaleDeformAttn(2, ((6, 9), (0, 3), (4, 4)), 13, 2, 40, (2, 1, 3), wide="locations")
ONES = MultiScaleDeformAttn(2, ((8, 9), (4, 4)), 13, 2, 3, (2, 4), wide="locations")


@pytest.mark.parametrize("case", [EIGHTS, ONES], ids=str)
def test_the_shipped_kernels_pass(case: MultiScaleDeformAttn, monkeypatch: pytest.MonkeyPatch) -> None:
    run_attention(ATTENTION, case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [EIGHTS, ONES], ids=str)
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        pytest.param("row + 1 < height", "row < height", (KernelError, AssertionError), f"wrong result|{OUTSIDE}",
                     id="a row below the level"),
        pytest.param("top = row >= 0", "top = true", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}", id="a row above the level"),
        pytest.param("right = column + 1 < width", "right = true", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}", id="the next row for the right border"),
        pytest.param("i > -1.0f && i < float(height) && ", "", (KernelError, AssertionError), f"wrong result|{OUTSIDE}",
                     id="rows far outside"),
        pytest.param("width, -0.5f)", "width, 0.0f)", AssertionError, "wrong result", id="no half pixel"),
        pytest.param("size, 0.5f)", "size, 0.0f)", AssertionError, "wrong result", id="the pixel below"),
        pytest.param(", size - 1);", ", size);", (KernelError, AssertionError), f"wrong result|{OUTSIDE}",
                     id="a nearest pixel beyond the level"),
        pytest.param("while (k >= levels[l].end_point)", "while (k > levels[l].end_point)",
                     (KernelError, AssertionError), f"wrong result|{OUTSIDE}|a data race",
                     id="a point of the level before"),
        pytest.param("min(first + lane, z.points - 1)", "first + lane", (KernelError, AssertionError),
                     f"{OUTSIDE}|wrong result", id="points that are not there"),
        pytest.param("exists ? around : 0", "around", KernelError, OUTSIDE, id="channels that are not there"),
        pytest.param("const bool exists = own < z.queries && c < z.channels;", "const bool exists = c < z.channels;",
                     KernelError, "a data race", id="queries that are not there"),
        pytest.param("const ushort source = ushort(base + i);", "const ushort source = ushort(i);", AssertionError,
                     "wrong result", id="the first query's samples for all"),
        pytest.param("own_sums = i == lane ?", "own_sums = i == 0 ?", AssertionError, "wrong result",
                     id="the sums of the first sample for all"),
        pytest.param("distance > 0;", "distance > 1;", AssertionError, "wrong result", id="a shuffle too few"),
        pytest.param("if (own < z.queries && first + lane < z.points) {", "if (own < z.queries) {",
                     (KernelError, AssertionError), "a data race|wrong result", id="points written twice"),
        pytest.param("s.factor * float(s.width) * by_x", "s.factor * by_x", AssertionError, "wrong result",
                     id="a derivative by pixels"),
        pytest.param("2 * index + 1, has_derivative", "2 * index, has_derivative", (KernelError, AssertionError),
                     "nothing wrote|wrong result", id="y written for x"),
        pytest.param("const int cell = s.inside ?", "const int cell = !s.inside ?", (KernelError, AssertionError),
                     f"wrong result|a data race|nothing wrote|{OUTSIDE}", id="the samples outside are counted"),
        pytest.param("atomic_fetch_add_explicit(&cells[2 * uint(cell)], 1, memory_order_relaxed);",
                     "atomic_store_explicit(&cells[2 * uint(cell)], "
                     "atomic_load_explicit(&cells[2 * uint(cell)], memory_order_relaxed) + 1, "
                     "memory_order_relaxed);",
                     (KernelError, AssertionError), f"wrong result|a data race|nothing wrote|{OUTSIDE}",
                     id="counted in two steps"),
        pytest.param("samples[other] < sample", "samples[other] <= sample", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}|a data race|nothing wrote", id="slots from one on"),
        pytest.param("if (int(grid) >= *used) {", "if (false) {", KernelError, f"nothing wrote|{OUTSIDE}",
                     id="samples that were not collected"),
        pytest.param("query = z.first_query + q;", "query = q;", AssertionError, "wrong result",
                     id="each part takes the first queries"),
        pytest.param("z.first_head + head, query)", "head, query)", AssertionError, "wrong result",
                     id="each part takes the first heads"),
        pytest.param("index.head * z.cells + s.cell : -1", "s.cell : -1", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}|nothing wrote|a data race", id="heads share cells"),
        pytest.param("k < cell.y; k +=", "k < cell.y - 1; k +=", AssertionError, "wrong result",
                     id="not the last samples of a cell"),
        pytest.param("if (!nearest) {\n#pragma", "if (false) {\n#pragma", AssertionError, "wrong result",
                     id="one pixel of four"),
        pytest.param("tile -= l > 0 ? levels[l - 1].end_tile : 0;", "", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}|nothing wrote|a data race", id="tiles of all levels"),
        pytest.param("if (z.adds != 0) {", "if (false) {", AssertionError, "wrong result",
                     id="the last part alone"),
        pytest.param("== 0) {\n      return;", "!= 0) {\n      return;", AssertionError, "wrong result",
                     id="nothing added where there is something"),
        pytest.param("to = first_channel(z, z.first_head + head, z.pixels, levels[l].pixel + ",
                     "to = first_channel(z, z.first_head + head, z.pixels, ", (KernelError, AssertionError),
                     "wrong result|nothing wrote|a data race", id="levels over each other"),
        pytest.param("threadgroup_barrier(mem_flags::mem_threadgroup);", "", KernelError, "a data race|nothing wrote",
                     id="no barriers"),
        pytest.param("float(from[index]);", "float(from[index + 1]);", (KernelError, AssertionError),
                     f"wrong result|{OUTSIDE}", id="the next weight"),
    ],
)  # fmt: skip
def test_bugs_in_multi_scale_deform_attn(
    old: str, new: str, case: MultiScaleDeformAttn, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        run_attention(replaced(ATTENTION, old, new), case, monkeypatch)


@pytest.mark.parametrize("case", [EIGHTS, ONES], ids=str)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("ushort(31)) + before", "ushort(31))", id="cells share segments"),
        pytest.param("cell < count ?", "true ?", id="cells that are not there"),
        pytest.param("if (cell >= 0) {", "if (true) {", id="samples without a cell"),
        pytest.param("uint(cell) + 1], 1, memory", "uint(cell) + 1], 0, memory", id="all in one slot"),
    ],
)
def test_bugs_in_segments(old: str, new: str, case: MultiScaleDeformAttn, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"a data race|wrong result|nothing wrote|{OUTSIDE}|atomically updates 4 bytes outside argument 1"
    with pytest.raises((KernelError, AssertionError), match=message):
        run_attention(ATTENTION, case, monkeypatch, replaced(SEGMENTS, old, new))
