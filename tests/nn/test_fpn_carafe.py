import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import omniops
from omniops.nn import FPNCarafe, PAFPNCarafe

# As mmdet 3.3.0 has them.
FPN_CARAFE_OF_THE_PUBLISHED_MODELS = {
    "lateral_convs.0.conv.weight": (256, 256, 1, 1),
    "lateral_convs.0.conv.bias": (256,),
    "lateral_convs.1.conv.weight": (256, 512, 1, 1),
    "lateral_convs.1.conv.bias": (256,),
    "lateral_convs.2.conv.weight": (256, 1024, 1, 1),
    "lateral_convs.2.conv.bias": (256,),
    "lateral_convs.3.conv.weight": (256, 2048, 1, 1),
    "lateral_convs.3.conv.bias": (256,),
    "lateral_convs.4.conv.weight": (256, 2048, 3, 3),
    "lateral_convs.4.conv.bias": (256,),
    "fpn_convs.0.conv.weight": (256, 256, 3, 3),
    "fpn_convs.0.conv.bias": (256,),
    "fpn_convs.1.conv.weight": (256, 256, 3, 3),
    "fpn_convs.1.conv.bias": (256,),
    "fpn_convs.2.conv.weight": (256, 256, 3, 3),
    "fpn_convs.2.conv.bias": (256,),
    "fpn_convs.3.conv.weight": (256, 256, 3, 3),
    "fpn_convs.3.conv.bias": (256,),
    "fpn_convs.4.conv.weight": (256, 256, 3, 3),
    "fpn_convs.4.conv.bias": (256,),
    "upsample_modules.0.channel_compressor.weight": (64, 256, 1, 1),
    "upsample_modules.0.channel_compressor.bias": (64,),
    "upsample_modules.0.content_encoder.weight": (100, 64, 3, 3),
    "upsample_modules.0.content_encoder.bias": (100,),
    "upsample_modules.1.channel_compressor.weight": (64, 256, 1, 1),
    "upsample_modules.1.channel_compressor.bias": (64,),
    "upsample_modules.1.content_encoder.weight": (100, 64, 3, 3),
    "upsample_modules.1.content_encoder.bias": (100,),
    "upsample_modules.2.channel_compressor.weight": (64, 256, 1, 1),
    "upsample_modules.2.channel_compressor.bias": (64,),
    "upsample_modules.2.content_encoder.weight": (100, 64, 3, 3),
    "upsample_modules.2.content_encoder.bias": (100,),
    "upsample_modules.3.channel_compressor.weight": (64, 256, 1, 1),
    "upsample_modules.3.channel_compressor.bias": (64,),
    "upsample_modules.3.content_encoder.weight": (100, 64, 3, 3),
    "upsample_modules.3.content_encoder.bias": (100,),
}
FPN_CARAFE_WITH_GROUP_NORM = {
    "lateral_convs.0.conv.weight": (16, 8, 1, 1),
    "lateral_convs.0.gn.weight": (16,),
    "lateral_convs.0.gn.bias": (16,),
    "fpn_convs.0.conv.weight": (16, 16, 3, 3),
    "fpn_convs.0.gn.weight": (16,),
    "fpn_convs.0.gn.bias": (16,),
}
PAFPN = {
    "lateral_convs.0.conv.weight": (16, 8, 1, 1),
    "lateral_convs.0.conv.bias": (16,),
    "lateral_convs.1.conv.weight": (16, 16, 1, 1),
    "lateral_convs.1.conv.bias": (16,),
    "lateral_convs.2.conv.weight": (16, 32, 1, 1),
    "lateral_convs.2.conv.bias": (16,),
    "fpn_convs.0.conv.weight": (16, 16, 3, 3),
    "fpn_convs.0.conv.bias": (16,),
    "fpn_convs.1.conv.weight": (16, 16, 3, 3),
    "fpn_convs.1.conv.bias": (16,),
    "fpn_convs.2.conv.weight": (16, 16, 3, 3),
    "fpn_convs.2.conv.bias": (16,),
    "downsample_convs.0.conv.weight": (16, 16, 3, 3),
    "downsample_convs.0.conv.bias": (16,),
    "downsample_convs.1.conv.weight": (16, 16, 3, 3),
    "downsample_convs.1.conv.bias": (16,),
    "pafpn_convs.0.conv.weight": (16, 16, 3, 3),
    "pafpn_convs.0.conv.bias": (16,),
    "pafpn_convs.1.conv.weight": (16, 16, 3, 3),
    "pafpn_convs.1.conv.bias": (16,),
}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def maps(channels, sizes, batch=2):
    return [torch.randn(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]


def as_nearest(neck):
    """Masks that are one for the middle of the kernel make CARAFE nearest interpolation."""
    for pack in neck.upsample_modules:
        nn.init.zeros_(pack.content_encoder.weight)
        with torch.no_grad():
            pack.content_encoder.bias.view(pack.up_kernel**2, -1)[pack.up_kernel**2 // 2] = 200
    return neck


def test_names_and_shapes_are_those_of_mmdet():
    assert shapes(FPNCarafe([256, 512, 1024, 2048], 256, 5)) == FPN_CARAFE_OF_THE_PUBLISHED_MODELS
    assert shapes(FPNCarafe([8], 16, norm_layer=lambda channels: nn.GroupNorm(2, channels))) == (
        FPN_CARAFE_WITH_GROUP_NORM
    )
    assert "lateral_convs.0.bn.running_mean" in shapes(FPNCarafe([8], 16, norm_layer=nn.BatchNorm2d))
    path_aggregation = shapes(PAFPNCarafe([8, 16, 32], 16, 4))
    assert {name: shape for name, shape in path_aggregation.items() if "upsample_modules" not in name} == PAFPN
    assert sum("upsample_modules" in name for name in path_aggregation) == 2 * 4


@pytest.fixture
def mmdet_necks():
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    omniops.enable("mmcv")
    from mmdet.models import necks

    yield necks
    omniops.disable("mmcv")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"num_outs": 5}, {"num_outs": 5}),
        ({"num_outs": 5, "start_level": 1}, {"num_outs": 5, "start_level": 1}),
        ({"num_outs": 2, "end_level": 1}, {"end_level": 1}),
        ({"norm_cfg": {"type": "BN"}, "act_cfg": {"type": "ReLU"}},
         {"norm_layer": nn.BatchNorm2d, "activation_layer": nn.ReLU}),
    ],
)  # fmt: skip
def test_fpn_equals_that_of_mmdet(mmdet_necks, theirs, ours):
    torch.manual_seed(0)
    channels = [8, 12, 16]
    upsampling = {"type": "carafe", "up_kernel": 3, "up_group": 2, "encoder_kernel": 5, "encoder_dilation": 2}
    expected = mmdet_necks.FPN_CARAFE(channels, 16, **{"num_outs": 3, "upsample_cfg": upsampling, **theirs})
    expected.init_weights()
    for pack in expected.upsample_modules:
        nn.init.normal_(pack.content_encoder.weight)
    neck = FPNCarafe(channels, 16, upsample_cfg=upsampling, **ours)
    neck.load_state_dict(expected.state_dict(), strict=True)
    inputs = maps(channels, [(23, 18), (12, 9), (6, 5)])
    for ours_, theirs_ in zip(neck(inputs), expected(inputs), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-5)


def test_path_aggregation_equals_that_of_mmdet_with_nearest_interpolation(mmdet_necks):
    torch.manual_seed(0)
    channels = [8, 16, 32]
    expected = mmdet_necks.PAFPN(channels, 16, 5)
    neck = as_nearest(PAFPNCarafe(channels, 16, 5))
    assert not neck.load_state_dict(expected.state_dict(), strict=False).unexpected_keys
    inputs = maps(channels, [(23, 18), (12, 9), (6, 5)])
    for ours, theirs in zip(neck(inputs), expected(inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3))
def test_any_sizes_as_torchvision_with_nearest_interpolation(sizes):
    torch.manual_seed(0)
    channels = [4] * len(sizes)
    neck = as_nearest(FPNCarafe(channels, 4, upsample_cfg={"compressed_channels": 2}))
    inputs = maps(channels, sizes)
    top, expected = None, []
    for lateral, out, x in reversed(list(zip(neck.lateral_convs, neck.fpn_convs, inputs, strict=True))):
        top = lateral(x) if top is None else lateral(x) + F.interpolate(top, size=x.shape[2:])
        expected.insert(0, out(top))
    for ours, theirs in zip(neck(inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3))
def test_path_aggregation_takes_any_sizes(sizes):
    channels = [4] * len(sizes)
    neck = PAFPNCarafe(channels, 4, len(sizes) + 1, upsample_cfg={"compressed_channels": 2})
    *levels, extra = neck(maps(channels, sizes))
    assert [tuple(level.shape[2:]) for level in levels] == sizes
    assert torch.equal(extra, levels[-1][..., ::2, ::2])


def test_larger_by_a_pixel_is_cropped():
    """On the way down as MMDetection does it, and on the way up where sizes were rounded down."""
    torch.manual_seed(0)
    neck = PAFPNCarafe([4, 4], 4)
    nn.init.normal_(neck.upsample_modules[0].content_encoder.weight)
    below, above = maps([4, 4], [(7, 5), (4, 3)])
    top = neck.lateral_convs[1](above)
    first, second = neck([below, above])
    upsampled = neck.upsample_modules[0](top)[..., :7, :5]
    torch.testing.assert_close(first, neck.fpn_convs[0](neck.lateral_convs[0](below) + upsampled))
    torch.testing.assert_close(second, neck.pafpn_convs[0](neck.fpn_convs[1](top) + neck.downsample_convs[0](first)))

    above = above[:, :, :3]
    top = neck.lateral_convs[1](above)
    first, second = neck([below, above])
    downsampled = neck.downsample_convs[0](first)[..., :3, :3]
    torch.testing.assert_close(second, neck.pafpn_convs[0](neck.fpn_convs[1](top) + downsampled))


def last_level_max_pool(results, inputs, names):
    """torchvision's ``LastLevelMaxPool``, and what came."""
    last_level_max_pool.inputs = inputs
    return [*results, F.max_pool2d(results[-1], 1, 2)], [*names, "pool"]


@pytest.mark.parametrize("kind", [FPNCarafe, PAFPNCarafe])
def test_an_ordered_dict_keeps_its_names(kind):
    neck = kind([4, 8, 16], 4, 4, start_level=1, extra_blocks=last_level_max_pool)
    inputs = maps([4, 8, 16], [(16, 12), (8, 6), (4, 3)])
    named = OrderedDict(zip(("fine", "middle", "coarse"), inputs, strict=True))
    result = neck(named)
    assert isinstance(result, OrderedDict)
    assert list(result) == ["middle", "coarse", "extra0", "extra1", "pool"]
    assert [tuple(x.shape) for x in result.values()] == [
        (2, 4, 8, 6), (2, 4, 4, 3), (2, 4, 2, 2), (2, 4, 1, 1), (2, 4, 1, 1)
    ]  # fmt: skip
    assert all(a is b for a, b in zip(last_level_max_pool.inputs, inputs, strict=True))
    unnamed = neck(inputs)
    assert isinstance(unnamed, tuple)
    assert all(torch.equal(a, b) for a, b in zip(unnamed, result.values(), strict=True))


def test_it_serves_torchvision():
    pyramid = pytest.importorskip("torchvision.ops.feature_pyramid_network", exc_type=ImportError)
    channels = [4, 8]
    expected = pyramid.FeaturePyramidNetwork(channels, 4, pyramid.LastLevelP6P7(8, 4))
    neck = as_nearest(FPNCarafe(channels, 4, extra_blocks=expected.extra_blocks))
    for ours, theirs in ((neck.lateral_convs, expected.inner_blocks), (neck.fpn_convs, expected.layer_blocks)):
        for block, their_block in zip(ours, theirs, strict=True):
            block.conv.load_state_dict(their_block[0].state_dict())
    inputs = OrderedDict(zip("ab", maps(channels, [(7, 9), (4, 4)]), strict=True))
    result = neck(inputs)
    assert list(result) == ["a", "b", "p6", "p7"]
    for name, theirs in expected(inputs).items():
        torch.testing.assert_close(result[name], theirs, rtol=1e-5, atol=1e-5)


def test_initialised_as_mmdet_does():
    torch.manual_seed(0)
    neck = PAFPNCarafe([256, 64], 64)
    bound = (6 / (256 + 64)) ** 0.5
    assert bound * 0.95 < neck.lateral_convs[0].conv.weight.abs().max().item() <= bound
    bound = (6 / (9 * 64 * 2)) ** 0.5
    for convolutions in (neck.fpn_convs, neck.downsample_convs, neck.pafpn_convs):
        assert bound * 0.95 < convolutions[0].conv.weight.abs().max().item() <= bound
        assert not convolutions[0].conv.bias.any()
    assert neck.upsample_modules[0].content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("kind", [FPNCarafe, PAFPNCarafe])
def test_compile_export_pickle_and_gradients(kind):
    torch.manual_seed(0)
    neck = kind([4, 8], 4, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU)
    inputs = maps([4, 8], [(7, 6), (4, 3)])
    expected = neck.eval()(inputs)
    copy = pickle.loads(pickle.dumps(neck))
    for got in (
        copy(inputs),
        torch.compile(neck, fullgraph=True, backend="aot_eager")(inputs),
        torch.export.export(neck, (inputs,)).module()(inputs),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    sum(x.sum() for x in neck.train()(inputs)).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 8}, TypeError, "in_channels must be a list or a tuple of ints, got int"),
        ({"in_channels": [8, 0]}, ValueError, r"in_channels\[1\] must be at least 1, got 0"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"num_outs": 1}, ValueError, "num_outs must be at least the 2 levels used, got 1"),
        ({"num_outs": 2.0}, TypeError, "num_outs must be an int, got float"),
        ({"start_level": 2}, ValueError,
         "start_level and end_level must be the first and the last of the 2 levels to use, got 2 and -1"),
        ({"end_level": 2}, ValueError,
         "start_level and end_level must be the first and the last of the 2 levels to use, got 0 and 2"),
        ({"start_level": 1, "end_level": 0}, ValueError,
         "start_level and end_level must be the first and the last of the 2 levels to use, got 1 and 0"),
        ({"upsample_cfg": {"type": "nearest"}}, ValueError, "upsample_cfg must be CARAFE's, got type='nearest'"),
        ({"upsample_cfg": {"up_kernel": 4}}, ValueError, "up_kernel must be odd, got 4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [FPNCarafe, PAFPNCarafe])
def test_refuses(kind, arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        kind(**{"in_channels": [8, 8], "out_channels": 8, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 4, 4, 4), TypeError, "x must be a dict, a list or a tuple of tensors, got Tensor"),
        ([torch.zeros(1, 4, 4, 4)], ValueError, "x must have 2 maps, as in_channels has, got 1"),
        ([torch.zeros(1, 4, 4, 4), None], TypeError, r"x\[1\] must be a torch.Tensor, got NoneType"),
        ({"a": torch.zeros(1, 4, 4, 4), "b": torch.zeros(8, 2, 2)}, ValueError,
         r"x\['b'\] must have 4 dimensions \(N, C, H, W\), got shape \(8, 2, 2\)"),
        ({"a": torch.zeros(1, 8, 4, 4), "b": torch.zeros(1, 8, 2, 2)}, ValueError,
         r"x\['a'\] must have 4 channels, got shape \(1, 8, 4, 4\)"),
    ],
)  # fmt: skip
def test_refuses_maps(x, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        FPNCarafe([4, 8], 4)(x)


@pytest.mark.parametrize("neck", [FPNCarafe, PAFPNCarafe])
def test_sizes_may_be_numpys_integers(neck):
    def of(kind):
        return neck([kind(4), kind(8), kind(16)], kind(8), kind(3), kind(1), kind(2),
                    upsample_cfg={"up_kernel": kind(3), "compressed_channels": kind(4)})  # fmt: skip

    made = of(np.int64)
    assert repr(made) == repr(of(int))
    assert [type(size) for size in (*made.in_channels, made.out_channels, made.num_outs)] == [int] * 5
    x = [torch.randn(1, channels, 8 >> level, 8 >> level) for level, channels in enumerate((4, 8, 16))]
    assert [tuple(result.shape) for result in made(x)] == [(1, 8, 4, 4), (1, 8, 2, 2), (1, 8, 1, 1)]


def test_levels_are_integers():
    with pytest.raises(TypeError, match=r"^start_level must be an int, got float$"):
        FPNCarafe([4, 8], 8, start_level=1.0)
