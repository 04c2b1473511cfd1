"""NVIDIA GPUs, in Triton."""

from importlib.util import find_spec

import torch

TITLE = "Triton"
DISPATCH_KEY = "CUDA"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# AMD's GPUs go by the name of CUDA too: the reference kernels serve them.
AVAILABLE = find_spec("triton") is not None and torch.version.hip is None
REMEDY = "pip install triton (the kernels are for NVIDIA GPUs alone)"
