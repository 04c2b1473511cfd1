"""Skips the tests of this folder where the emulator does not run, and has launch code use it."""

import itertools
import sys
from pathlib import Path

import emulator
import pytest
import torch

from omniops.backends.mps._library import library

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if sys.platform == "linux":
        return
    reason = "the Metal emulator runs on Linux; on a Mac tests/backends runs the kernels on the Apple GPU"
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def same_orders_of_threads(monkeypatch):
    """In every test, whichever ran before it: what shows in some orders only is found each time or never."""
    monkeypatch.setattr(emulator, "_seeds", itertools.count(emulator.FIRST_SEED))


@pytest.fixture(scope="module")
def emulated():
    """Launch code finds the emulator's kernels, in the tests that follow in the file, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
        library.cache_clear()
        yield
    library.cache_clear()
