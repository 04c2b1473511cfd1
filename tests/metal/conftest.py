"""Skips the tests of this folder where the emulator does not run, and has launch code use it."""

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


@pytest.fixture
def emulated(monkeypatch):
    """Launch code finds the emulator's kernels."""
    monkeypatch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
    library.cache_clear()
    yield
    library.cache_clear()
