"""Every module compiled and traced by torch.jit: results and gradients as Python's, at other sizes too."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torchscripts import IGNORED, assert_alike, assert_as_eager, tensors_of

import omniops
from omniops.nn import (
    CARAFE,
    CARAFEDownsamplePack,
    CARAFENaive,
    CARAFEPack,
    CARAFEPacks,
    DeformConv2d,
    DeformConv2dPack,
    FPNCarafe,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    PAFPNCarafe,
)

pytestmark = pytest.mark.filterwarnings(*IGNORED)

SIZES = ((2, 6, 4), (1, 5, 7), (3, 4, 9))
"""N, H and W of the calls."""


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator).requires_grad_() for shape in shapes)


def one_map(n, h, w):
    return tensors((n, 4, h, w))


def map_and_masks(n, h, w):
    return tensors((n, 4, h, w), (n, 9, 2 * h, 2 * w))


def map_and_offset(n, h, w):
    return tensors((n, 4, h, w), (n, 18, h, w))


def map_offset_and_mask(n, h, w):
    return tensors((n, 4, h, w), (n, 18, h, w), (n, 9, h, w))


def attention_to_tensors(n, h, w):
    """With reference points, the sizes in a tensor."""
    query, value, reference_points = tensors((n, 5, 8), (n, h * w + 2, 8), (n, 5, 2, 2))
    sizes = torch.tensor([[h, w], [1, 2]])
    return query, None, value, None, None, None, reference_points, sizes


def attention_to_boxes(n, h, w):
    """With all that the module takes, the sizes in a list."""
    query, value, identity, position, boxes = tensors((n, 5, 8), (n, h * w + 2, 8), (n, 5, 8), (n, 5, 8), (n, 5, 2, 4))
    return query, None, value, identity, position, value[..., 0] > 0.9, boxes, [(h, w), (1, 2)]


def attention_across(n, h, w):
    """Without ``batch_first``."""
    return [x.transpose(0, 1) if i in (0, 2) else x for i, x in enumerate(attention_to_tensors(n, h, w))]


def maps(n, h, w):
    fine, coarse, top = tensors((n, 4, 2 * h, 2 * w), (n, 6, h, w), (n, 6, h // 2, w // 2))
    return {"fine": fine, "coarse": coarse, "top": top}


def without_predictor():
    module = ModulatedDeformConv2d(4, 6, 3, padding=1)
    module.conv_offset = None
    return module


class Last(nn.Module):
    """As torchvision's LastLevelMaxPool, which need not be here."""

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        names.append("pool")
        x.append(x[-1][:, :, ::2, ::2])
        return x, names


class Detector(nn.Module):
    """A module of the user's, with sizes that are those of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0, batch_first=True)
        self.upsample = CARAFEPacks([CARAFEPack(4, 2, compressed_channels=2), CARAFEPack(8, 2, compressed_channels=2)])
        self.neck = FPNCarafe([4, 6], 4)

    def forward(self, x: Tensor, query: Tensor, reference_points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fine, coarse = self.upsample(x), torch.cat([x, x], 1)
        value = torch.cat([fine.flatten(2).repeat(1, 2, 1), coarse.flatten(2)], 2).transpose(1, 2)
        sizes = [(fine.shape[2], fine.shape[3]), (coarse.shape[2], coarse.shape[3])]
        attended = self.attention(query, value=value, reference_points=reference_points, spatial_shapes=sizes)
        return attended, self.neck({"fine": fine, "coarse": coarse[:, :6]})


def map_and_queries(n, h, w):
    return tensors((n, 4, h, w), (n, 5, 8), (n, 5, 2, 2))


NORMALIZED = {"norm_layer": nn.BatchNorm2d, "activation_layer": nn.ReLU}
CASES = {
    "CARAFE": (lambda: CARAFE(3, 1, 2), map_and_masks),
    "CARAFENaive": (lambda: CARAFENaive(3, 1, 2), map_and_masks),
    "CARAFEPack": (lambda: CARAFEPack(4, 2, up_group=2, compressed_channels=2), one_map),
    "CARAFEPacks": (lambda: CARAFEPacks([CARAFEPack(c, 2, compressed_channels=2) for c in (6, 4)]), one_map),
    "CARAFEDownsamplePack": (lambda: CARAFEDownsamplePack(4, 2, compressed_channels=2), one_map),
    "DeformConv2d": (lambda: DeformConv2d(4, 6, 3, padding=1, groups=2), map_and_offset),
    "DeformConv2d, mask": (lambda: DeformConv2d(4, 6, 3, padding="same", bias=False), map_offset_and_mask),
    "DeformConv2dPack": (lambda: DeformConv2dPack(4, 6, 3, stride=(2, 1), padding=1), one_map),
    "ModulatedDeformConv2d": (lambda: ModulatedDeformConv2d(4, 6, 3, padding="same"), one_map),
    "ModulatedDeformConv2d, given": (without_predictor, map_offset_and_mask),
    "ModulatedDeformConv2dPack": (lambda: ModulatedDeformConv2dPack(4, 6, 3, padding=1, offset_groups=2), one_map),
    "MultiScaleDeformableAttention": (
        lambda: MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0, batch_first=True), attention_to_tensors,
    ),
    "MultiScaleDeformableAttention, boxes": (
        lambda: MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0, batch_first=True), attention_to_boxes,
    ),
    "MultiScaleDeformableAttention, queries first": (
        lambda: MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0), attention_across,
    ),
    "FPNCarafe": (lambda: FPNCarafe([4, 6, 6], 4, num_outs=4), maps),
    "FPNCarafe, part": (lambda: FPNCarafe([4, 6, 6], 4, start_level=1, extra_blocks=Last(), **NORMALIZED), maps),
    "PAFPNCarafe": (lambda: PAFPNCarafe([4, 6, 6], 4, num_outs=5), maps),
    "PAFPNCarafe, one level": (lambda: PAFPNCarafe([4, 6, 6], 4, start_level=2), maps),
    "a user's": (Detector, map_and_queries),
}  # fmt: skip
"""How each module is made, and its arguments; in a name the class stands first."""
NO_MODULES = {"UpsamplingReport", "replace_upsampling"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "PAFPNCarafe" else ()) for name in CASES]
DTYPES = (torch.float32, torch.float16)


def case(name, dtype):
    """A module with random parameters, and the arguments of calls."""
    make, arguments = CASES[name]
    generator = torch.Generator().manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval().to(dtype), [_to(arguments(*size), dtype) for size in SIZES]


def _to(value, dtype):
    if isinstance(value, dict):
        return [{name: _to(x, dtype) for name, x in value.items()}]
    if isinstance(value, (tuple, list)) and not isinstance(value[0], tuple):
        return [_to(x, dtype) for x in value]
    return value.detach().to(dtype).requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value


def test_every_module_is_among_them():
    public = {*omniops.nn.__all__, *omniops.__all__}
    modules = {name for name in public if inspect.isclass(getattr(omniops.nn, name, None))}
    assert modules - NO_MODULES == {name.partition(",")[0] for name in CASES} - {"a user's"}
    assert NO_MODULES | modules == {*omniops.nn.__all__}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_script(name, dtype):
    module, calls = case(name, dtype)
    assert_as_eager(torch.jit.script(module), module, calls, dict(module.named_parameters()))


class OfTensors(nn.Module):
    """A module as a function of the tensors among its arguments: what a trace has."""

    def __init__(self, module, args):
        super().__init__()
        self.module, self.args = module, args

    def forward(self, *tensors):
        given = iter(tensors)
        return tensors_of(self.module(*[_filled(arg, given) for arg in self.args]))


def _filled(arg, tensors):
    if isinstance(arg, dict):
        return {name: next(tensors) for name in arg}
    return arg if arg is None else next(tensors)


def _traceable(args):
    """The arguments with the sizes of levels in a tensor: a trace keeps numbers for good."""
    return [torch.tensor(arg) if isinstance(arg, list) else arg for arg in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_trace(name, dtype):
    module, calls = case(name, dtype)
    module, calls = OfTensors(module, calls[0]), [tensors_of(_traceable(args)) for args in calls]
    assert_as_eager(torch.jit.trace(module, calls[0]), module, calls, dict(module.named_parameters()))


def test_a_trace_takes_lists_of_maps():
    neck, calls = case("FPNCarafe", torch.float32)
    calls = [[list(named.values())] for (named,) in calls]
    traced = torch.jit.trace(neck, (calls[0][0],))
    assert_alike([traced], neck, calls)


def test_script_and_trace_leave_a_module_as_it_was():
    module, calls = case("a user's", torch.float32)
    before = copy.deepcopy(module)
    torch.jit.script(module)
    torch.jit.trace(OfTensors(module, calls[0]), tuple(calls[0]))
    assert repr(module) == repr(before)
    assert_alike([module], before, calls, dict(before.named_parameters()))


def test_forward_has_the_signature_of_python():
    """Not that of what TorchScript compiles in its place."""
    assert list(inspect.signature(MultiScaleDeformableAttention.forward).parameters)[-1] == "kwargs"
    assert "Mapping" in str(inspect.signature(FPNCarafe([4], 4).forward))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("CARAFEPack", lambda args: [args[0][0]], "must have 4 dimensions"),
        ("CARAFEPacks", lambda args: [args[0][:, :3]], "x must have 6 or 4 channels, got shape"),
        ("FPNCarafe", lambda args: [{"fine": args[0]["fine"]}], "x must have 3 maps, as in_channels has, got 1"),
        (
            "FPNCarafe", lambda args: [{**args[0], "coarse": args[0]["fine"]}],
            r"x\['coarse'\] must have shape \(N, 6, H, W\), got",
        ),
        ("ModulatedDeformConv2d", lambda args: [args[0], args[0]], "mask must be a torch.Tensor, got NoneType"),
        ("ModulatedDeformConv2d, given", lambda args: args[:1], "x alone needs conv_offset, which is None here"),
        ("MultiScaleDeformableAttention", lambda args: args[:-1], "reference_points and spatial_shapes must be given"),
        (
            "MultiScaleDeformableAttention", lambda args: [*args[:-1], args[-1][:1]],
            "spatial_shapes must have num_levels = 2 rows, got 1",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(name, change, message):
    """Raised as TorchScript raises all errors, with the words of the check."""
    module, (args, *_) = case(name, torch.float32)
    with pytest.raises((RuntimeError, torch.jit.Error), match=message):
        torch.jit.script(module)(*change(args))


@pytest.mark.slow
def test_files_in_another_process(tmp_path):
    """Which has imported omniops, and nothing of the modules."""
    for index, name in enumerate(CASES):
        module, calls = case(name, torch.float32)
        torch.jit.script(module).save(tmp_path / f"{index}.pt")
        torch.save((calls, [tensors_of(module(*args)) for args in calls]), tmp_path / f"{index}.results")
    program = """
import sys, warnings
from pathlib import Path
import torch
import omniops

warnings.simplefilter("ignore")
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    module, (calls, expected) = torch.jit.load(file), torch.load(file.with_suffix(".results"))
    for args, results in zip(calls, expected):
        found = module(*args)
        found = found if isinstance(found, tuple) else (found,)
        found = [x for one in found for x in (one.values() if isinstance(one, dict) else [one])]
        assert all(map(torch.equal, found, results)) and len(found) == len(results), file
    print(file.stem)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(CASES)
