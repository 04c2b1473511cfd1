"""Set up before any test module is imported: threads, Ctrl-C, Triton's interpreter without a GPU, and hypothesis.

After each test, libraries that it enabled are disabled again.
"""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process has a core: threads that wait for a core that another process holds wait long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what it runs in the background; the commands that are tested would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when the kernels' modules are imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("omniops", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("omniops")

from omniops.dropin import LIBRARIES  # noqa: E402 (TRITON_INTERPRET comes first)


@pytest.fixture(autouse=True)
def _nothing_stays_enabled():
    before = [library for library in LIBRARIES.values() if library.enabled()]
    yield
    for library in LIBRARIES.values():
        if library not in before:
            library.disable()
