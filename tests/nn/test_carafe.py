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
    ("arguments", "message"),
    [
        ({"up_kernel": 4}, "up_kernel must be odd, got 4"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"encoder_kernel": 2}, "encoder_kernel must be odd, got 2"),
        ({"up_group": 3}, "up_group must divide the 8 channels, got 3"),
    ],
)
def test_pack_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        omniops.CARAFEPack(8, 2, **arguments)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_under_autocast_and_compile(dtype):
    torch.manual_seed(0)
    pack = omniops.CARAFEPack(8, 2, compressed_channels=4)
    x = torch.randn(1, 8, 6, 5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = pack(x)
        torch.testing.assert_close(torch.compile(pack, fullgraph=True)(x), expected, rtol=2e-2, atol=1e-2)
    assert expected.dtype == dtype
