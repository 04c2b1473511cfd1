"""Mistakes put into connected_components' kernels: the emulator, or a comparison with the oracle, has to catch them."""

from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from test_planted_bugs import replaced

from omniops.backends.mps import connected_components
from omniops.backends.reference import connected_components as labelled

CONNECTED_COMPONENTS = (Path(connected_components.__file__).parent / "connected_components.metal").read_text(
    encoding="ascii"
)
# Two rows of a tile, and the two on either side of a border between tiles: the lower one is full, and the upper one has
# a pixel above each of its words but the first, so that many threads change the parent of its first run.
MEETING = torch.zeros(1, 1, 65, 256, dtype=torch.bool)
MEETING[..., (1, 64), :] = True
MEETING[..., 0, 48::32] = MEETING[..., 63, 48::32] = True


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


@pytest.mark.slow
@within_and_across
def test_the_shipped_connected_components_pass(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_connected_components(CONNECTED_COMPONENTS, group_size, monkeypatch)


MINIMUM = "parent = atomic_fetch_min_explicit(nodes + a, other, memory_order_relaxed);"


@within_and_across
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        pytest.param(MINIMUM, MINIMUM + " return;", AssertionError, "wrong result",
                     id="no second try when another thread was first"),
        pytest.param(MINIMUM, "parent = parent_of(nodes, a); "
                     "atomic_store_explicit(nodes + a, other, memory_order_relaxed);",
                     AssertionError, "wrong result", id="a minimum in two steps"),
        pytest.param("atomic_fetch_add_explicit(counts + root, pixels, memory_order_relaxed);",
                     "*(device uint*)(counts + root) += pixels;", KernelError, "a data race",
                     id="a sum by a plain write"),
        pytest.param("atomic_fetch_add_explicit(counts + root, pixels, memory_order_relaxed);",
                     "atomic_store_explicit(counts + root, pixels + parent_of(counts, root), memory_order_relaxed);",
                     AssertionError, "wrong result", id="a sum in two steps"),
        pytest.param("atomic_fetch_add_explicit(cells + last, length << 16, memory_order_relaxed);",
                     "atomic_store_explicit(cells + last, parent_of(cells, last) + (length << 16), "
                     "memory_order_relaxed);", AssertionError, "wrong result", id="a tile's sum in two steps"),
        pytest.param("threadgroup_barrier(mem_flags::mem_threadgroup);", "", KernelError, "a data race|nothing wrote",
                     id="no barriers"),
        pytest.param("if (subcomponents[r] == 0u || subcomponents[r] != label) {", "{", KernelError, "a data race",
                     id="labels that others read are written again"),
    ],
)  # fmt: skip
def test_bugs_in_connected_components(
    old: str, new: str, group_size: int, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        run_connected_components(replaced(CONNECTED_COMPONENTS, old, new), group_size, monkeypatch)
