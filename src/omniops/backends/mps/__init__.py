"""Apple GPUs, in Metal: the *.metal sources, compiled when first used, and the Python that launches them."""

import platform

import torch

TITLE = "Metal"
DISPATCH_KEY = "MPS"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bfloat came with Metal 3.1, and that with macOS 14. Elsewhere there is no macOS whose version could be too old.
_MACOS = platform.mac_ver()[0]
AVAILABLE = hasattr(torch.mps, "compile_shader") and (not _MACOS or int(_MACOS.partition(".")[0]) >= 14)
REMEDY = "macOS 14 and torch 2.7, or newer, are needed"
