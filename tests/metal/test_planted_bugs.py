"""Mistakes put into the shipped sources, each of which has to be caught: what these tests share, and one for all.

Each operator's are in a file of its own.
"""

import re
from pathlib import Path

import emulator
import pytest
from metalsim import parser
from metalsim.preprocess import preprocess

from omniops.backends import mps
from omniops.backends.mps._library import source

SOURCES = sorted(Path(mps.__file__).parent.glob("*.metal"))

OUTSIDE = r"line \d+: thread \(\d+, \d+, \d+\) of the grid (reads|writes) \d+ bytes outside argument \d"


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"the shipped source no longer has {old!r}: plant the bug elsewhere"
    return text.replace(old, new)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_says_how_many_threads_a_group_has(path: Path) -> None:
    text = "#define SCALAR float\n" + source(path.stem)
    assert all(kernel.max_threads for kernel in parser.parse(preprocess(text)).kernels)
    silent = re.sub(r", max_total_threads_per_threadgroup\([^()]*\)", "", text)
    library = emulator.compile_shader(silent)
    for name in dir(library):
        with pytest.raises(ValueError, match=rf"kernel {name}: it has no \[\[max_total_threads_per_threadgroup"):
            getattr(library, name)(threads=1, group_size=1)
