import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniops import CARAFEPack
from omniops.nn import replace_upsampling


class UNet(nn.Module):
    """Of the layers' names and the sizes of a usual one; ``up`` upsamples what no nn.Sequential knows of."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 2, 1)]
        )
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.deconv = nn.ConvTranspose2d(12, 8, 2, 2)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        fine = self.down[0](x)
        middle = self.down[1](fine)
        coarse = self.down[2](middle)
        return self.head(fine + self.deconv(self.norm(middle + self.up(coarse))))


def super_resolution():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Conv2d(6, 24, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(),
        nn.Sequential(nn.Conv2d(6, 36, 5, padding="same", padding_mode="reflect", bias=False), nn.PixelShuffle(3)),
    )  # fmt: skip


def test_a_unet():
    torch.manual_seed(0)
    model, x = UNet(), torch.randn(2, 3, 12, 8)
    shape, state = model(x).shape, copy.deepcopy(model.state_dict())
    report = replace_upsampling(model, x)
    assert model(x).shape == shape
    assert isinstance(model.up, CARAFEPack)
    assert (model.up.channels, model.up.scale_factor, model.up.compressed_channels) == (12, 2, 12)
    assert [type(layer) for layer in model.deconv] == [nn.Conv2d, CARAFEPack]
    assert report.left == []
    assert str(report).splitlines() == [
        "changed up: Upsample(scale_factor=2.0, mode='bilinear') -> CARAFEPack(channels=12, scale_factor=2)",
        "changed deconv: ConvTranspose2d(12, 8, kernel_size=(2, 2), stride=(2, 2)) -> "
        "Conv2d(12, 8, kernel_size=(1, 1), stride=(1, 1)) + CARAFEPack(channels=8, scale_factor=2)",
    ]
    for name, tensor in model.state_dict().items():
        if not name.startswith(("up.", "deconv.")):
            assert torch.equal(tensor, state[name]) or name.startswith("norm.")


def test_of_an_upsample_the_channels_are_those_beside_it():
    def channels(*layers):
        model = nn.Sequential(*layers)
        replace_upsampling(model)
        return [layer.channels for layer in model if isinstance(layer, CARAFEPack)]

    up, double = nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=(3, 3))
    assert channels(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), up) == [8]
    assert channels(nn.Conv2d(3, 8, 1), nn.SiLU(), double, nn.Conv2d(8, 1, 1)) == [8]
    assert channels(nn.Flatten(), up, nn.ReLU(), nn.Conv2d(5, 1, 1)) == [5]
    assert channels(up, double, nn.ConvTranspose2d(7, 1, 3)) == [7, 7]
    assert channels(nn.LazyConv2d(6, 1), up) == [6]
    assert channels(up, nn.LazyConv2d(6, 1)) == []
    assert channels(nn.Flatten(), up, nn.Flatten()) == []
    twice = nn.Conv2d(9, 9, 1)
    assert channels(twice, nn.Flatten(), up, twice, nn.Conv2d(5, 1, 1)) == [9]
    assert not replace_upsampling(nn.ModuleList([nn.Conv2d(3, 8, 1), up])).changed


def test_transposed_convolutions():
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "same": nn.ConvTranspose2d(6, 6, 3, 3), "fewer": nn.ConvTranspose2d(6, 2, (2, 2), 2, bias=False)
    })  # fmt: skip
    fewer = model["fewer"].weight
    replace_upsampling(model, up_kernel=3, compressed_channels=4)
    same, (conv, pack) = model["same"], model["fewer"]
    assert (same.channels, same.scale_factor, same.up_kernel, same.compressed_channels) == (6, 3, 3, 4)
    assert (pack.channels, pack.scale_factor, pack.up_kernel, pack.compressed_channels) == (2, 2, 3, 2)
    assert conv.bias is None
    # The mean of each block of results is what the mean of the kernels gives.
    x = torch.randn(1, 6, 4, 5)
    torch.testing.assert_close(conv(x), F.avg_pool2d(F.conv_transpose2d(x, fewer, stride=2), 2))


def test_pixel_shuffle():
    torch.manual_seed(0)
    model, x = super_resolution(), torch.randn(1, 3, 5, 7)
    old = copy.deepcopy(model)
    report = replace_upsampling(model)
    assert [change.name for change in report.changed] == ["2", "4.1"]
    assert report.changed[0].old == (
        "Conv2d(6, 24, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) + PixelShuffle(upscale_factor=2)"
    )
    assert model(x).shape == old(x).shape == (1, 4, 30, 42)
    assert (model[2].channels, model[4][1].channels, model[4][1].scale_factor) == (6, 4, 3)
    for new, block, factor in ((model[1], old[1:3], 2), (model[4][0], old[4], 3)):
        x = torch.randn(1, 6, 4, 5)
        torch.testing.assert_close(new(x), F.avg_pool2d(block(x), factor), rtol=1e-5, atol=1e-5)


class Left(nn.Module):
    """One of each that is left."""

    def __init__(self):
        super().__init__()
        self.sized = nn.Upsample(size=(8, 8))
        self.unequal = nn.Upsample(scale_factor=(2, 3))
        self.broken = nn.Upsample(scale_factor=1.5)
        self.one = nn.UpsamplingNearest2d(scale_factor=1)
        self.trilinear = nn.Upsample(scale_factor=2, mode="trilinear")
        self.flat = nn.Upsample(scale_factor=2)
        self.integers = nn.Upsample(scale_factor=2)
        self.unseen = nn.Upsample(scale_factor=2)
        self.shared = nn.ConvTranspose2d(3, 3, 2, 2)
        self.also = nn.ModuleList([self.shared])
        self.unlike = nn.ConvTranspose2d(3, 3, 4, 2, 1)
        self.rectangular = nn.ConvTranspose2d(3, 3, (2, 1), (2, 1))
        self.padded = nn.ConvTranspose2d(3, 3, 2, 2, output_padding=1)
        self.grouped = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
        self.dilated = nn.ConvTranspose2d(4, 4, 2, 2, dilation=2)
        self.one_dimensional = nn.ConvTranspose1d(3, 3, 2, 2)
        self.told_its_size = nn.ConvTranspose2d(3, 3, 2, 2)
        self.lazy = nn.LazyConvTranspose2d(3, 2, 2)
        self.shuffle = nn.PixelShuffle(2)
        self.grouped_shuffle = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.PixelShuffle(2))
        self.indivisible = nn.Sequential(nn.Conv2d(3, 6, 1), nn.PixelShuffle(2))
        self.too_few = nn.Sequential(nn.Conv2d(3, 3, 1), nn.PixelShuffle(2))
        self.infinite = nn.Upsample(scale_factor=float("inf"))
        self.without = nn.Upsample(scale_factor=())
        self.told_by_name = nn.ConvTranspose2d(3, 3, 2, 2)
        self.own = OwnForward(3, 3, 2, 2)
        self.kept = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, x):
        F.interpolate(x, size=(9, 9))
        F.interpolate(input=x, scale_factor=2)
        F.interpolate(x, size=(2, 2))
        self.flat(x[0])
        self.integers(x.to(torch.uint8))
        self.told_by_name(output_size=(8, 8), input=x)
        return self.told_its_size(x, output_size=(8, 8))


class OwnForward(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_left_with_reasons():
    model = Left()
    before = dict(model.named_modules())
    report = replace_upsampling(model, (torch.rand(1, 3, 4, 4),), include=["[!k]*", "kept"], exclude="kept")
    assert report.changed == []
    assert dict(model.named_modules()) == before
    assert {name: reason for name, _, reason in report.left} == {
        "sized": "it has a size, not a scale_factor",
        "unequal": "its factors differ, (2.0, 3.0)",
        "broken": "its factor must be an integer from 2 on, it is 1.5",
        "one": "its factor must be an integer from 2 on, it is 1.0",
        "trilinear": "not of two dimensions",
        "flat": "it is called with shape (3, 4, 4), not (N, C, H, W)",
        "integers": "it is called with uint8",
        "unseen": "its channels are not known: give example_inputs with which it is called",
        "shared": "shared, also at also.0",
        "unlike": "its kernel, (4, 4), is not its stride, (2, 2)",
        "rectangular": "its factors differ, (2, 1)",
        "padded": "it has a padding",
        "grouped": "it has groups or a dilation",
        "dilated": "it has groups or a dilation",
        "one_dimensional": "not of two dimensions",
        "told_its_size": "it is called with more than its input",
        "lazy": "it or the layer before it is not initialised yet: give example_inputs",
        "shuffle": "there is no Conv2d right before it in an nn.Sequential, used there alone",
        "grouped_shuffle.1": "the Conv2d before it has groups",
        "indivisible.1": "the Conv2d before it has 6 channels, no multiple of 4",
        "too_few.1": "the Conv2d before it has 3 channels, no multiple of 4",
        "infinite": "its factor must be an integer from 2 on, it is inf",
        "without": "its factors differ, ()",
        "told_by_name": "it is called with more than its input",
        "own": "its forward is not that of ConvTranspose2d",
        "kept": "excluded",
        "the model": "no layer: write a CARAFEPack in its place, or use FPNCarafe",
    }
    assert str(report).splitlines()[-1].startswith("left the model: 2 x F.interpolate: no layer")


def test_include_and_exclude():
    model = super_resolution()
    report = replace_upsampling(model, include="4.*")
    assert [change.name for change in report.changed] == ["4.1"]
    assert [(name, reason) for name, _, reason in report.left] == [("2", "not included")]
    assert isinstance(model[2], nn.PixelShuffle)


def test_the_model_itself_and_none_at_all():
    assert "it is the model itself" in str(replace_upsampling(nn.Upsample(scale_factor=2)))
    assert str(replace_upsampling(nn.Conv2d(1, 1, 1))) == "no upsampling found"


def test_a_shared_convolution_keeps_its_shuffle():
    conv = nn.Conv2d(3, 12, 1)
    model = nn.ModuleList([nn.Sequential(conv, nn.PixelShuffle(2)), conv])
    assert not replace_upsampling(model).changed


def test_called_several_times_with_the_same_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            return self.up(self.up(x))

    model = Twice()
    report = replace_upsampling(model, torch.zeros(1, 3, 4, 4))
    assert report.changed[0].new == "CARAFEPack(channels=3, scale_factor=2) for 2 calls"
    assert model(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 16, 16)


def test_looking_leaves_no_trace():
    model = UNet()
    model.down.eval()
    state = copy.deepcopy(model.state_dict())
    replace_upsampling(model, torch.randn(2, 3, 8, 8), exclude="*")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.down[0].training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with pytest.raises(RuntimeError):
        replace_upsampling(model, torch.randn(2, 4, 8, 8))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_device_dtype_and_training_mode_are_kept():
    model = UNet().to(device="meta", dtype=torch.bfloat16)
    model.deconv.eval()
    replace_upsampling(model, torch.zeros(1, 3, 8, 8, device="meta", dtype=torch.bfloat16))
    for parameter in model.parameters():
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16)
    assert not any(module.training for module in model.deconv.modules())
    assert all(module.training for module in model.up.modules())


def test_a_new_convolution_has_the_dtype_of_the_old():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Narrow(), nn.Conv2d(3, 12, 1).bfloat16(), nn.PixelShuffle(2))
    replace_upsampling(model)
    assert model(torch.zeros(1, 3, 4, 4)).dtype == torch.bfloat16


def test_new_layers_are_on_the_device_of_the_layers_input():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            return self.up(self.conv(x).to("meta"))

    model = Split()
    replace_upsampling(model, torch.zeros(1, 3, 4, 4))
    assert model.up.channel_compressor.weight.is_meta
    assert not model.conv.weight.is_meta


def test_compile_export_and_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(super_resolution(), nn.ConvTranspose2d(4, 3, 2, 2)), torch.randn(1, 3, 4, 5)
    replace_upsampling(model)
    model(x).square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    expected = model.eval()(x)
    for got in (torch.compile(model, fullgraph=True, backend="aot_eager"), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(got(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": []}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"include": 3}, TypeError, "include must be a name or several, got int"),
        ({"up_kernel": 4}, ValueError, "up_kernel must be odd, got 4"),
        ({"up_kernel": 0}, ValueError, "up_kernel must be at least 1, got 0"),
        ({"compressed_channels": 0}, ValueError, "compressed_channels must be at least 1, got 0"),
    ],
)
def test_refuses(arguments, error, message):
    model = super_resolution()
    before = dict(model.named_modules())
    with pytest.raises(error, match=f"^{message}$"):
        replace_upsampling(**{"model": model, **arguments})
    assert dict(model.named_modules()) == before
