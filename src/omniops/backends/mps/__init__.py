"""Apple GPUs, in Metal: the *.metal sources, compiled when first used, and the Python that launches them."""

import torch

TITLE = "Metal"
DISPATCH_KEY = "MPS"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AVAILABLE = hasattr(torch.mps, "compile_shader")
REMEDY = "install torch 2.7 or newer"
