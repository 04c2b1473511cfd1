"""What has a name of torchvision or mmcv is called as theirs, and has the same parameters.

mmcv's signatures and parameters are those of mmcv 2.1, whose package need not be here.
"""

import inspect
from operator import attrgetter

import pytest
import torch

import omniops

CONVOLUTION = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
CARAFE = ["kernel_size", "group_size", "scale_factor"]
# The arguments of mmcv's that are given by position, with their defaults; of deform_groups ours has another name.
SIGNATURES = {
    "carafe": (["features", "masks", *CARAFE], []),
    "carafe_naive": (["features", "masks", *CARAFE], []),
    "CARAFE": (CARAFE, []),
    "CARAFENaive": (CARAFE, []),
    "CARAFEPack": (
        ["channels", "scale_factor", "up_kernel", "up_group", "encoder_kernel", "encoder_dilation",
         "compressed_channels"],
        [5, 1, 3, 1, 64],
    ),
    "DeformConv2dPack": ([*CONVOLUTION, "offset_groups", "bias", "im2col_step"], [1, 0, 1, 1, 1, False, 32]),
    "ModulatedDeformConv2d": ([*CONVOLUTION, "offset_groups", "bias"], [1, 0, 1, 1, 1, True]),
    "ModulatedDeformConv2dPack": ([*CONVOLUTION, "offset_groups", "bias"], [1, 0, 1, 1, 1, True]),
    "nn.MultiScaleDeformableAttention": (
        ["embed_dims", "num_heads", "num_levels", "num_points", "im2col_step", "dropout", "batch_first", "norm_cfg",
         "init_cfg", "value_proj_ratio"],
        [256, 8, 4, 4, 64, 0.1, False, None, None, 1.0],
    ),
    "nn.MultiScaleDeformableAttention.forward": (
        ["self", "query", "key", "value", "identity", "query_pos", "key_padding_mask", "reference_points",
         "spatial_shapes", "level_start_index", "kwargs"],
        [None] * 8,
    ),
    "modulated_deform_conv2d": (
        ["input", "offset", "mask", "weight", "bias", "stride", "padding", "dilation", "groups", "deform_groups"],
        [None, 1, 0, 1, 1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_arguments_are_mmcvs(name):
    names, defaults = SIGNATURES[name]
    parameters = [
        p for p in inspect.signature(attrgetter(name)(omniops)).parameters.values() if p.kind != p.KEYWORD_ONLY
    ]
    assert [p.name for p in parameters] == names
    assert [p.default for p in parameters if p.default is not p.empty] == defaults


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"])
@pytest.mark.parametrize("keyword", ["deform_groups", "deformable_groups"])
def test_mmcvs_keywords(name, keyword):
    module = getattr(omniops, name)(8, 4, 3, **{keyword: 4})
    assert (module.offset_groups, module.deform_groups) == (4, 4)


CONV_OFFSET = {"conv_offset.weight", "conv_offset.bias"}
# Of Deformable DETR's own MSDeformAttn too.
PROJECTIONS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
PARAMETERS = {
    "CARAFE": ((3, 1, 2), set()),
    "CARAFENaive": ((3, 1, 2), set()),
    "CARAFEPack": (
        (4, 2), {f"{layer}.{p}" for layer in ("channel_compressor", "content_encoder") for p in ("weight", "bias")},
    ),
    "DeformConv2dPack": ((4, 4, 3), {"weight", *CONV_OFFSET}),
    "ModulatedDeformConv2d": ((4, 4, 3), {"weight", "bias"}),
    "ModulatedDeformConv2dPack": ((4, 4, 3), {"weight", "bias", *CONV_OFFSET}),
    "nn.MultiScaleDeformableAttention": (
        (16, 2), {f"{layer}.{p}" for layer in PROJECTIONS for p in ("weight", "bias")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dicts_of_mmcv_load_strictly(name):
    arguments, keys = PARAMETERS[name]
    module = attrgetter(name)(omniops)(*arguments)
    assert name != "nn.MultiScaleDeformableAttention" or keys == module.state_dict().keys()
    state = {key: torch.randn_like(module.state_dict()[key]) for key in keys}
    module.load_state_dict(state, strict=True)
    assert all(torch.equal(module.state_dict()[key], state[key]) for key in keys)


def test_calls_are_mmcvs():
    x, offset, mask = torch.randn(1, 4, 6, 6), torch.randn(1, 18, 4, 4), torch.rand(1, 9, 4, 4)
    weight, bias = torch.randn(4, 4, 3, 3), torch.randn(4)
    expected = omniops.deform_conv2d(x, offset, weight, bias, mask=mask)
    assert torch.equal(omniops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 0, 1, 1, 1), expected)
    module = omniops.ModulatedDeformConv2d(4, 4, 3)
    module.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(module(x, offset, mask), expected)
    for pack in (omniops.DeformConv2dPack, omniops.ModulatedDeformConv2dPack):
        assert pack(4, 4, 3)(x).shape == (1, 4, 4, 4)
    masks = torch.rand(1, 9, 12, 12)
    for module in (omniops.CARAFE(3, 1, 2), omniops.CARAFENaive(3, 1, 2)):
        assert torch.equal(module(x, masks), omniops.carafe(x, masks, 3, 1, 2))
    assert torch.equal(omniops.carafe_naive(x, masks, 3, 1, 2), omniops.carafe(x, masks, 3, 1, 2))
    assert omniops.CARAFEPack(4, 2)(x).shape == (1, 4, 12, 12)


def test_mmcvs_deform_conv2d_is_another_function():
    """torchvision's has the name here: mmcv's call, with the stride in the place of the bias, is an error by name."""
    x, offset, weight = torch.randn(1, 4, 6, 6), torch.randn(1, 18, 4, 4), torch.randn(4, 4, 3, 3)
    with pytest.raises(TypeError, match=r"^bias must be a torch.Tensor, got int$"):
        omniops.deform_conv2d(x, offset, weight, 1, 0, 1, 1, 1)
    module = omniops.DeformConv2d(4, 4, 3, bias=False)  # mmcv's class has no bias
    module.load_state_dict({"weight": weight}, strict=True)
    assert torch.equal(module(x, offset), omniops.deform_conv2d(x, offset, weight))


@pytest.mark.parametrize("name", ["deform_conv2d", "DeformConv2d"])
def test_torchvisions(name):
    peer = getattr(pytest.importorskip("torchvision.ops", reason="torchvision is not installed"), name)
    ours, theirs = (inspect.signature(of).parameters for of in (getattr(omniops, name), peer))
    assert list(ours) == list(theirs)
    numbers = {(1, 1): 1, (0, 0): 0}  # as torchvision writes some of them
    assert [p.default for p in ours.values()] == [numbers.get(p.default, p.default) for p in theirs.values()]


def test_torchvisions_module():
    peer = pytest.importorskip("torchvision.ops", reason="torchvision is not installed").DeformConv2d(4, 6, 3, groups=2)
    module = omniops.DeformConv2d(4, 6, 3, groups=2)
    module.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(module.state_dict(), strict=True)
    inputs = torch.randn(1, 4, 6, 6), torch.randn(1, 18, 4, 4), torch.rand(1, 9, 4, 4)
    torch.testing.assert_close(module(*inputs), peer(*inputs), rtol=1e-5, atol=1e-5)
    assert inspect.signature(module.forward).parameters.keys() == inspect.signature(peer.forward).parameters.keys()
