"""What the tests of kernels share.

Triton's interpreter is taught to multiply matrices of bfloat16: it takes them for the integers it keeps them in.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from triton_accesses import record_accesses


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


@pytest.fixture
def deterministic():
    """PyTorch's deterministic algorithms, which are afterwards as they were."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want its environment variable set before
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def set_num_threads():
    """Sets PyTorch's number of threads, which is afterwards as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def accesses(monkeypatch):
    """Where kernels read and write in Triton's interpreter."""
    return record_accesses(monkeypatch)
