"""Plain PyTorch: the oracle of the tests, and the kernel of every device without its own."""

import torch

TITLE = "reference (PyTorch)"
DISPATCH_KEY = "CompositeExplicitAutograd"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AVAILABLE = True
REMEDY = ""
