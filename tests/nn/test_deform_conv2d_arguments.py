"""Arguments as ``torch.nn.Conv2d`` takes them: paddings by name, and integers of every kind."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import omniops


@pytest.mark.parametrize("kernel_size", [1, 2, 3, (4, 3), (3, 2), (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_named_paddings_are_those_of_conv2d(kernel_size, dilation):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    arguments = {"kernel_size": kernel_size, "dilation": dilation, "groups": 2, "bias": True}
    for padding in ("same", "valid"):
        try:
            plain = torch.nn.Conv2d(4, 6, padding=padding, **arguments).double()
            expected = plain(x)
        except RuntimeError:
            continue  # a kernel larger than the map
        for make, half in (
            (omniops.DeformConv2d, False),
            (omniops.DeformConv2dPack, False),
            (omniops.ModulatedDeformConv2d, True),
            (omniops.ModulatedDeformConv2dPack, True),
        ):
            module = make(4, 6, padding=padding, **arguments).double()
            assert module.padding == padding
            assert f"padding={padding}" in repr(module)
            module.load_state_dict({**module.state_dict(), **plain.state_dict()})
            taps = math.prod(module.kernel_size)
            offsets = (torch.zeros(2, 2 * taps, *expected.shape[2:]).double(),) if make is omniops.DeformConv2d else ()
            bias = plain.bias[:, None, None]
            torch.testing.assert_close(module(x, *offsets), (expected - bias) * 0.5 + bias if half else expected)
    # Moved taps and their gradients: the same convolution of a map with the zeros put around it.
    module = omniops.DeformConv2d(4, 6, padding="same", **arguments).double()
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    taps = math.prod(module.kernel_size)
    leaves = [
        value.requires_grad_()
        for value in (x, torch.randn(2, 4 * taps, 9, 8).double() * 4, torch.rand(2, 2 * taps, 9, 8).double())
    ]
    around = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    expected = omniops.deform_conv2d(around, leaves[1], module.weight, module.bias, 1, 0, dilation, leaves[2])
    result = module(*leaves)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    for found, right in zip(
        torch.autograd.grad(result, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("kernel_size", [3, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_named_padding_compiles_and_keeps_channels_last(kernel_size):
    x = torch.randn(1, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    for make in (omniops.DeformConv2dPack, omniops.ModulatedDeformConv2d):
        module = make(4, 6, kernel_size, padding="same").to(memory_format=torch.channels_last)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        result = module(x)
        assert result.shape == (1, 6, 6, 5)
        assert result.is_contiguous(memory_format=torch.channels_last)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, result, rtol=1e-5, atol=1e-5)
        assert module(x[:0]).shape == (0, 6, 6, 5)


def test_numpy_and_other_integers():
    """What has ``__index__``, as for ``torch.nn.Conv2d``; attributes are ints, and the parameters as usual."""
    one, two, three = np.int64(1), np.uint8(2), torch.tensor(3)
    for make in (omniops.DeformConv2d, omniops.DeformConv2dPack, omniops.ModulatedDeformConv2d):
        module = make(np.int32(4), np.array(8), (three, two), one, np.int16(1), (one, two), groups=two, bias=np.True_)
        usual = make(4, 8, (3, 2), 1, 1, (1, 2), groups=2, bias=True)
        for name, value in usual.state_dict().items():
            assert module.state_dict()[name].shape == value.shape
        assert repr(module) == repr(usual)
        for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation"):
            value = getattr(module, name)
            assert value == getattr(usual, name)
            assert {type(number) for number in (value if isinstance(value, tuple) else (value,))} == {int}
        if make is not omniops.DeformConv2d:
            assert type(make(4, 8, 3, offset_groups=two).offset_groups) is int
            result = torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(1, 4, 5, 6))
            assert result.shape == usual(torch.randn(1, 4, 5, 6)).shape
    for wrong in (
        np.float64(3),
        np.bool_(True),
        torch.tensor(3.0),
        torch.tensor(True),
        torch.tensor([3]),
        np.array([3]),
    ):
        with pytest.raises(TypeError, match=r"^in_channels must be an int, got "):
            omniops.DeformConv2d(wrong, 3, 1)
        with pytest.raises(TypeError, match=r"^padding must be an int or two, got "):
            omniops.DeformConv2d(3, 3, 1, padding=wrong)
