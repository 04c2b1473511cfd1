"""What the tests of any operator's kernels share: the backends of this machine, tolerances, layouts and comparisons."""

from importlib import import_module
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from omniops.backends import cpu

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of a result, relative to its largest element."""


def backend_devices():
    """Each backend with the device that its kernels run on here: Triton's on the CPU where it interprets them."""
    yield pytest.param("reference", "cpu", id="reference")
    missing = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ module is not built")
    yield pytest.param("cpu", "cpu", id="cpu", marks=missing)
    missing = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
    if torch.cuda.is_available():
        yield pytest.param("cuda", "cuda", id="cuda", marks=missing)
    else:
        yield pytest.param("cuda", "cpu", id="cuda-interpreted", marks=missing)
    if torch.backends.mps.is_available():
        yield pytest.param("mps", "mps", id="mps")


BACKENDS = pytest.mark.parametrize(("backend", "device"), list(backend_devices()))


def backends_with(names, *cases, quick=1):
    """Every backend with each case, a value or a tuple of values for the names. Triton's interpreter, which is slow,
    takes those after the first ``quick`` by make test-all."""
    params = []
    for backend, (i, case) in product(backend_devices(), enumerate(cases)):
        values = case if isinstance(case, tuple) else (case,)
        slow = [pytest.mark.slow] if backend.id == "cuda-interpreted" and i >= quick else []
        name = "-".join(map(str, (backend.id, *values)))
        params.append(pytest.param(*backend.values, *values, id=name, marks=[*backend.marks, *slow]))
    return pytest.mark.parametrize(("backend", "device", *names.split()), params)


def interpreted(backend, device):
    """Whether Triton's interpreter runs the kernels, which takes a second for what a GPU does in no time."""
    return backend == "cuda" and device == "cpu"


def dtypes(backend):
    return import_module(f"omniops.backends.{backend}").DTYPES


def map_tensors(function, tensors):
    """A namespace of tensors, each put through the function; what is None stays so."""
    named = vars(tensors)
    return SimpleNamespace(**{name: None if value is None else function(value) for name, value in named.items()})


def assert_near(name, result, expected, tolerance):
    """Errors are relative to the scale of the result, which leaves out what is not finite: that must be the same."""
    assert result.shape == expected.shape, name
    expected = expected.cpu()
    result, finite = result.cpu().double(), expected.isfinite()
    torch.testing.assert_close(result[~finite], expected[~finite], equal_nan=True)
    result, expected = result[finite], expected[finite]
    if expected.numel() > 0:
        scale = max(expected.abs().max().item(), 1e-30)
        error = (result - expected).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.2e} of the result's scale"


def filled_like(tensor, *shape):
    """NaN, or ones where the dtype has none: what a kernel that reads beside a tensor would show in its results."""
    return tensor.new_full(shape, float("nan")) if tensor.is_floating_point() else tensor.new_ones(shape)


def sliced(tensor):
    """The same values, every other element of a larger tensor along the last axis, off by one in memory."""
    larger = filled_like(tensor, *tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
    larger[..., 1::2] = tensor
    return larger[..., 1::2]


def shifted(tensor, elements=1):
    """The same values, contiguous, so many elements into a larger storage, so that no vector is aligned."""
    larger = filled_like(tensor, tensor.numel() + 2 * elements)
    larger[elements:-elements] = tensor.flatten()
    return larger[elements:-elements].view(tensor.shape)


def transposed(tensor):
    """The same values, with the last two axes the other way round in memory."""
    return tensor.mT.contiguous().mT


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)
