"""Mistakes put into connected_components' kernels: the emulator, or a comparison with the oracle, has to catch them."""

from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from test_planted_bugs import replaced, the_same_orders_of_threads  # noqa: F401

from omniops.backends.mps import connected_components
from omniops.backends.reference import connected_components as labelled

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
