"""What an installed wheel must do, without pytest: python tests/smoke.py"""

import torch

import omniops
import omniops.backends.reference.carafe
from omniops.backends import cpu

assert cpu.AVAILABLE, "the wheel holds no compiled module"
features = torch.randn(1, 8, 5, 6, requires_grad=True)
masks = torch.randn(1, 25, 10, 12, requires_grad=True)
result = omniops.carafe(features, masks.softmax(1), 5, 1, 2)
result.square().sum().backward()
expected = omniops.backends.reference.carafe.carafe(features.detach(), masks.detach().softmax(1), 5, 1, 2, 1)
torch.testing.assert_close(result.detach(), expected, rtol=1e-5, atol=1e-5)
assert features.grad.abs().max() > 0
assert masks.grad.abs().max() > 0
print(f"omniops works with torch {torch.__version__}")
