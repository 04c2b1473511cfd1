import numpy as np
import pytest
import torch
import torch.nn.functional as F

import omniops


def test_carafe_is_the_function():
    module = omniops.CARAFE(3, 2, 2)
    features, masks = torch.randn(1, 4, 3, 5), torch.randn(1, 18, 6, 10)
    assert torch.equal(module(features, masks), omniops.carafe(features, masks, 3, 2, 2))
    assert "kernel_size=3, group_size=2, scale_factor=2" in repr(module)


def test_pack_has_the_parameters_of_mmcv():
    pack = omniops.CARAFEPack(
        channels=16, scale_factor=2, up_kernel=5, up_group=1, encoder_kernel=3, compressed_channels=8
    )
    state = {
        "channel_compressor.weight": torch.randn(8, 16, 1, 1),
        "channel_compressor.bias": torch.randn(8),
        "content_encoder.weight": torch.randn(100, 8, 3, 3),
        "content_encoder.bias": torch.randn(100),
    }
    pack.load_state_dict(state, strict=True)
    assert set(pack.state_dict()) == set(state)


def test_pack_is_the_formula_of_the_paper():
    """compress, encode, pixel shuffle, softmax over the kernel, reassemble; as mmcv writes it out, with unfold."""
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(
        6, 2, up_kernel=3, up_group=2, encoder_kernel=5, encoder_dilation=2, compressed_channels=4
    )
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 6, 5, 4)
    encoded = F.conv2d(
        F.conv2d(x, pack.channel_compressor.weight, pack.channel_compressor.bias),
        pack.content_encoder.weight, pack.content_encoder.bias, padding=4, dilation=2,
    )  # fmt: skip
    masks = F.pixel_shuffle(encoded, 2).view(2, 2, 9, 10, 8).softmax(2)
    patches = F.unfold(x, 3, padding=1).view(2, 2, 3, 9, 5, 4)
    patches = patches.repeat_interleave(2, 4).repeat_interleave(2, 5)
    expected = torch.einsum("ngckyx,ngkyx->ngcyx", patches, masks).flatten(1, 2)
    torch.testing.assert_close(pack(x), expected, rtol=1e-5, atol=1e-5)


def test_pack_is_initialised_as_mmcv_does():
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(256, 2)
    assert pack.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
    bound = (6 / (256 + 64)) ** 0.5
    assert bound * 0.95 < pack.channel_compressor.weight.abs().max().item() <= bound
    assert not pack.channel_compressor.bias.any()
    assert not pack.content_encoder.bias.any()


def test_pack_takes_the_other_names_by_keyword():
    pack = omniops.CARAFEPack(channels=8, kernel_size=3, group_size=2, scale_factor=2)
    assert (pack.up_kernel, pack.up_group) == (3, 2)
    assert pack(torch.randn(1, 8, 4, 4)).shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"up_kernel": 4}, ValueError, "up_kernel must be odd, got 4"),
        ({"up_kernel": -1}, ValueError, "up_kernel must be at least 1, got -1"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd, got 2"),
        ({"encoder_kernel": 2}, ValueError, "encoder_kernel must be odd, got 2"),
        ({"encoder_dilation": 0}, ValueError, "encoder_dilation must be at least 1, got 0"),
        ({"up_group": 3}, ValueError, "up_group must divide the 8 channels, got 3"),
        ({"up_group": 0}, ValueError, "up_group must be at least 1, got 0"),
        ({"group_size": 3}, ValueError, "group_size must divide the 8 channels, got 3"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"compressed_channels": 0}, ValueError, "compressed_channels must be at least 1, got 0"),
        ({"channels": "8"}, TypeError, "channels must be an int, got str"),
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"scale_factor": 0}, ValueError, "scale_factor must be at least 1, got 0"),
        ({"scale_factor": -2}, ValueError, "scale_factor must be at least 1, got -2"),
        ({"scale_factor": 2.5}, ValueError, "scale_factor must be a whole number, got 2.5"),
        ({"scale_factor": np.float32(1.5)}, ValueError, "scale_factor must be a whole number, got 1.5"),
        ({"scale_factor": float("nan")}, ValueError, "scale_factor must be a whole number, got nan"),
        ({"scale_factor": float("inf")}, ValueError, "scale_factor must be a whole number, got inf"),
        ({"scale_factor": 0.0}, ValueError, "scale_factor must be at least 1, got 0"),
        ({"scale_factor": (2, 2)}, TypeError, "scale_factor must be an int, got tuple"),
        ({"channels": 8.0}, TypeError, "channels must be an int, got float"),
    ],
)
def test_pack_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        omniops.CARAFEPack(**{"channels": 8, "scale_factor": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, "x", None), TypeError, "group_size must be an int, got str"),
        ((4, 1, 2), ValueError, "kernel_size must be odd, got 4"),
        ((2, 1, 2), ValueError, "kernel_size must be odd, got 2"),
        ((0, 1, 2), ValueError, "kernel_size must be at least 1, got 0"),
        ((3, 1, None), TypeError, "scale_factor must be an int, got NoneType"),
        ((3, True, 2), TypeError, "group_size must be an int, got bool"),
    ],
)
def test_carafe_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        omniops.CARAFE(*arguments)


def test_pack_refuses_what_it_cannot_take():
    pack = omniops.CARAFEPack(8, 2)
    with pytest.raises(ValueError, match=r"^x must have 4 dimensions \(N, C, H, W\), got shape \(8, 4, 4\)$"):
        pack(torch.zeros(8, 4, 4))
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor, got list$"):
        pack([1])


def test_pack_keeps_masks_channels_last():
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(8, 2, up_kernel=3, up_group=2, compressed_channels=4)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 8, 5, 6)
    masks = []
    pack.feature_reassemble = lambda x, mask: masks.append(mask) or x
    pack(x)
    pack.to(memory_format=torch.channels_last)
    pack(x.contiguous(memory_format=torch.channels_last))
    usual, channels_last = masks
    assert usual.is_contiguous()
    assert channels_last.shape == usual.shape == (2, 18, 10, 12)
    assert channels_last.stride() == (18 * 10 * 12, 1, 18 * 12, 18)
    torch.testing.assert_close(channels_last, usual, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(usual.unflatten(1, (2, 9)).sum(2), torch.ones(2, 2, 10, 12))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_packs_masks_stay_in_the_dtype_of_autocast(memory_format, monkeypatch):
    softmax = F.softmax

    def as_autocast_has_it_on_gpus(x, dim, dtype=torch.float32):
        return softmax(x, dim, dtype=dtype)

    monkeypatch.setattr(F, "softmax", as_autocast_has_it_on_gpus)
    pack = omniops.CARAFEPack(8, 2, up_kernel=3, compressed_channels=4).to(memory_format=memory_format)
    dtypes = []
    pack.feature_reassemble = lambda x, mask: dtypes.append(mask.dtype) or x
    with torch.autocast("cpu", torch.bfloat16):
        pack(torch.randn(1, 8, 5, 6).contiguous(memory_format=memory_format))
    assert dtypes == [torch.bfloat16]


def test_pack_learns():
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(4, 2, compressed_channels=8)
    x, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 12, 12)
    optimizer = torch.optim.Adam(pack.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(pack(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_under_autocast_and_compile(dtype):
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(8, 2, compressed_channels=4)
    x = torch.randn(1, 8, 6, 5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = pack(x)
        torch.testing.assert_close(torch.compile(pack, fullgraph=True)(x), expected, rtol=2e-2, atol=1e-2)
    assert expected.dtype == dtype


def test_pack_learns_nothing_from_an_empty_batch():
    pack = omniops.CARAFEPack(4, 2)
    x = torch.zeros(0, 4, 5, 6, requires_grad=True)
    result = pack(x)
    assert result.shape == (0, 4, 10, 12)
    result.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not parameter.grad.any() for parameter in pack.parameters())


@pytest.mark.parametrize("factor", [2.0, np.float32(2), np.float64(2)])
def test_packs_take_a_whole_float_for_a_factor(factor):
    """As ``nn.Upsample`` does, whose factors are floats."""
    pack = omniops.CARAFEPack(4, factor)
    assert type(pack.scale_factor) is int
    assert pack(torch.randn(1, 4, 3, 5)).shape == (1, 4, 6, 10)
    downsample = omniops.CARAFEDownsamplePack(4, factor)
    assert type(downsample.stride) is int
    assert downsample(torch.randn(1, 4, 3, 5)).shape == (1, 4, 2, 3)


def test_downsample_pack_is_the_formula_of_the_paper():
    """compress, encode with the stride of the downsampling, softmax over the kernel, reassemble; here with unfold."""
    torch.manual_seed(0)
    pack = omniops.CARAFEDownsamplePack(
        6, 3, kernel_size=3, group_size=2, encoder_kernel=5, encoder_dilation=2, compressed_channels=4
    )
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 6, 7, 9)
    encoded = F.conv2d(
        F.conv2d(x, pack.channel_compressor.weight, pack.channel_compressor.bias),
        pack.content_encoder.weight, pack.content_encoder.bias, stride=3, padding=4, dilation=2,
    )  # fmt: skip
    masks = encoded.view(2, 2, 9, 3, 3).softmax(2)
    patches = F.unfold(x, 3, padding=1, stride=3).view(2, 2, 3, 9, 3, 3)
    expected = torch.einsum("ngckyx,ngkyx->ngcyx", patches, masks).flatten(1, 2)
    torch.testing.assert_close(pack(x), expected, rtol=1e-5, atol=1e-5)


def test_downsample_pack_begins_as_the_mean_of_each_kernel():
    torch.manual_seed(0)
    pack = omniops.CARAFEDownsamplePack(8, 2)
    assert {name: tuple(value.shape) for name, value in pack.state_dict().items()} == {
        "channel_compressor.weight": (64, 8, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (25, 64, 3, 3),
        "content_encoder.bias": (25,),
    }
    assert pack.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not pack.content_encoder.bias.any()
    x = torch.randn(1, 8, 12, 11)
    torch.testing.assert_close(pack(x), F.avg_pool2d(x, 5, 2, 2), rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
def test_downsample_pack_learns_and_compiles(size):
    torch.manual_seed(0)
    pack, x = omniops.CARAFEDownsamplePack(4, 2, group_size=2, compressed_channels=8), torch.randn(2, 4, *size)
    result = pack(x)
    assert result.shape == (2, 4, (size[0] + 1) // 2, (size[1] + 1) // 2)
    result.square().sum().backward()
    assert pack.channel_compressor.weight.grad.any()
    torch.testing.assert_close(torch.compile(pack, fullgraph=True)(x), result, rtol=1e-4, atol=1e-5)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pack.to(memory_format=torch.channels_last)(x), result, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert pack(x).dtype == torch.bfloat16


def test_downsample_pack_takes_an_empty_batch():
    pack = omniops.CARAFEDownsamplePack(4, 2)
    result = pack(torch.zeros(0, 4, 5, 6))
    assert result.shape == (0, 4, 3, 3)
    result.sum().backward()
    assert not pack.content_encoder.weight.grad.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"stride": 1.5}, ValueError, "stride must be a whole number, got 1.5"),
        ({"stride": "2"}, TypeError, "stride must be an int, got str"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd, got 4"),
        ({"group_size": 3}, ValueError, "group_size must divide the 8 channels, got 3"),
        ({"encoder_kernel": 2}, ValueError, "encoder_kernel must be odd, got 2"),
        ({"encoder_dilation": 0}, ValueError, "encoder_dilation must be at least 1, got 0"),
        ({"compressed_channels": 4.0}, TypeError, "compressed_channels must be an int, got float"),
    ],
)
def test_downsample_pack_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        omniops.CARAFEDownsamplePack(**{"channels": 8, "stride": 2, **arguments})
    with pytest.raises(ValueError, match=r"^x must have 4 dimensions \(N, C, H, W\), got shape \(8, 4, 4\)$"):
        omniops.CARAFEDownsamplePack(8, 2)(torch.zeros(8, 4, 4))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_sizes_may_be_numpys_integers(kind):
    """What has ``__index__``, as for ``torch.nn.Conv2d``; attributes are ints."""
    for name, numbers in (
        ("CARAFE", (3, 1, 2)),
        ("CARAFEPack", (4, 2, 3, 2, 3, 1, 8)),
        ("CARAFEDownsamplePack", (4, 2, 3, 2, 3, 1, 8)),
    ):
        module, usual = (getattr(omniops, name)(*map(of, numbers)) for of in (kind, int))
        assert repr(module) == repr(usual)
        for attribute, value in vars(usual).items():
            if not attribute.startswith("_") and attribute != "training":
                assert getattr(module, attribute) == value
                assert type(getattr(module, attribute)) is int
        if name != "CARAFE":
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            assert compiled(torch.randn(1, 4, 5, 5)).shape == usual(torch.randn(1, 4, 5, 5)).shape
    pack = omniops.CARAFEPack(4, 2, kernel_size=kind(3), group_size=kind(2))
    assert (type(pack.up_kernel), type(pack.up_group)) == (int, int)
