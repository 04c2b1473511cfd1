"""CPUs, in C++: calls the compiled module ``omniops._C``."""

from importlib.util import find_spec

import torch

TITLE = "C++"
DISPATCH_KEY = "CPU"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AVAILABLE = find_spec("omniops._C") is not None
REMEDY = "install a C++17 compiler and Python's headers, then reinstall omniops"
