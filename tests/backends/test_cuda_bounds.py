"""Where CARAFE's Triton kernels read and write: within the tensors that they get and make, as its interpreter tells."""

from importlib.util import find_spec

import pytest
import torch
from triton_accesses import within

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter does not run"
)


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
    assert within(accesses.read, features, masks, grad)
    assert within(accesses.written, results, *gradients)
