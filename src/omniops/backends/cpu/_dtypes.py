"""The dtypes of the C++ kernels, as the compiled module names them."""

import torch

from omniops import _C

DTYPES = {
    torch.float64: _C.Dtype.float64,
    torch.float32: _C.Dtype.float32,
    torch.float16: _C.Dtype.float16,
    torch.bfloat16: _C.Dtype.bfloat16,
}
