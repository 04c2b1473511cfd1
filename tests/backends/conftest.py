"""Teaches Triton's interpreter to multiply matrices of bfloat16: it takes them for the integers it keeps them in."""

import os
from importlib.util import find_spec

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products():
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_of_widened(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot_of_widened)
        yield
