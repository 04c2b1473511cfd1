"""Set up before any test module is imported: threads, Ctrl-C, Triton's interpreter without a GPU, and hypothesis."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process has a core: threads that wait for a core that another process holds wait long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what it runs in the background; the commands that are tested would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when the kernels' modules are imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("omniops", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("omniops")
