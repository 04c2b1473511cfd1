"""One nn.Upsample at several call sites, as in YOLOX's neck."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from omniops import CARAFEPack
from omniops.nn import CARAFEPacks, replace_upsampling


class Neck(nn.Module):
    """The top-down path of YOLOX's: one layer, called in a loop at levels of 12, 8 and 4 channels."""

    def __init__(self, channels=(4, 8, 12, 16), recompute=False):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.reduce_layers = nn.ModuleList(nn.Conv2d(above, below, 1) for below, above in pairwise(channels))
        self.recompute = recompute

    def level(self, level, high, low):
        return low + self.upsample(self.reduce_layers[level](high))

    def forward(self, inputs):
        results = [inputs[-1]]
        for level in range(len(inputs) - 2, -1, -1):
            step = (level, results[0], inputs[level])
            results.insert(
                0, checkpoint(self.level, *step, use_reentrant=False) if self.recompute else self.level(*step)
            )
        return results


def levels(channels=(4, 8, 12, 16)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, c, 16 >> i, 24 >> i, generator=generator) for i, c in enumerate(channels)]


def replaced(**arguments):
    torch.manual_seed(0)
    model = Neck(**arguments)
    replace_upsampling(model, (levels(),))
    return model


def test_yolox_has_a_pack_for_each_level():
    model = Neck()
    shapes = [result.shape for result in model(levels())]
    report = replace_upsampling(model, (levels(),))
    assert report.left == []
    assert str(report) == (
        "changed upsample: Upsample(scale_factor=2.0, mode='nearest') -> "
        "CARAFEPack(channels=4, scale_factor=2) at upsample.4 + "
        "CARAFEPack(channels=8, scale_factor=2) at upsample.8 + "
        "CARAFEPack(channels=12, scale_factor=2) at upsample.12"
    )
    results = model(levels())
    assert [result.shape for result in results] == shapes
    expected = levels()
    for level in (2, 1, 0):
        reduced = model.reduce_layers[level](expected[level + 1])
        expected[level] = expected[level] + model.get_submodule(f"upsample.{(4, 8, 12)[level]}")(reduced)
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)
    results[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # as DistributedDataParallel asks
    assert all(parameter.grad.any() for parameter in model.upsample.parameters())


def test_recomputed_activations_take_the_same_packs():
    usual, recomputing = replaced(), replaced(recompute=True)
    for model in (usual, recomputing):
        model(levels())[0].square().sum().backward()
    for parameter, other in zip(usual.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_copies_and_state_dicts():
    model, other = replaced(), Neck()
    replace_upsampling(other, (levels(),))
    assert {name.rsplit(".", 2)[0] for name in model.state_dict() if "upsample" in name} == {
        "upsample.4", "upsample.8", "upsample.12",
    }  # fmt: skip
    other.load_state_dict(model.state_dict(), strict=True)
    expected = model(levels())[0]
    for made in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(levels())[0], expected)


def test_compile_and_export():
    model = replaced().eval()
    expected = model(levels())[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(levels())[0], expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (levels(),)).module()
    torch.testing.assert_close(exported(levels())[0], expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    dynamic = torch.compile(model.upsample, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in levels()[:3]:
        torch.testing.assert_close(dynamic(x), model.upsample(x), rtol=1e-4, atol=1e-5)


def test_every_pack_is_on_the_device_of_its_level():
    class Split(Neck):
        def level(self, level, high, low):
            return self.upsample(self.reduce_layers[level](high).to("meta" if level == 0 else "cpu"))

    model = Split()
    replace_upsampling(model, (levels(),))
    assert {name: next(pack.parameters()).device.type for name, pack in model.upsample.items()} == {
        "4": "meta", "8": "cpu", "12": "cpu",
    }  # fmt: skip


class SharedLayers(nn.Module):
    """One layer that three modules hold, of which the model calls two, and a block under two names."""

    def __init__(self):
        super().__init__()
        up = nn.Upsample(scale_factor=2)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 1), up)
        self.second = nn.Sequential(nn.Conv2d(6, 4, 1), up)
        self.unused = nn.ModuleList([up])
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=3))
        self.again = self.block

    def forward(self, x):
        return self.again(self.second(self.first(x)))


@pytest.mark.parametrize("known", [True, False])
def test_a_layer_that_several_modules_hold(known):
    model, x = SharedLayers(), torch.randn(1, 3, 2, 2)
    unused = model.unused[0]
    report = replace_upsampling(model, x if known else None)
    assert [(name, new) for name, _, new in report.changed] == [
        ("first.1", "CARAFEPack(channels=6, scale_factor=2)"),
        ("second.1", "CARAFEPack(channels=4, scale_factor=2)"),
        ("block.1", "CARAFEPack(channels=4, scale_factor=3)"),
    ]
    assert [(name, reason) for name, _, reason in report.left] == [
        ("unused.0", "its channels are not known: give example_inputs with which it is called"),
    ]
    assert model.unused[0] is unused  # not the copy that was there to be seen
    assert model.block is model.again
    assert model(x).shape == (1, 4, 24, 24)


def test_modules_are_as_they_were_after_an_error():
    model = SharedLayers()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(RuntimeError):
        replace_upsampling(model, torch.randn(1, 2, 2, 2))
    with pytest.raises(ValueError, match="up_kernel must be odd, got 4"):
        replace_upsampling(model, torch.randn(1, 3, 2, 2), up_kernel=4)
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_a_shared_layer_is_excluded_by_one_of_its_names():
    model = SharedLayers()
    up = model.first[1]
    report = replace_upsampling(model, torch.randn(1, 3, 2, 2), exclude=["second.*", "unused.*"])
    assert [name for name, *_ in report.changed] == ["first.1", "block.1"]
    assert model.second[1] is model.unused[0] is up


@pytest.mark.parametrize(
    ("packs", "error", "message"),
    [
        ([], ValueError, "packs must be at least one, got none"),
        ([nn.Identity()], TypeError, "packs must be several CARAFEPack, got Identity"),
        (
            [CARAFEPack(4, 2), CARAFEPack(4, 3)],
            ValueError,
            "packs must have different numbers of channels, got 4 twice",
        ),
    ],
)
def test_packs_refuse(packs, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        CARAFEPacks(packs)


def test_packs_refuse_other_channels():
    packs = CARAFEPacks([CARAFEPack(4, 2), CARAFEPack(8, 2)])
    with pytest.raises(ValueError, match=r"^x must have 4 or 8 channels, got shape \(1, 6, 3, 3\)$"):
        packs(torch.zeros(1, 6, 3, 3))
    with pytest.raises(ValueError, match=r"^x must have 4 dimensions \(N, C, H, W\), got shape \(4, 3, 3\)$"):
        packs(torch.zeros(4, 3, 3))
