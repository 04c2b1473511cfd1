"""The transforms of torch.func and forward mode, against torch.autograd and against loops."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from operator_calls import OperatorCalls
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import omniops
from omniops.backends.reference import deform_conv2d as reference


@dataclass
class Case:
    """An operator with tensors of the fewest numbers that tell its axes apart, in float64."""

    name: str
    function: Callable
    tensors: tuple
    shared: tuple = ()
    """The positions of those that the whole batch has in common."""

    def loss(self, *tensors):
        return self.function(*tensors).sin().sum()

    @property
    def all(self):
        return tuple(range(len(self.tensors)))

    def to(self, *args):
        return Case(self.name, self.function, tuple(x.to(*args) for x in self.tensors), self.shared)


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def between_pixels(offset):
    """Offsets that put no sample on a pixel, where there is no derivative."""
    return (offset.mul(8).floor().mul(2) + 1) / 16


def carafe():
    tensors = drawn((1, 4, 2, 1), (1, 18, 4, 2))
    return Case("carafe", lambda features, masks: omniops.carafe(features, masks, 3, 2, 2), tensors)


def carafe_downsample():
    tensors = drawn((1, 2, 3, 2), (1, 9, 2, 1))
    return Case(
        "carafe_downsample", lambda features, masks: omniops.carafe_downsample(features, masks, 3, 1, 2), tensors
    )


def deform_conv2d():
    """Two groups of either kind, a bias and a mask."""
    input, offset, weight, bias, mask = drawn((1, 4, 3, 2), (1, 8, 3, 1), (2, 2, 1, 2), (2,), (1, 4, 3, 1))
    return Case(
        "deform_conv2d",
        lambda input, offset, weight, bias, mask: omniops.deform_conv2d(input, offset, weight, bias, mask=mask),
        (input, between_pixels(offset), weight, bias, mask),
        shared=(2, 3),
    )


def deform_conv2d_without_mask():
    input, offset, weight = drawn((2, 1, 2, 3), (2, 4, 1, 3), (2, 1, 2, 1))
    return Case("deform_conv2d", omniops.deform_conv2d, (input, between_pixels(offset), weight), shared=(2,))


def multi_scale_deform_attn():
    value, locations, weights = drawn((1, 8, 2, 1), (1, 2, 2, 2, 1, 2), (1, 2, 2, 2, 1))
    locations = (locations.mul(6).floor() + 0.5) / 24
    return Case(
        "multi_scale_deform_attn",
        lambda *tensors: omniops.multi_scale_deform_attn(tensors[0], [(2, 3), (1, 2)], *tensors[1:]),
        (value, locations + 0.4, weights),
    )


CASES = (carafe, carafe_downsample, deform_conv2d, deform_conv2d_without_mask, multi_scale_deform_attn)


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def case(request):
    return request.param()


@pytest.fixture(autouse=True)
def no_slow_fallback():
    """vmap warns where it calls an operator for one slice after the other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


def assert_close(found, expected, **tolerances):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **tolerances)


def by_autograd(function, tensors, create_graph=False):
    leaves = [x.detach().requires_grad_() for x in tensors]
    return leaves, torch.autograd.grad(function(*leaves), leaves, create_graph=create_graph)


def test_grad_and_grad_of_it(case):
    leaves, first = by_autograd(case.loss, case.tensors, create_graph=True)
    assert_close(grad(case.loss, case.all)(*case.tensors), first)
    second = torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)

    def of_first(*tensors):
        return sum(x.sin().sum() for x in grad(case.loss, case.all)(*tensors))

    assert_close(grad(of_first, case.all)(*case.tensors), second)


def test_grad_of_grad_of_grad(case):
    """The third derivative along a line."""
    directions = [x.cos() for x in case.tensors]

    def along(t):
        return case.loss(*(x + t * d for x, d in zip(case.tensors, directions, strict=True)))

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = along(t)
    for _ in range(3):
        (found,) = torch.autograd.grad(found, t, create_graph=True)
    zero = t.detach()
    assert_close(grad(grad(grad(along)))(zero), found)
    assert_close(jacfwd(jacfwd(jacfwd(along)))(zero), found)
    assert_close(jacfwd(grad(jacfwd(along)))(zero), found)


def test_jacobians(case):
    expected = torch.autograd.functional.jacobian(case.function, case.tensors)
    assert_close(jacrev(case.function, case.all)(*case.tensors), expected)
    assert_close(jacfwd(case.function, case.all)(*case.tensors), expected)
    for i in case.all:
        assert_close(jacrev(case.function, i, chunk_size=3)(*case.tensors), expected[i])


def test_the_hessian(case):
    """jacfwd of jacrev, and in the other order."""
    expected = torch.autograd.functional.hessian(case.loss, case.tensors)
    assert_close(hessian(case.loss, case.all)(*case.tensors), expected)
    for i in case.all:
        assert_close(jacrev(jacrev(case.loss, i), i)(*case.tensors), expected[i][i])
        assert_close(jacrev(jacfwd(case.loss, i), i)(*case.tensors), expected[i][i])


def subsets(length):
    """All but the empty one."""
    return [chosen for chosen in itertools.product((False, True), repeat=length) if any(chosen)]


def test_jvp_by_each_subset_of_tensors(case):
    jacobian = torch.autograd.functional.jacobian(case.function, case.tensors)
    tangents = [x.cos() for x in case.tensors]
    result = case.function(*case.tensors)
    for chosen in subsets(len(tangents)):

        def function(*some, chosen=chosen):
            left = iter(some)
            return case.function(*(next(left) if c else x for c, x in zip(chosen, case.tensors, strict=True)))

        given = [
            tuple(x for x, c in zip(tensors, chosen, strict=True) if c)
            for tensors in (case.tensors, tangents, jacobian)
        ]
        found, tangent = jvp(function, given[0], given[1])
        assert torch.equal(found, result)
        expected = sum(by.flatten(-x.dim()) @ x.flatten() for by, x in zip(given[2], given[1], strict=True))
        assert_close(tangent, expected)


def test_vjp_and_what_it_returns_later(case):
    cotangent = case.function(*case.tensors).cos()
    expected = torch.autograd.functional.vjp(case.function, case.tensors, cotangent)[1]
    result, function = vjp(case.function, *case.tensors)
    assert torch.equal(result, case.function(*case.tensors))
    assert_close(function(cotangent), expected)
    batch = torch.stack((cotangent, cotangent.sin()))
    assert_close([x[0] for x in vmap(function)(batch)], expected)


def test_gradients_of_what_a_vjp_kept(case):
    """The transform has ended by then, and what it kept of each tensor has to lead to it."""
    cotangent = case.function(*case.tensors).cos()
    for chosen in range(len(case.tensors)):
        leaves, first = by_autograd(
            lambda *tensors: (case.function(*tensors) * cotangent).sum(), case.tensors, create_graph=True
        )
        expected = torch.autograd.grad(first[chosen].sin().sum(), leaves, allow_unused=True)
        leaves = [x.detach().requires_grad_() for x in case.tensors]

        def of_one(x, leaves=leaves, chosen=chosen):
            return case.function(*leaves[:chosen], x, *leaves[chosen + 1 :])

        _, function = vjp(of_one, leaves[chosen])
        (gradient,) = function(cotangent)
        assert_close(gradient, first[chosen])
        found = torch.autograd.grad(gradient.sin().sum(), leaves, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            # What does not depend is None or zero.
            pair = [torch.zeros(()) if x is None or not x.any() else x for x in (one, other)]
            assert_close(*pair)


def in_dims_of(case):
    """Each subset of the tensors, mapped along axes that differ."""
    return [tuple((i % 2 if c else None) for i, c in enumerate(chosen)) for chosen in subsets(len(case.tensors))]


def mapped(case, in_dims, size=3):
    """The tensors, with others along the mapped axes, and the arguments of each call of a loop."""
    inputs = [
        x if dim is None else torch.stack([x * (1 + n / 16) for n in range(size)], dim)
        for x, dim in zip(case.tensors, in_dims, strict=True)
    ]
    slices = [
        [x if dim is None else x.select(dim, n) for x, dim in zip(inputs, in_dims, strict=True)] for n in range(size)
    ]
    return inputs, slices


def test_vmap_is_a_loop_in_one_call(case):
    for in_dims in in_dims_of(case):
        inputs, slices = mapped(case, in_dims)
        with OperatorCalls() as calls:
            found = vmap(case.function, in_dims)(*inputs)
        assert len(calls.names) == 1
        assert_close(found, torch.stack([case.function(*tensors) for tensors in slices]))


def test_vmap_of_grad_is_a_loop_of_gradients_in_one_call(case):
    """Also of what is not mapped: the gradients of each sample by a weight they share."""
    for in_dims in in_dims_of(case):
        inputs, slices = mapped(case, in_dims)
        with OperatorCalls() as calls:
            found = vmap(grad(case.loss, case.all), in_dims)(*inputs)
        assert len(calls.names) == 2
        expected = [by_autograd(case.loss, tensors)[1] for tensors in slices]
        assert_close(found, [torch.stack(gradients) for gradients in zip(*expected, strict=True)])
        for i in case.all:
            assert_close(vmap(grad(case.loss, i), in_dims)(*inputs), found[i])


def test_grad_of_vmap_is_the_gradient_of_a_loop(case):
    for in_dims in in_dims_of(case):
        inputs, _ = mapped(case, in_dims)

        def looped(*tensors, in_dims=in_dims):
            slices = [
                [x if dim is None else x.select(dim, n) for x, dim in zip(tensors, in_dims, strict=True)]
                for n in range(3)
            ]
            return sum(case.loss(*tensors) for tensors in slices)

        found = grad(lambda *tensors, in_dims=in_dims: vmap(case.loss, in_dims)(*tensors).sum(), case.all)(*inputs)
        assert_close(found, by_autograd(looped, inputs)[1])


def test_vmap_of_jacobians_and_hessians(case):
    """Of each by a tensor that is mapped and one that is not."""
    in_dims = tuple(0 if i == 0 else None for i in case.all)
    inputs, slices = mapped(case, in_dims, size=2)
    for i in (0, len(case.tensors) - 1):
        for transform in (jacrev, jacfwd):
            found = vmap(transform(case.function, i), in_dims)(*inputs)
            expected = [torch.autograd.functional.jacobian(case.function, tuple(tensors))[i] for tensors in slices]
            assert_close(found, torch.stack(expected))
        found = vmap(hessian(case.loss, i), in_dims)(*inputs)
        expected = [torch.autograd.functional.hessian(case.loss, tuple(tensors))[i][i] for tensors in slices]
        assert_close(found, torch.stack(expected))


def test_vmap_within_vmap(case):
    for kept in case.all:
        outer = tuple(None if i == kept else 0 for i in case.all)
        inner = tuple(0 if i == kept else None for i in case.all)
        inputs = [torch.stack([x, x * 1.0625]) for x in case.tensors]
        found = vmap(vmap(grad(case.loss, case.all), inner), outer)(*inputs)
        for n, m in itertools.product(range(2), repeat=2):
            tensors = [x[m] if i == kept else x[n] for i, x in enumerate(inputs)]
            assert_close([x[n, m] for x in found], by_autograd(case.loss, tensors)[1])


def test_forward_over_reverse_without_torch_func(case):
    """Dual tensors that ask for a graph: the tangent of a gradient is a product with the Hessian."""
    directions = [x.cos() for x in case.tensors]
    _, products = torch.autograd.functional.vhp(case.loss, case.tensors, tuple(directions))
    leaves = [x.detach().requires_grad_() for x in case.tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(leaves, directions, strict=True)]
        loss = case.loss(*duals)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        found = [forward_ad.unpack_dual(x).tangent for x in gradients]
        slope = forward_ad.unpack_dual(loss).tangent
    assert_close(found, products)
    assert_close(torch.autograd.grad(slope, leaves), products)  # and reverse over forward


def test_forward_mode_without_gradients(case):
    """no_grad turns off the reverse mode alone."""
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(case.tensors[0], torch.ones_like(case.tensors[0]))
        tangent = forward_ad.unpack_dual(case.function(dual, *case.tensors[1:])).tangent
        assert forward_ad.unpack_dual(case.function(*case.tensors)).tangent is None
    _, expected = jvp(lambda x: case.function(x, *case.tensors[1:]), case.tensors[:1], (torch.ones_like(dual),))
    assert_close(tangent, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts(case, device, dtype):
    """Each derivative has the dtype of what it is of, also where autocast has cast that."""
    tolerance = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]}
    rounded = case.to(dtype)
    if case.name == "multi_scale_deform_attn" and dtype != torch.float32:
        rounded.tensors = rounded.tensors[0], *(x.float() for x in case.tensors[1:])
    wide = rounded.to(torch.float64)
    moved = rounded.to(device)
    batch = [torch.stack([x, x]) for x in moved.tensors]
    loss = lambda *tensors: case.function(*tensors).float().sum()  # noqa: E731
    gradients = vmap(grad(loss, case.all))(*batch)
    assert [x.dtype for x in gradients] == [x.dtype for x in moved.tensors]
    expected = by_autograd(lambda *tensors: case.function(*tensors).sum(), wide.tensors)[1]
    for n in range(2):
        assert_close([x[n].cpu().double() for x in gradients], expected, **tolerance)
    tangents = tuple(torch.ones_like(x) for x in moved.tensors)
    result, tangent = jvp(case.function, moved.tensors, tangents)
    assert (tangent.dtype, tangent.device, tangent.stride()) == (result.dtype, result.device, result.stride())
    expected = jvp(case.function, wide.tensors, tuple(x.cpu().double() for x in tangents))[1]
    assert_close(tangent.cpu().double(), expected, rtol=0, atol=tolerance["atol"] * float(expected.abs().max() + 1))
    with torch.autocast(device, torch.bfloat16):
        result, tangent = jvp(case.function, moved.tensors, tangents)
        assert (result.dtype, tangent.dtype) == (torch.bfloat16, torch.bfloat16)
        gradients = grad(loss, case.all)(*moved.tensors)
    assert [x.dtype for x in gradients] == [x.dtype for x in moved.tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_tangent_of_an_offset_is_the_reference_kernels(dtype):
    """Also on pixels, where the derivative is the one to the right, around the map, and at infinite offsets."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 4, 5), (2, 2, 3, 3), (2, 18, 4, 5), (2, 36, 4, 5)
    input, weight, mask, tangent = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    offset = (torch.randint(-24, 24, shapes[3], generator=generator) / 4).to(dtype)
    offset.view(-1)[::37], offset.view(-1)[::41] = torch.inf, -torch.inf
    numbers = (1, 1), (1, 1), (1, 1)
    wide = [x.double() for x in (input, weight, mask)]
    for with_mask in (True, False):

        def function(offset, with_mask=with_mask):
            return omniops.deform_conv2d(input, offset, weight, None, *numbers, mask if with_mask else None)

        def oracle(offset, with_mask=with_mask):
            return reference.deform_conv2d(wide[0], offset, wide[1], None, wide[2] if with_mask else None, *numbers)

        _, found = jvp(function, (offset,), (tangent,))
        _, expected = jvp(oracle, (offset.double(),), (tangent.double(),))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_samples_without_an_image(case):
    """A batch of no elements within each of several."""
    empty = [x if i in case.shared else x[:0] for i, x in enumerate(case.tensors)]
    in_dims = tuple(None if i in case.shared else 0 for i in case.all)
    inputs = [x if dim is None else torch.stack([x, x]) for x, dim in zip(empty, in_dims, strict=True)]
    found = vmap(grad(case.loss, case.all), in_dims)(*inputs)
    for x, gradient in zip(empty, found, strict=True):
        assert gradient.shape == (2, *x.shape)
        assert not gradient.any()


MASKS = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.uint8)


def test_vmap_of_connected_components():
    masks = torch.stack([MASKS, MASKS.flip(0), 1 - MASKS])
    for connectivity in (4, 8):
        found = vmap(lambda x, k=connectivity: omniops.connected_components(x[None, None], k), 2)(masks.movedim(0, 2))
        expected = omniops.connected_components(masks[:, None], connectivity)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[:, 0], other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_vmap_of_what_is_made_of_components(dtype):
    masks = torch.stack([MASKS, MASKS.flip(0), 1 - MASKS])
    if dtype.is_floating_point:
        masks = masks * 2.0 - 1
        found = vmap(lambda x: omniops.fill_holes(x, 1))(masks)
        assert torch.equal(found, torch.stack([omniops.fill_holes(x, 1) for x in masks]))
        assert not torch.equal(found, masks)
        gradients = vmap(grad(lambda x: omniops.fill_holes(x, 1).sum()))(masks)
        assert torch.equal(gradients, (found == masks).to(dtype))
        _, tangent = jvp(lambda x: omniops.fill_holes(x, 1), (masks,), (torch.ones_like(masks),))
        assert torch.equal(tangent, gradients)
    else:
        masks = masks.to(dtype)
    found = vmap(lambda x: omniops.remove_small_components(x, 2))(masks)
    assert torch.equal(found, torch.stack([omniops.remove_small_components(x, 2) for x in masks]))
    assert not torch.equal(found, masks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: omniops.CARAFEPack(2, 2, compressed_channels=2, up_kernel=3),
        lambda: omniops.ModulatedDeformConv2d(2, 2, 3, padding=1),
    ],
    ids=["CARAFEPack", "ModulatedDeformConv2d"],
)
def test_the_gradients_of_each_sample_by_a_module_s_parameters(make):
    torch.manual_seed(0)
    module = make().double()
    parameters = {name: torch.randn_like(x) / 8 for name, x in module.named_parameters()}
    samples = torch.randn(3, 2, 4, 3, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(module, parameters, x[None]).sin().sum()

    found = vmap(grad(loss), (None, 0))(parameters, samples)
    for n, x in enumerate(samples):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
        assert_close([value[n] for value in found.values()], expected)
    ensemble = {name: torch.stack([x, x.cos()]) for name, x in parameters.items()}
    found = vmap(loss, (0, None))(ensemble, samples[0])
    assert_close(found[1], loss({name: x[1] for name, x in ensemble.items()}, samples[0]))


@pytest.mark.slow
def test_compiled_transforms(case):
    """torch.compile traces the transforms and the operators in them."""
    in_dims = tuple(None if i in case.shared else 0 for i in case.all)
    inputs, _ = mapped(case, in_dims)
    tangents = tuple(x.cos() for x in case.tensors)
    for function, arguments in (
        (grad(case.loss, case.all), case.tensors),
        (vmap(grad(case.loss, case.all), in_dims), inputs),
        (jacrev(case.function, case.all), case.tensors),
        (lambda *tensors: jvp(case.function, tensors, tangents), case.tensors),
        (jacfwd(case.function), case.tensors),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(*arguments), function(*arguments))
