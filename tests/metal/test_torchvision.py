"""torchvision.ops.deform_conv2d on Apple GPUs: the kernels that omniops.enable registers, in the emulator."""

from typing import Any

import emulator
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import omniops

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("emulated")


class AsOnMps(TorchDispatchMode):
    """Tensors of the CPU are served by the kernels of MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("torchvision", "omniops"):
            return func(*args, **kwargs or {})
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.MPS), *args)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_forward_and_backward(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 6), (2, 2 * 2 * 9, 5, 6), (6, 2, 3, 3), (6,), (2, 2 * 9, 5, 6)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes[: 5 if masked else 4]]
    grad = torch.randn(2, 6, 5, 6, generator=generator)

    def result_and_gradients() -> list[torch.Tensor]:
        input, offset, weight, bias, *mask = tensors
        result = torchvision.ops.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask[0] if mask else None)
        return [result, *torch.autograd.grad(result, tensors, grad)]

    expected = result_and_gradients()
    omniops.enable("torchvision", devices=("mps",))

    def on_mps() -> list[torch.Tensor]:
        with AsOnMps():
            return result_and_gradients()

    found = emulator.launched(on_mps)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert not torch.equal(found[0], expected[0])
