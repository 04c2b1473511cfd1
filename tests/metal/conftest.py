"""Skips the tests of this folder where the emulator does not run."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if sys.platform == "linux":
        return
    reason = "the Metal emulator runs on Linux; on a Mac tests/backends runs the kernels on the Apple GPU"
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
