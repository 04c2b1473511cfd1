"""The modules: torchvision's and mmcv's parameters, initialisation and formulas."""

import copy
import math
import pickle
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import omniops
from omniops.backends.reference import deform_conv2d as reference

PACKS = pytest.mark.parametrize(
    "pack", [omniops.DeformConv2dPack, omniops.ModulatedDeformConv2d, omniops.ModulatedDeformConv2dPack]
)
# A kernel, stride, padding and dilation of which no two numbers are alike where they may differ.
SIZES = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 3)}
NUMBERS = [SIZES[name] for name in ("stride", "padding", "dilation")]


def stirred(module, seed=0):
    """The module with every parameter at random, so that offsets and masks are not what they are at first."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_deform_conv2d_is_the_function():
    module = omniops.DeformConv2d(4, 6, **SIZES, groups=2)
    x = torch.randn(2, 4, 5, 6)
    size = F.conv2d(x, module.weight, None, *NUMBERS, groups=2).shape[2:]
    offset, mask = torch.randn(2, 2 * 12, *size), torch.rand(2, 12, *size)
    for optional_mask in (None, mask):
        expected = omniops.deform_conv2d(x, offset, module.weight, module.bias, *NUMBERS, mask=optional_mask)
        assert torch.equal(module(x, offset, optional_mask), expected)
    assert torch.equal(module(x, offset=offset, mask=mask), module(x, offset, mask))
    plain = F.conv2d(x, module.weight, module.bias, *NUMBERS, groups=2)
    torch.testing.assert_close(module(x, torch.zeros_like(offset)), plain, rtol=1e-5, atol=1e-5)


def test_deform_conv2d_has_torchvisions_parameters_and_initialisation():
    module = omniops.DeformConv2d(16, 32, (3, 5), groups=4)
    assert shapes(module) == {"weight": (32, 4, 3, 5), "bias": (32,)}
    assert shapes(omniops.DeformConv2d(16, 32, 3, bias=False)) == {"weight": (32, 16, 3, 3)}
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(16, 32, (3, 5), groups=4)
    assert torch.equal(module.weight, plain.weight)
    assert torch.equal(module.bias, plain.bias)


def test_deform_conv2d_takes_its_arguments_in_torchvisions_order():
    module = omniops.DeformConv2d(4, 8, 3, 2, 1, 3, 2, False)
    assert (module.in_channels, module.out_channels, module.groups, module.bias) == (4, 8, 2, None)
    assert (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (2, 2), (1, 1), (3, 3))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (omniops.DeformConv2d(4, 8, 3), "DeformConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1))"),
        (
            omniops.DeformConv2d(4, 8, 3, 2, 1, 3, 2, False),
            "DeformConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(3, 3), groups=2, "
            "bias=False)",
        ),
        (
            omniops.ModulatedDeformConv2d(4, 8, 1, offset_groups=2),
            "ModulatedDeformConv2d(\n  4, 8, kernel_size=(1, 1), stride=(1, 1), offset_groups=2\n"
            "  (conv_offset): Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1))\n)",
        ),
    ],
)
def test_repr(module, expected):
    assert repr(module) == expected


def test_packs_have_the_parameters_of_mmcv():
    arguments = {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2}
    for pack, per_tap, bias in (
        (omniops.DeformConv2dPack, 2, {}),
        (omniops.ModulatedDeformConv2dPack, 3, {"bias": torch.randn(6)}),
    ):
        state = {
            "weight": torch.randn(6, 4, 3, 3),
            "conv_offset.weight": torch.randn(4 * per_tap * 9, 8, 3, 3),
            "conv_offset.bias": torch.randn(4 * per_tap * 9),
            **bias,
        }
        module = pack(**arguments, deform_groups=4)
        module.load_state_dict(state, strict=True)
        assert set(module.state_dict()) == set(state)
    assert shapes(omniops.ModulatedDeformConv2d(**arguments, bias=False)).keys() == {
        "weight", "conv_offset.weight", "conv_offset.bias",
    }  # fmt: skip
    assert shapes(omniops.DeformConv2dPack(**arguments, bias=True))["bias"] == (6,)


def load_as_mmengine_does(module, state, prefix=""):
    """Every module is handed the whole dict; PyTorch hands it what lies below its name. Returns what it missed."""
    missing = []
    module._load_from_state_dict(state, prefix, state._metadata.get(prefix[:-1], {}), True, missing, [], [])
    for name, child in module.named_children():
        missing += load_as_mmengine_does(child, state, f"{prefix}{name}.")
    return missing


@PACKS
def test_packs_load_what_mmcv_saved_before_its_version_2(pack):
    def model(seed):
        return stirred(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ModuleDict({"conv2": pack(4, 6, 3)})), seed)

    def old(version, predictor="1.conv2_offset"):
        state = model(0).state_dict()
        assert state._metadata["1.conv2"]["version"] == 2
        state._metadata["1.conv2"] = {} if version is None else {"version": version}
        for parameter in ("weight", "bias"):
            state[f"{predictor}.{parameter}"] = state.pop(f"1.conv2.conv_offset.{parameter}")
        return state

    expected = model(0).state_dict()
    for version in (None, 1):
        loaded = model(1)
        assert not load_as_mmengine_does(loaded, old(version))
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    # None but that name, and none from version 2 on, nor in the place of the new one.
    missing = ["1.conv2.conv_offset.weight", "1.conv2.conv_offset.bias"]
    may_lack = pack is omniops.ModulatedDeformConv2d
    for state in (old(2), old(1, "1.conv2.offset"), old(1, "1.conv2._offset"), old(1, "conv2_offset")):
        loaded, before = model(1), model(1).state_dict()
        assert load_as_mmengine_does(loaded, state) == ([] if may_lack else missing)
        for name in missing:
            assert torch.equal(loaded.state_dict()[name], before[name])
    state_dict, loaded = old(1), model(1)
    state_dict.update({name: expected[name] * 2 for name in missing})
    assert not load_as_mmengine_does(loaded, state_dict)
    for name in missing:
        assert torch.equal(loaded.state_dict()[name], expected[name] * 2)
    with pytest.raises(RuntimeError, match=r"1\.conv2_offset\.weight"):
        model(1).load_state_dict(old(1))


def test_a_predictor_beside_the_module_keeps_what_is_its_own():
    """Of the name that mmcv's first version gave its own: the network's, which calls (x, offset, mask)."""

    def model(seed):
        layers = {"dcn": omniops.ModulatedDeformConv2d(4, 6, 3), "dcn_offset": torch.nn.Conv2d(4, 27, 3)}
        return stirred(torch.nn.ModuleDict(layers), seed)

    state = model(0).state_dict()
    state._metadata["dcn"] = {"version": 1}
    for parameter in ("weight", "bias"):
        del state[f"dcn.conv_offset.{parameter}"]
    loaded = model(1)
    assert not load_as_mmengine_does(loaded, state)
    assert torch.equal(loaded["dcn_offset"].weight, model(0)["dcn_offset"].weight)
    narrow = torch.nn.ModuleDict(
        {"dcn": omniops.ModulatedDeformConv2d(4, 6, 3), "dcn_offset": torch.nn.Conv2d(4, 3, 3)}
    )
    state = {name: value for name, value in narrow.state_dict().items() if ".conv_offset" not in name}
    assert not load_as_mmengine_does(narrow, OrderedState(state))


class OrderedState(OrderedDict):
    _metadata: ClassVar = {}


def bilinear(image, y, x):
    """One sample of an (H, W) map, zero outside of it."""
    total = 0.0
    for row, column in ((math.floor(y) + i, math.floor(x) + j) for i in (0, 1) for j in (0, 1)):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            total += float(image[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def naive(x, offset, mask, weight, bias, groups, offset_groups):
    """The sum over channels and taps, sample by sample, of the sizes above."""
    (kh, kw), (n, c), (c_out, per_group) = SIZES["kernel_size"], x.shape[:2], weight.shape[:2]
    stride, padding, dilation = NUMBERS
    out = torch.zeros(n, c_out, *offset.shape[2:], dtype=x.dtype)
    for b, o, i, j in ((b, o, i, j) for b in range(n) for o in range(c_out) for i in range(out.shape[2])
                       for j in range(out.shape[3])):  # fmt: skip
        for k, u, v in ((k, u, v) for k in range(per_group) for u in range(kh) for v in range(kw)):
            channel = o // (c_out // groups) * per_group + k
            tap = channel // (c // offset_groups) * kh * kw + u * kw + v
            y = i * stride[0] - padding[0] + u * dilation[0] + float(offset[b, 2 * tap, i, j])
            z = j * stride[1] - padding[1] + v * dilation[1] + float(offset[b, 2 * tap + 1, i, j])
            factor = 1.0 if mask is None else float(mask[b, tap, i, j])
            out[b, o, i, j] += float(weight[o, k, u, v]) * factor * bilinear(x[b, channel], y, z)
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (2, 4), (4, 2)])
def test_packs_are_mmcvs_formula(groups, offset_groups):
    """DeformConv2dPack: offset = conv_offset(x). ModulatedDeformConv2dPack: o1, o2, mask = chunk(conv_offset(x), 3),
    offset = cat(o1, o2), mask = sigmoid(mask)."""
    arguments = {**SIZES, "groups": groups, "offset_groups": offset_groups}
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for pack in (omniops.DeformConv2dPack, omniops.ModulatedDeformConv2d):
        module = stirred(pack(4, 4, **arguments).double())
        with torch.no_grad():
            predicted = F.conv2d(x, module.conv_offset.weight, module.conv_offset.bias, *NUMBERS)
            offset, mask = predicted, None
            if pack is omniops.ModulatedDeformConv2d:
                o1, o2, mask = torch.chunk(predicted, 3, dim=1)
                offset, mask = torch.cat((o1, o2), dim=1), torch.sigmoid(mask)
            assert offset.abs().max() > 1
            expected = naive(x, offset, mask, module.weight, module.bias, groups, offset_groups)
            torch.testing.assert_close(module(x), expected)
            other = reference.deform_conv2d(x, offset, module.weight, module.bias, mask, *NUMBERS)
            torch.testing.assert_close(other, expected)


def test_packs_begin_as_a_plain_convolution():
    x = torch.randn(2, 4, 6, 7)
    pack = omniops.DeformConv2dPack(4, 6, **SIZES, groups=2)
    plain = F.conv2d(x, pack.weight, None, *NUMBERS, groups=2)
    torch.testing.assert_close(pack(x), plain, rtol=1e-5, atol=1e-5)
    pack = omniops.ModulatedDeformConv2d(4, 6, **SIZES, groups=2)
    torch.nn.init.normal_(pack.bias)
    plain = 0.5 * F.conv2d(x, pack.weight, None, *NUMBERS, groups=2) + pack.bias[:, None, None]
    torch.testing.assert_close(pack(x), plain, rtol=1e-5, atol=1e-5)


def test_packs_are_initialised_as_mmcv_does():
    torch.manual_seed(0)
    pack = omniops.DeformConv2dPack(64, 64, 3, groups=2)
    bound = (6 / (32 * 9)) ** 0.5
    assert bound * 0.99 < pack.weight.abs().max().item() <= bound
    pack = omniops.ModulatedDeformConv2d(64, 64, 3, groups=2)
    bound = (1 / (64 * 9)) ** 0.5
    assert bound * 0.99 < pack.weight.abs().max().item() <= bound
    assert not pack.bias.any()
    torch.nn.init.ones_(pack.conv_offset.weight)
    torch.nn.init.ones_(pack.conv_offset.bias)
    pack.init_offset()
    assert not pack.conv_offset.weight.any()
    assert not pack.conv_offset.bias.any()


def test_names():
    assert issubclass(omniops.ModulatedDeformConv2dPack, omniops.ModulatedDeformConv2d)  # as in mmcv
    for name in ("DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"):
        assert getattr(omniops.nn, name) is getattr(omniops, name)
    assert omniops.ModulatedDeformConv2d(4, 4, 3, deform_groups=2).offset_groups == 2
    # The order in which mmcv has them, and bias after them.
    pack = omniops.ModulatedDeformConv2d(4, 8, 3, 2, 1, 3, 2, 4, False)
    assert (pack.stride, pack.padding, pack.dilation) == ((2, 2), (1, 1), (3, 3))
    assert (pack.groups, pack.offset_groups, pack.bias) == (2, 4, None)


@PACKS
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": "8"}, TypeError, "in_channels must be an int, got str"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"out_channels": 6.0}, TypeError, "out_channels must be an int, got float"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, -1)}, ValueError, "kernel_size must be at least 1, got (3, -1)"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or two, got 3.0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or two, got (3, 3, 3)"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": True}, TypeError, "stride must be an int or two, got True"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "full"}, ValueError, "padding must be 'valid', 'same', an int or two, got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "stride must be 1 with padding='same', got (2, 2)"),
        ({"padding": None}, TypeError, "padding must be an int or two, got None"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"groups": 3}, ValueError, "groups must divide in_channels, 8, got 3"),
        ({"groups": 4}, ValueError, "groups must divide out_channels, 6, got 4"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"bias": 4}, TypeError, "bias must be a bool, got 4"),
        ({"offset_groups": 3}, ValueError, "offset_groups must divide in_channels, 8, got 3"),
        ({"offset_groups": 0}, ValueError, "offset_groups must be at least 1, got 0"),
        ({"offset_groups": True}, TypeError, "offset_groups must be an int, got bool"),
        ({"deform_groups": 3}, ValueError, "deform_groups must divide in_channels, 8, got 3"),
        ({"deform_groups": "2"}, TypeError, "deform_groups must be an int, got str"),
        ({"deformable_groups": 3}, ValueError, "deformable_groups must divide in_channels, 8, got 3"),
    ],
)
def test_refusals(pack, arguments, error, message):
    for module in (pack, omniops.DeformConv2d):
        if module is omniops.DeformConv2d and not arguments.keys().isdisjoint(
            ("offset_groups", "deform_groups", "deformable_groups")
        ):
            continue
        with pytest.raises(error) as caught:
            module(**{"in_channels": 8, "out_channels": 6, "kernel_size": 3, **arguments})
        assert str(caught.value) == message


@PACKS
def test_packs_refuse_what_they_cannot_take(pack):
    with pytest.raises(ValueError, match=r"^x must have 4 dimensions \(N, C, H, W\), got shape \(4, 5, 5\)$"):
        pack(4, 4, 3)(torch.zeros(4, 5, 5))
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor, got list$"):
        pack(4, 4, 3)([1])


@PACKS
def test_packs_learn(pack):
    torch.manual_seed(0)
    module, x, target = pack(4, 4, 3, padding=1, offset_groups=2), torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    # The predictor has learned too.
    assert module.conv_offset.weight.abs().max() > 0.01


@pytest.mark.slow
@PACKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_under_autocast_and_compile(pack, dtype):
    module = stirred(pack(4, 6, 3, padding=1, groups=2))
    x = torch.randn(1, 4, 6, 5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True)(x)
    assert expected.dtype == compiled.dtype == dtype
    torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=3e-2)
    expected.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@PACKS
def test_packs_channels_last(pack):
    module = stirred(pack(4, 6, 3, padding=1, offset_groups=2))
    x = torch.randn(2, 4, 6, 5)
    expected = module(x)
    module.to(memory_format=torch.channels_last)
    result = module(x.contiguous(memory_format=torch.channels_last))
    assert expected.is_contiguous()
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@PACKS
def test_packs_take_an_empty_batch(pack):
    module = pack(4, 6, 3, padding=1)
    result = module(torch.zeros(0, 4, 6, 5))
    assert result.shape == (0, 6, 6, 5)
    result.sum().backward()
    assert not module.weight.grad.any()


def test_modulated_deform_conv2d_called_as_mmcvs():
    torch.manual_seed(0)
    module = stirred(omniops.ModulatedDeformConv2d(4, 6, **SIZES, groups=2, deform_groups=2))
    x = torch.randn(2, 4, 5, 6)
    size = F.conv2d(x, module.weight, None, *NUMBERS, groups=2).shape[2:]
    offset, mask = torch.randn(2, 2 * 12, *size), torch.rand(2, 12, *size)
    expected = omniops.deform_conv2d(x, offset, module.weight, module.bias, *NUMBERS, mask=mask)
    assert torch.equal(module(x, offset, mask), expected)
    assert torch.equal(module(x, mask=mask, offset=offset), expected)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, offset, mask), expected)
    assert (module.deform_groups, module.transposed, module.output_padding) == (2, False, (0,))
    for args, message in (
        ((offset,), "mask must be a torch.Tensor, got NoneType: give both offset and mask, or neither"),
        ((None, mask), "offset must be a torch.Tensor, got NoneType: give both offset and mask, or neither"),
        ((3, mask), "offset must be a torch.Tensor, got int"),
    ):
        with pytest.raises(TypeError) as caught:
            module(x, *args)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^offset must have deform_groups \* kh \* kw \* 2 = 24 channels, got 12$"):
        module(x, offset[:, :12], mask[:, :6])
    with pytest.raises(TypeError):
        omniops.ModulatedDeformConv2dPack(4, 6, **SIZES)(x, offset, mask)


def test_modulated_deform_conv2d_loads_the_state_dicts_of_both_of_mmcvs_classes():
    generator = torch.Generator().manual_seed(0)
    plain = {"weight": torch.randn(6, 4, 3, 3, generator=generator), "bias": torch.randn(6, generator=generator)}
    pack = {
        **plain,
        "conv_offset.weight": torch.randn(27, 4, 3, 3, generator=generator),
        "conv_offset.bias": torch.randn(27, generator=generator),
    }
    x = torch.randn(1, 4, 5, 6)
    for prefix, wrapped in (
        ("", lambda module: module),
        ("0.1.", lambda m: torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU(), m))),
    ):
        for assign in (False, True):
            module = omniops.ModulatedDeformConv2d(4, 6, 3)
            state = {prefix + name: value.clone() for name, value in plain.items()}
            conv_offset = module.conv_offset.weight
            wrapped(module).load_state_dict(state, strict=True, assign=assign)
            assert set(state) == {prefix + name for name in plain}
            assert torch.equal(module.weight, plain["weight"])
            assert torch.equal(module.bias, plain["bias"])
            assert module.conv_offset.weight is conv_offset  # in the optimizer it still is
            assert not conv_offset.any()
            torch.testing.assert_close(module(x), 0.5 * F.conv2d(x, plain["weight"]) + plain["bias"][:, None, None])
            state = {prefix + name: value.clone() for name, value in pack.items()}
            wrapped(module).load_state_dict(state, strict=True, assign=assign)
            assert all(torch.equal(value, pack[name]) for name, value in module.state_dict().items())
    # What is half there, or of another module, is missed as ever.
    del state["0.1.conv_offset.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.1\.conv_offset\.bias"'):
        wrapped(module).load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="weight"):
        module.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match=r"conv_offset\.weight"):
        omniops.ModulatedDeformConv2dPack(4, 6, 3).load_state_dict(plain, strict=True)


def test_without_conv_offset_the_parameters_are_those_of_mmcvs_class():
    module = omniops.ModulatedDeformConv2d(4, 6, 3)
    module.conv_offset = None
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert shapes(made) == {"weight": (6, 4, 3, 3), "bias": (6,)}
        assert [name for name, _ in made.named_parameters()] == ["weight", "bias"]
        made.load_state_dict(module.state_dict(), strict=True)
        made.init_weights()
        made(torch.randn(1, 4, 5, 5), torch.zeros(1, 18, 3, 3), torch.ones(1, 9, 3, 3)).sum().backward()
        with pytest.raises(
            ValueError, match=r"^x alone needs conv_offset, which is None here: give offset and mask too$"
        ):
            made(torch.randn(1, 4, 5, 5))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_offset\.weight"):
        module.load_state_dict(omniops.ModulatedDeformConv2d(4, 6, 3).state_dict(), strict=True)


def test_copies_of_modulated_deform_conv2d_load_as_it_does():
    module = omniops.ModulatedDeformConv2d(4, 6, 3)
    state = {"weight": torch.randn(6, 4, 3, 3), "bias": torch.randn(6)}
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        stirred(made)
        kept = made.conv_offset.weight.clone()
        made.load_state_dict(state)
        assert torch.equal(made.conv_offset.weight, kept)


class OwnPredictor(omniops.ModulatedDeformConv2d):
    """As MMEditing's packs are written: of mmcv's class, with a predictor and a forward of their own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = torch.nn.Conv2d(self.in_channels, self.deform_groups * 27, self.kernel_size, padding=1)
        self.init_offset()

    def forward(self, x, extra):
        first, second, mask = torch.chunk(self.conv_offset(extra), 3, dim=1)
        return omniops.modulated_deform_conv2d(
            x, torch.cat((first, second), dim=1), torch.sigmoid(mask), self.weight, self.bias, self.stride,
            self.padding, self.dilation, self.groups, self.deform_groups,
        )  # fmt: skip


def test_a_predictor_of_a_subclass_is_loaded_strictly():
    module, x = OwnPredictor(4, 6, 3, padding=1, deform_groups=2), torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(module(x, x), 0.5 * F.conv2d(x, module.weight, padding=1))
    state = module.state_dict()
    module.load_state_dict(state, strict=True)
    del state["conv_offset.weight"], state["conv_offset.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_offset\.weight"):
        module.load_state_dict(state, strict=True)
