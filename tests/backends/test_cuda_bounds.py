"""Where CARAFE's Triton kernels read and write: within the tensors that they get and make, as its interpreter tells."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter does not run"
)


def places(tensor):
    """The first byte of a tensor, and the one after its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def within(addresses, *tensors):
    inside = torch.zeros(addresses.shape, dtype=torch.bool)
    for tensor in tensors:
        first, end = places(tensor)
        inside |= (addresses >= first) & (addresses <= end - tensor.element_size())
    return bool(inside.all())


@pytest.fixture
def accesses(monkeypatch):
    """The addresses that are read and written."""
    from triton.runtime import interpreter

    own = interpreter._interpreter
    seen = SimpleNamespace(read=[], written=[])

    def taken(pointers, mask):
        return torch.from_numpy(pointers[mask.astype(bool)].astype("int64"))

    def load(pointers, mask, *others):
        seen.read.append(taken(pointers, mask))
        return own.load(pointers, mask, *others)

    def store(pointers, value, mask):
        seen.written.append(taken(pointers, mask))
        return own.store(pointers, value, mask)

    names = {name: getattr(own, name) for name in dir(own) if not name.startswith("__")}
    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**names | {"load": load, "store": store}))
    return seen


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize(("kernel_size", "scale_factor", "stride"), [(3, 2, 1), (1, 2, 1), (3, 3, 1), (3, 1, 2)])
def test_carafe_stays_within_its_tensors(accesses, size, kernel_size, scale_factor, stride):
    from omniops.backends.cuda import carafe as launches

    height, width = (length * stride for length in size)
    rows, columns = (length * scale_factor for length in size)
    features = torch.randn(1, 3, height, width)
    masks, grad = torch.randn(1, kernel_size**2, rows, columns), torch.randn(1, 3, rows, columns)
    numbers = kernel_size, 1, scale_factor, stride
    results = launches.carafe(features, masks, *numbers)
    gradients = launches.carafe_backward(grad, features, masks, height, width, *numbers)
    assert accesses.read
    assert accesses.written
    assert within(torch.cat(accesses.read), features, masks, grad)
    assert within(torch.cat(accesses.written), results, *gradients)
