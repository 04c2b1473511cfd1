"""Set up before any test module is imported: threads, Triton's interpreter without a GPU, and hypothesis' settings."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process has a core: threads that wait for a core that another process holds wait long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when the kernels' modules are imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("omniops", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("omniops")
