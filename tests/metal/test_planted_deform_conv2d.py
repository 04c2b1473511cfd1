"""Mistakes put into deform_conv2d's kernels: the emulator, or a comparison with the oracle, has to catch them."""

import re
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import DeformConv2d, arguments, doubled, error, results
from test_planted_bugs import OUTSIDE, replaced, the_same_orders_of_threads  # noqa: F401

from omniops.backends.mps import deform_conv2d
from omniops.backends.reference import deform_conv2d as reference

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
