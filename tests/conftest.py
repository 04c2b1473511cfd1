"""Set up before any test module is imported: Triton's interpreter where there is no GPU, and hypothesis' settings."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when the kernels' modules are imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("omniops", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("omniops")
