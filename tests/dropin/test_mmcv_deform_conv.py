"""mmcv's deformable convolutions: torchvision's but for the offset's gradient at -1, and what is read as offset."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import EMPTY, assert_near, random_tensor
from torch import Tensor, nn

import omniops
from omniops.dropin import mmcv_ext

# Names and order of mmcv's arguments: vertical before horizontal in DCNv2.
GEOMETRY = {"stride_h": 2, "stride_w": 1, "pad_h": 1, "pad_w": 2, "dilation_h": 1, "dilation_w": 2}
NUMBERS = ((2, 1), (1, 2), (1, 2))
TORCHVISION_GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def _deformable(modulated: bool) -> list[Tensor]:
    """input, offset, weight, bias, mask: 2 weight groups, 4 offset groups."""
    tensors = [
        random_tensor(3, 8, 7, 6),
        random_tensor(3, 4 * 2 * 6, 4, 8),
        random_tensor(6, 4, 3, 2),
        random_tensor(6),
        random_tensor(3, 4 * 6, 4, 8),
    ]
    return [tensor.requires_grad_() for tensor in (tensors if modulated else tensors[:3])]


def test_deform_conv():
    tv = pytest.importorskip("torchvision").ops
    input, offset, weight = _deformable(modulated=False)
    expected = tv.deform_conv2d(input, offset, weight, **TORCHVISION_GEOMETRY)
    grad = random_tensor(*expected.shape, seed=2)
    by_input, by_offset, by_weight = torch.autograd.grad(expected, (input, offset, weight), grad)

    numbers = {"kW": 2, "kH": 3, "dW": 1, "dH": 2, "padW": 2, "padH": 1, "dilationW": 2, "dilationH": 1}
    numbers |= {"group": 2, "deformable_group": 4, "im2col_step": 1}
    output, grads = torch.empty_like(expected), [torch.zeros_like(tensor) for tensor in (input, offset, weight)]
    mmcv_ext.deform_conv_forward(input, weight, offset, output, EMPTY, EMPTY, **numbers)
    mmcv_ext.deform_conv_backward_input(input, offset, grad, *grads[:2], weight, EMPTY, **numbers)
    for _ in range(2):  # it adds
        mmcv_ext.deform_conv_backward_parameters(input, offset, grad, grads[2], EMPTY, EMPTY, **numbers, scale=0.5)
    for actual, wanted in zip((output, *grads), (expected, by_input, by_offset, by_weight), strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deform_conv(with_bias):
    tv = pytest.importorskip("torchvision").ops
    input, offset, weight, bias, mask = tensors = _deformable(modulated=True)
    expected = tv.deform_conv2d(input, offset, weight, bias if with_bias else None, mask=mask, **TORCHVISION_GEOMETRY)
    grad = random_tensor(*expected.shape, seed=2)
    computed = torch.autograd.grad(expected, tensors, grad, allow_unused=True, materialize_grads=True)

    numbers = {"kernel_h": 3, "kernel_w": 2, "stride_h": 2, "stride_w": 1, "pad_h": 1, "pad_w": 2}
    numbers |= {"dilation_h": 1, "dilation_w": 2, "group": 2, "deformable_group": 4, "with_bias": with_bias}
    output = torch.empty_like(expected)
    by_input, by_offset, by_weight, by_bias, by_mask = grads = [torch.zeros_like(tensor) for tensor in tensors]
    mmcv_ext.modulated_deform_conv_forward(input, weight, bias, EMPTY, offset, mask, output, EMPTY, **numbers)
    arguments = (input, weight, bias, EMPTY, offset, mask, EMPTY)
    mmcv_ext.modulated_deform_conv_backward(
        *arguments, by_input, by_weight, by_bias, by_offset, by_mask, grad, **numbers
    )
    for actual, wanted in zip((output, *grads), (expected, *computed), strict=True):
        assert_near(actual, wanted)


def _formula(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, numbers=NUMBERS) -> Tensor:
    """mmcv's, tap by tap: 0, and without a slope, at -1 and below and at the size and above."""
    c, h, w, kh, kw = *input.shape[1:], *weight.shape[2:]
    (stride_y, stride_x), (pad_y, pad_x), (dilation_y, dilation_x) = numbers
    deform_groups = mask.shape[1] // (kh * kw)
    per_group = c // deform_groups
    padded = F.pad(input, (2, 2, 2, 2)).flatten(2)
    columns = []
    for group, (u, v) in itertools.product(range(deform_groups), itertools.product(range(kh), range(kw))):
        tap = (group * kh + u) * kw + v
        y = offset[:, 2 * tap] + torch.arange(offset.shape[2])[:, None] * stride_y - pad_y + u * dilation_y
        x = offset[:, 2 * tap + 1] + torch.arange(offset.shape[3]) * stride_x - pad_x + v * dilation_x
        inside = (y > -1) & (y < h) & (x > -1) & (x < w)
        top, left = (values.detach().clamp(-2, size).floor() for values, size in ((y, h), (x, w)))
        sample = 0
        rows = (top, top + 1 - y), (top + 1, y - top)
        neighbours = (left, left + 1 - x), (left + 1, x - left)
        for (row, share_y), (column, share_x) in itertools.product(rows, neighbours):
            share = share_y * share_x
            index = ((row + 2) * (w + 4) + column + 2).long().flatten(1)
            pixels = padded[:, group * per_group : (group + 1) * per_group]
            pixels = pixels.gather(2, index[:, None].expand(-1, per_group, -1)).unflatten(2, y.shape[1:])
            sample = sample + share[:, None] * pixels
        columns.append(torch.where(inside[:, None], sample, 0) * mask[:, tap, None])
    columns = torch.stack(columns, 1).unflatten(1, (deform_groups, kh * kw)).transpose(2, 3).flatten(1, 2)
    groups = c // weight.shape[1]
    return torch.einsum(
        "goct,ngcthw->ngohw",
        weight.flatten(2).unflatten(0, (groups, -1)),
        columns.unflatten(1, (groups, -1)),
    ).flatten(1, 2)


def _forward(input, offset, mask, weight, groups=2, deform_groups=2):
    sizes = [
        (input.shape[2 + i] + 2 * NUMBERS[1][i] - NUMBERS[2][i] * (weight.shape[2 + i] - 1) - 1) // NUMBERS[0][i] + 1
        for i in (0, 1)
    ]
    output = input.new_empty(len(input), len(weight), *sizes)
    kernel = {"kernel_h": weight.shape[2], "kernel_w": weight.shape[3]}
    kernel |= {**GEOMETRY, "group": groups, "deformable_group": deform_groups, "with_bias": False}
    mmcv_ext.modulated_deform_conv_forward(input, weight, EMPTY, EMPTY, offset, mask, output, EMPTY, **kernel)
    return output, kernel


def _forward_backward(input, offset, mask, weight, grad, groups=2, deform_groups=2):
    output, kernel = _forward(input, offset, mask, weight, groups, deform_groups)
    by_input, by_offset, by_mask, by_weight = (torch.zeros_like(tensor) for tensor in (input, offset, mask, weight))
    arguments = (input, weight, EMPTY, EMPTY, offset, mask, EMPTY, by_input, by_weight, EMPTY, by_offset, by_mask, grad)
    mmcv_ext.modulated_deform_conv_backward(*arguments, **kernel)
    return output, by_input, by_offset, by_mask, by_weight


def _expected(input, offset, mask, weight, grad):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (input, offset, mask, weight)]
    output = _formula(tensors[0], tensors[1], tensors[3], tensors[2])
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


def _problem(spread: float):
    """Offsets in quarters of pixels, so that many positions are whole and at the borders: -1, 0, size - 1 and size."""
    input, weight = random_tensor(3, 8, 5, 6), random_tensor(6, 4, 3, 2, seed=1)
    offset = (random_tensor(3, 2 * 2 * 6, 3, 8, seed=2) * spread * 4).round() / 4
    return input, offset, random_tensor(3, 2 * 6, 3, 8, seed=3), weight, random_tensor(3, 6, 3, 8, seed=4)


@pytest.mark.parametrize("spread", [0, 0.5, 2, 8])
def test_modulated_convolution_is_mmcvs_formula(spread):
    problem = _problem(spread)
    for actual, wanted in zip(_forward_backward(*problem), _expected(*problem), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spread", [0, 0.5, 2, 8])
@pytest.mark.parametrize("im2col_step", [1, 3])
def test_plain_convolution_is_mmcvs_formula(spread, im2col_step):
    input, offset, mask, weight, grad = _problem(spread)
    output, by_input, by_offset, _, by_weight = _expected(input, offset, torch.ones_like(mask), weight, grad)
    numbers = {"kW": 2, "kH": 3, "dW": 1, "dH": 2, "padW": 2, "padH": 1, "dilationW": 2, "dilationH": 1}
    numbers |= {"group": 2, "deformable_group": 2, "im2col_step": im2col_step}
    found, grads = torch.empty_like(output), [torch.zeros_like(tensor) for tensor in (input, offset, weight)]
    mmcv_ext.deform_conv_forward(input, weight, offset, found, EMPTY, EMPTY, **numbers)
    mmcv_ext.deform_conv_backward_input(input, offset, grad, *grads[:2], weight, EMPTY, **numbers)
    mmcv_ext.deform_conv_backward_parameters(input, offset, grad, grads[2], EMPTY, EMPTY, **numbers, scale=1.0)
    for actual, wanted in zip((found, *grads), (output, by_input, by_offset, by_weight), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_minus_one_the_offset_has_no_gradient_through_mmcv_alone(dtype):
    input, offset, mask = (torch.ones(shape, dtype=dtype) for shape in ((1, 2, 4, 4), (1, 18, 4, 4), (1, 9, 4, 4)))
    weight, output, grads = torch.ones(3, 2, 3, 3, dtype=dtype), torch.ones(1, 3, 4, 4, dtype=dtype), {}
    offset.zero_()
    numbers = dict.fromkeys(("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group"), 1)
    numbers |= {"kernel_h": 3, "kernel_w": 3, "deformable_group": 1, "with_bias": False}
    for name, tensor in (("input", input), ("weight", weight), ("bias", EMPTY), ("offset", offset), ("mask", mask)):
        grads[f"grad_{name}"] = torch.zeros_like(tensor)
    arguments = (input, weight, EMPTY, EMPTY, offset, mask, EMPTY)
    mmcv_ext.modulated_deform_conv_backward(*arguments, **grads, grad_output=output, **numbers)
    assert grads["grad_offset"][0, 0, 0].tolist() == [0, 0, 0, 0]

    offset = offset.float().requires_grad_()
    omniops.deform_conv2d(input.float(), offset, weight[:1].float(), padding=1).sum().backward()
    assert (offset.grad[0, 0, 0] != 0).tolist() == [False, True, True, True]  # torchvision's


# What is read as offset and mask


def _first_numbers(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first numbers of each sample, one sample after the other."""
    count = torch.Size(shape).numel()
    return torch.stack([sample.reshape(-1)[:count].reshape(shape) for sample in tensor])


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(
    ("batch", "extra", "size"), [(3, 0, (5, 9)), (3, 0, (2, 20)), (3, 12, (3, 8)), (4, 0, (3, 8)), (5, 1, (6, 7))]
)
def test_larger_offsets_and_masks_are_read_as_flat_memory(sliced, batch, extra, size):
    input, _, _, weight, grad = _problem(1)
    joint = random_tensor(batch, 3 * 12 + 2 * extra, *size, seed=5)
    if sliced:  # as DyHead cuts them out of one convolution's result
        offset, mask = joint[:, : 24 + extra], joint[:, 24 + extra :]
        assert not offset.is_contiguous()
    else:
        offset, mask = joint[:, : 24 + extra].contiguous(), joint[:, 24 + extra :].contiguous()
    taken = _first_numbers(offset, (24, 3, 8))[:3], _first_numbers(mask, (12, 3, 8))[:3]
    expected = list(_expected(input, *taken, weight, grad))
    for index, flat in ((2, offset), (3, mask)):
        samples = torch.zeros(flat.flatten(1).shape, dtype=torch.float64)
        samples[:3, : expected[index][0].numel()] = expected[index].flatten(1)
        expected[index] = samples.view(flat.shape)
    for actual, wanted in zip(_forward_backward(input, offset, mask, weight, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_an_offset_that_is_nan_shows_in_the_result():
    input, offset, mask, weight, _ = _problem(1)
    offset[1, 0, 2, 3] = torch.nan
    output, _ = _forward(input, offset, mask, weight)
    assert output.isnan().any(1).nonzero().tolist() == [[1, 2, 3]]


def test_an_offset_of_another_memory_layout_is_read_in_order():
    input, _, mask, weight, _ = _problem(1)
    offset = random_tensor(3, 24, 5, 9)
    expected, _ = _forward(input, offset, mask, weight)
    found, _ = _forward(input, offset.contiguous(memory_format=torch.channels_last), mask, weight)
    assert found.equal(expected)


def test_of_an_empty_batch_nothing_is_read():
    input, offset, mask, weight, grad = _problem(1)
    results = _forward_backward(input[:0], offset.repeat(1, 1, 2, 1)[:0], mask[:0], weight, grad[:0])
    assert [len(result) for result in results[:4]] == [0, 0, 0, 0]
    assert not results[4].any()


def test_what_is_too_small_or_of_other_channels_is_refused_by_name():
    input, offset, mask, weight, grad = _problem(1)
    for name, wrong in (("offset", offset[:, :, :2]), ("offset", offset[:2]), ("mask", mask[..., :7])):
        pair = (wrong, mask) if name == "offset" else (offset, wrong)
        with pytest.raises(ValueError, match=f"^{name} must have at least the numbers of shape"):
            _forward(input, *pair, weight)
        with pytest.raises(ValueError, match=f"^{name} must have at least the numbers of shape"):
            _forward_backward(input, *pair, weight, grad)
    with pytest.raises(ValueError, match=r"^input must have 8 channels, those of weight in 2 groups, got 16$"):
        _forward(input.repeat(1, 2, 1, 1), offset, mask, weight)


def test_plain_convolution_takes_no_other_shape():
    input, offset, _, weight, grad = _problem(1)
    numbers = {"kW": 2, "kH": 3, "dW": 1, "dH": 2, "padW": 2, "padH": 1, "dilationW": 2, "dilationH": 1}
    numbers |= {"group": 2, "deformable_group": 2, "im2col_step": 1}
    for wrong, message in (
        (offset.repeat(1, 1, 2, 1), "offset must have shape"),
        (offset[:2], "offset must have shape"),
        (offset.repeat(1, 2, 1, 1), "offset must have 24 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            mmcv_ext.deform_conv_forward(input, weight, wrong, torch.empty_like(grad), EMPTY, EMPTY, **numbers)
    with pytest.raises(ValueError, match="input must have 8 channels"):
        mmcv_ext.deform_conv_forward(
            input.repeat(1, 2, 1, 1), weight, offset, torch.empty_like(grad), EMPTY, EMPTY, **numbers
        )


# The real mmcv-lite and MMDetection


def test_mmcvs_module_reads_a_larger_offset(mmcv):
    layer = mmcv.ModulatedDeformConv2d(8, 16, 3, padding=1).double()
    x, offset, mask = random_tensor(1, 8, 10, 10), random_tensor(1, 18, 20, 20), random_tensor(1, 9, 20, 20)
    offset.requires_grad_()
    found = layer(x, offset, mask)
    cut = offset.reshape(4, 18, 10, 10)[:1], mask.reshape(4, 9, 10, 10)[:1]
    assert found.equal(layer(x, *cut))
    (grad,) = torch.autograd.grad(found.square().sum(), offset, retain_graph=True)
    (wanted,) = torch.autograd.grad(layer(x, *cut).square().sum(), offset)
    assert grad.equal(wanted)
    assert grad.any()


def test_mmcvs_functions_have_mmcvs_gradient_at_the_border(mmcv):
    for modulated in (False, True):
        offset = torch.zeros(1, 18, 4, 4, requires_grad=True)
        x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
        if modulated:
            result = mmcv.modulated_deform_conv2d(x, offset, torch.ones(1, 9, 4, 4), weight, None, 1, 1)
        else:
            result = mmcv.deform_conv2d(x, offset, weight, 1, 1)
        result.sum().backward()
        assert offset.grad[0, 0, 0].tolist() == [0, 0, 0, 0]
        assert offset.grad.any()


class _Cut(nn.Module):
    """mmcv's layer, given of offset and mask what it reads."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        size = [(side - 1) // self.layer.stride[0] + 1 for side in x.shape[2:]]
        return self.layer(x, _first_numbers(offset, (18, *size)), _first_numbers(mask, (9, *size)))


def _dyhead():
    """The neck of DyHead, and the maps that it takes."""
    necks = importlib.import_module("mmdet.models.necks.dyhead")
    return necks.DyHead(16, 16, num_blocks=2), lambda maps: maps


def _glip():
    """GLIP's dynamic convolution, which takes its maps beside those of the language."""
    heads = importlib.import_module("mmdet.models.dense_heads.atss_vlfusion_head")
    layer = heads.DyConv(
        lambda i, o, s: heads.Conv3x3Norm(i, o, s, use_dcn=True, norm_type=["gn", 16]), 16, 16, use_dcn=True
    )
    return layer, lambda maps: {"visual": maps, "lang": None}


@pytest.mark.parametrize("family", [_dyhead, _glip])
def test_dyhead_and_glip_predict_and_learn(mmcv, family):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    torch.manual_seed(0)
    model, make_inputs = family()
    for module in model.modules():  # which start with offsets of nearly nothing
        if isinstance(module, nn.Conv2d) and module.out_channels == 27:
            nn.init.normal_(module.weight, std=0.1)
    maps = [torch.randn(2, 16, *size) for size in ((13, 17), (7, 9), (4, 5))]
    outputs, grads = [], []
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        found = model(make_inputs(maps))
        found = found["visual"] if isinstance(found, dict) else found
        sum(output.square().sum() for output in found).backward()
        outputs.append(found)
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, mmcv.ModulatedDeformConv2d) and not isinstance(parent, _Cut):
                    setattr(parent, name, _Cut(child))
    for ours, wanted in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
