"""The operators, the modules made of them and the detectors on the pretended MPS device, at the sizes of real networks.

What PyTorch's operators are given between the Metal kernels is held to the rules of mps_rules.py. Gradients run on the
device "meta", which counts as MPS here: autograd does not know the pretended one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from mps_device import mps_device
from mps_rules import RuleError
from torch import Tensor

import omniops
from omniops import nn
from omniops.backends import prepared
from omniops.backends.mps import deform_conv2d as metal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture
def rules() -> Iterator[torch.device]:
    with mps_device(values=False) as device:
        yield device


def leaf(*shape: int, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout).requires_grad_()


def differentiate(result: Tensor, *leaves: Tensor) -> None:
    for gradient, leaf in zip(torch.autograd.grad(result.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype


@pytest.mark.parametrize("shape", [(2, 256, 100, 152), (1, 256, 64, 64), (8, 256, 64, 64)])
@dtypes
@layouts
def test_carafe(rules, shape, dtype, layout):
    n, c, h, w = shape
    features = leaf(n, c, h, w, dtype=dtype, layout=layout)
    masks = leaf(n, 25, 2 * h, 2 * w, dtype=dtype, layout=layout)
    differentiate(omniops.carafe(features, masks, 5, 1, 2), features, masks)
    masks = leaf(n, 25, h // 2, w // 2, dtype=dtype, layout=layout)
    differentiate(omniops.carafe_downsample(features, masks, 5, 1, 2), features, masks)


# Those of docs/metal.md and of real networks: N, C, H, W, C_out, offset groups, weight groups.
DEFORMABLE = [
    (2, 256, 100, 152, 256, 1, 1),
    (8, 64, 128, 128, 64, 1, 1),
    (1, 64, 180, 320, 64, 16, 1),
    (8, 128, 80, 80, 128, 1, 1),
    (1, 32, 256, 256, 32, 1, 1),
    (4, 512, 32, 32, 512, 4, 1),
    (2, 1024, 50, 76, 1024, 1, 32),
]


def deformable(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
    """Input, offset, mask, weight and bias."""
    n, c, h, w, c_out, offset_groups, groups = shape
    return (
        leaf(n, c, h, w, dtype=dtype, layout=layout),
        leaf(n, offset_groups * 18, h, w, dtype=dtype),
        leaf(n, offset_groups * 9, h, w, dtype=dtype),
        leaf(c_out, c // groups, 3, 3, dtype=dtype),
        leaf(c_out, dtype=dtype),
    )


@pytest.mark.parametrize("shape", DEFORMABLE)
@dtypes
@layouts
def test_deform_conv2d(rules, shape, dtype, layout):
    input, offset, mask, weight, bias = deformable(shape, dtype, layout)
    result = omniops.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
    differentiate(result, input, offset, weight, bias, mask)


@pytest.mark.parametrize(
    ("fields", "shape", "fault"),
    [
        ({"longest_sum": None, "max_bytes": 2**27}, (8, 64, 128, 128, 64, 1, 1), "a large side of a product"),
        ({"longest_sum": 32768, "max_bytes": 2**27}, (1, 32, 256, 256, 32, 1, 1), "a long reduction"),
        ({"longest_sum": None}, (2, 4096, 25, 38, 32, 1, 1), "a long reduction"),
        ({"products_of_views": True}, (2, 256, 100, 152, 256, 1, 1), "a result that is a view"),
        ({"check": lambda *_: None}, (40, 64, 1024, 1024, 64, 1, 1), "more elements than MPS can address"),
    ],
)
def test_a_planted_fault_of_deform_conv2d_is_found(rules, fields, shape, fault):
    columns, numbers = replace(metal._COLUMNS, **fields), ((1, 1),) * 3
    input, offset, mask, weight, bias = deformable(shape, torch.float32, torch.channels_last)

    @torch.no_grad()
    def run() -> None:
        out = prepared(columns.forward)(input, offset, weight, bias, mask, *numbers)
        prepared(columns.backward)(out, input, offset, weight, mask, *numbers, [True] * 5)

    with pytest.raises(RuleError, match=f": {fault}: "):
        run()


# The levels of 800 x 1066 pixels in Deformable DETR.
LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
PIXELS = sum(h * w for h, w in LEVELS)


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("queries", [PIXELS, 300])
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 points"])
@dtypes
def test_multi_scale_deform_attn(rules, queries, method, dtype, wide):
    points_dtype = torch.float32 if wide else dtype
    value = leaf(2, PIXELS, 8, 32, dtype=dtype)
    locations, weights = leaf(2, queries, 8, 4, 4, 2, dtype=points_dtype), leaf(2, queries, 8, 4, 4, dtype=points_dtype)
    result = omniops.multi_scale_deform_attn(value, torch.tensor(LEVELS), locations, weights, method=method)
    assert result.shape == (2, queries, 256)
    differentiate(result, value, locations, weights)


def test_second_derivatives(rules):
    """Those of deformable convolution and attention are plain PyTorch's, of several images and of one."""
    small = (2, 16, 20, 24, 16, 1, 1), (2, 16, 20, 24, 16, 2, 2), (1, 8, 9, 9, 8, 1, 1)
    cases = [
        (lambda input, offset, mask, *others: omniops.deform_conv2d(input, offset, *others, 1, 1, 1, mask), tensors)
        for tensors in (deformable(shape, torch.float32, torch.contiguous_format) for shape in small)
    ]
    attention = (
        leaf(*shape, dtype=torch.float32) for shape in ((2, PIXELS, 8, 32), (2, 30, 8, 4, 4, 2), (2, 30, 8, 4, 4))
    )
    upsampling = (leaf(*shape, dtype=torch.float32) for shape in ((1, 256, 64, 64), (1, 25, 128, 128)))
    cases.append((lambda value, *points: omniops.multi_scale_deform_attn(value, LEVELS, *points), tuple(attention)))
    cases.append((lambda *tensors: omniops.carafe(*tensors, 5, 1, 2), tuple(upsampling)))
    for function, leaves in cases:
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)
        assert [x.shape for x in second] == [x.shape for x in leaves]


def test_transforms_of_torch_func(rules):
    """Gradients of each sample, also by what all of them share, and forward mode by what is linear or an offset.

    Forward mode through plain PyTorch cannot run here: on the device "meta" PyTorch makes zeros of float64 for it.
    """
    attention = LEVELS[2:], sum(height * width for height, width in LEVELS[2:])
    input, offset, mask, weight, bias = (x.detach() for x in deformable(DEFORMABLE[2], torch.float32, LAYOUTS[0]))
    for function, leaves, shared, forward in (
        (
            lambda features, masks: omniops.carafe(features, masks, 5, 1, 2),
            (leaf(1, 256, 64, 64, dtype=torch.float16), leaf(1, 25, 128, 128, dtype=torch.float16)),
            (),
            (0, 1),
        ),
        (
            lambda input, offset, weight, bias, mask: omniops.deform_conv2d(input, offset, weight, bias, 1, 1, 1, mask),
            (input, offset, weight, bias, mask),
            (2, 3),
            (0, 1, 2, 3, 4),
        ),
        (
            lambda *tensors: omniops.multi_scale_deform_attn(tensors[0], attention[0], *tensors[1:]),
            (
                leaf(1, attention[1], 8, 32, dtype=torch.float32),
                leaf(1, 300, 8, 2, 4, 2, dtype=torch.float32),
                leaf(1, 300, 8, 2, 4, dtype=torch.float32),
            ),
            (),
            (0, 2),
        ),
    ):
        plain = [x.detach() for x in leaves]
        positions = tuple(range(len(plain)))
        gradients = torch.func.grad(lambda *tensors, function=function: function(*tensors).sum(), positions)
        in_dims = tuple(None if i in shared else 0 for i in positions)
        for dims in (in_dims, (0,) * len(plain)):
            batch = [x if dim is None else x.expand(3, *x.shape) for x, dim in zip(plain, dims, strict=True)]
            for found, x in zip(torch.vmap(gradients, dims)(*batch), plain, strict=True):
                assert (found.shape, found.dtype) == ((3, *x.shape), x.dtype)
        for i in forward:

            def by_one(x, i=i, function=function, plain=plain):
                return function(*plain[:i], x, *plain[i + 1 :])

            result, tangent = torch.func.jvp(by_one, (plain[i],), (plain[i],))
            assert (tangent.shape, tangent.dtype) == (result.shape, result.dtype)


def test_multi_scale_deform_attn_with_points_of_each_level(rules):
    # Of transposed tensors, as models have them, and one gradient at a time.
    value = leaf(2, 8, 32, PIXELS, dtype=torch.float16)
    locations, weights = leaf(2, 8, 300, 12, 2, dtype=torch.float32), leaf(2, 8, 300, 12, dtype=torch.float16)
    for leaves in ((value,), (locations,), (weights,), (value, locations, weights)):
        result = omniops.multi_scale_deform_attn(
            value.permute(0, 3, 1, 2), LEVELS, locations.transpose(1, 2), weights.transpose(1, 2), [3, 6, 0, 3]
        )
        differentiate(result, *leaves)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_multi_scale_deform_attn_computes_as_on_the_cpu(method):
    generator = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.rand(shape, generator=generator) for shape in ((2, 39, 2, 16), (2, 7, 2, 2, 3, 2), (2, 7, 2, 2, 3))
    )
    shapes = torch.tensor([[5, 6], [3, 3]])
    expected = omniops.multi_scale_deform_attn(value, shapes, locations, weights, method=method)
    with mps_device(values=True) as device:
        found = omniops.multi_scale_deform_attn(
            *(tensor.to(device) for tensor in (value, shapes, locations, weights)), method=method
        )
        half = omniops.multi_scale_deform_attn(
            value.half().to(device), shapes.to(device), locations.to(device), weights.half().to(device), method=method
        )
        assert half.dtype == torch.float16
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(half.cpu().float(), expected, rtol=4e-3, atol=4e-3)


def test_connected_components(rules):
    mask = torch.empty(3, 1, 1080, 1920, dtype=torch.bool, device=rules)
    labels, counts = omniops.connected_components(mask)
    assert labels.shape == counts.shape == mask.shape
    logits = torch.empty(64, 1, 256, 256, device=rules)
    assert omniops.fill_holes(logits, 8).shape == logits.shape
    assert omniops.remove_small_components(logits > 0, 8).dtype == torch.bool


MODULES = {
    "CARAFEPack": lambda: nn.CARAFEPack(256, scale_factor=2),
    "CARAFEDownsamplePack": lambda: nn.CARAFEDownsamplePack(256, stride=2),
    "DeformConv2dPack": lambda: nn.DeformConv2dPack(256, 256, 3, padding=1),
    "DeformConv2dPack, same, even": lambda: nn.DeformConv2dPack(256, 256, 4, padding="same"),
    "ModulatedDeformConv2d": lambda: nn.ModulatedDeformConv2d(256, 256, 3, padding=1),
    "ModulatedDeformConv2d, same, even": lambda: nn.ModulatedDeformConv2d(256, 256, (3, 2), padding="same"),
    "ModulatedDeformConv2dPack": lambda: nn.ModulatedDeformConv2dPack(256, 256, 3, padding=1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@layouts
def test_modules(rules, module, layout):
    made = module().to("meta")
    x = leaf(2, 256, 100, 152, dtype=torch.float32, layout=layout)
    differentiate(made(x), x, *made.parameters())
    with torch.inference_mode(), torch.autocast("mps", dtype=torch.float16):
        result = module().to(rules)(torch.empty(2, 256, 100, 152, device=rules, memory_format=layout))
    assert result.dtype == torch.float16


@layouts
def test_modulated_deform_conv2d_with_offset_and_mask(rules, layout):
    made = nn.ModulatedDeformConv2d(256, 256, 3, padding="same").to("meta")
    x = leaf(2, 256, 100, 152, dtype=torch.float32, layout=layout)
    offset, mask = leaf(2, 18, 100, 152, dtype=torch.float32), leaf(2, 9, 100, 152, dtype=torch.float32)
    differentiate(made(x, offset, mask), x, offset, mask, made.weight, made.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "autocast"])
def test_attention_to_several_levels(rules, dtype):
    def inputs(device):
        # One image: of two the gradient of the projection's weight is a sum over more rows than MPS gets right.
        query, value = (torch.empty(1, length, 256, device=device) for length in (300, PIXELS))
        return query, {"value": value, "reference_points": torch.empty(1, 300, 4, 2, device=device)}

    def build(device):
        return nn.MultiScaleDeformableAttention(batch_first=True).to(device)

    query, others = inputs("meta")
    made = build("meta")
    differentiate(made(query.requires_grad_(), **others, spatial_shapes=LEVELS), query, *made.parameters())
    query, others = inputs(rules)
    with torch.inference_mode(), torch.autocast("mps", dtype=torch.float16, enabled=dtype == torch.float16):
        assert build(rules)(query, **others, spatial_shapes=LEVELS).shape == (1, 300, 256)


@layouts
def test_one_upsample_at_several_levels(rules, layout):
    made = nn.CARAFEPacks([nn.CARAFEPack(channels, 2) for channels in (512, 256)]).to("meta")
    levels = [leaf(2, c, h, w, dtype=torch.float32, layout=layout) for c, h, w in ((512, 20, 20), (256, 40, 40))]
    differentiate(sum(made(x).sum() for x in levels), *levels, *made.parameters())


@pytest.mark.parametrize("neck", [nn.FPNCarafe, nn.PAFPNCarafe])
@layouts
def test_necks(rules, neck, layout):
    channels = [256, 512, 1024, 2048]
    sizes = [(200, 304), (100, 152), (50, 76), (25, 38)]
    made = neck(channels, 256, num_outs=5).to("meta")
    levels = [leaf(2, c, *size, dtype=torch.float32, layout=layout) for c, size in zip(channels, sizes, strict=True)]
    results = made(levels)
    differentiate(sum(result.sum() for result in results), *levels, *made.parameters())
    levels = [torch.empty(level.shape, device=rules, memory_format=layout) for level in levels]
    with torch.inference_mode(), torch.autocast("mps", dtype=torch.float16):
        assert {result.dtype for result in neck(channels, 256, num_outs=5).to(rules)(levels)} == {torch.float16}


detection = pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")
BUILDERS = [detection.faster_rcnn_resnet50_fpn_carafe, detection.mask_rcnn_resnet50_fpn_carafe]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "autocast"])
def test_detectors_detect(rules, build, dtype):
    model = build(num_classes=91, box_score_thresh=-1.0).to(rules).eval()
    pictures = [torch.empty(3, 800, 1333, device=rules), torch.empty(3, 640, 480, device=rules)]
    with torch.inference_mode(), torch.autocast("mps", dtype=dtype, enabled=dtype is not None):
        first, _ = model(pictures)
    assert len(first["boxes"]) == 2
    if "masks" in first:
        assert first["masks"].shape == (2, 1, 800, 1333)


@pytest.mark.parametrize("found", [0, 1])
@pytest.mark.parametrize("build", BUILDERS)
def test_detectors_that_find_little(rules, monkeypatch, build, found):
    monkeypatch.setattr("mps_device._TRUE", found)
    model = build(num_classes=91, box_score_thresh=-1.0).to(rules).eval()
    with torch.inference_mode():
        (first,) = model([torch.empty(3, 400, 600, device=rules)])
    assert len(first["boxes"]) == found
    assert first.get("masks", first["boxes"]).shape[0] == found


@pytest.mark.parametrize("build", BUILDERS)
def test_detectors_train(rules, build):
    model = build(num_classes=91).to("meta").train()
    target = {
        "boxes": torch.empty(5, 4, device="meta"),
        "labels": torch.empty(5, dtype=torch.int64, device="meta"),
        "masks": torch.empty(5, 800, 1216, dtype=torch.uint8, device="meta"),
    }
    losses = model([torch.empty(3, 800, 1216, device="meta")] * 2, [target, dict(target)])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
