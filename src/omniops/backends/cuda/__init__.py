"""NVIDIA GPUs, in Triton."""

from importlib.util import find_spec

import torch

TITLE = "Triton"
DISPATCH_KEY = "CUDA"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AVAILABLE = find_spec("triton") is not None
REMEDY = "pip install triton"
