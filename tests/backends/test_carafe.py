"""CARAFE's kernels on every backend of this machine, against the reference in float64 fed the rounded inputs.

The Metal kernels are here on a Mac; elsewhere tests/metal runs them in the emulator. The Triton kernels run on the GPU
where there is one, else in Triton's interpreter.
"""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from backend_cases import (
    BACKENDS,
    TOLERANCES,
    assert_near,
    channels_last,
    dtypes,
    interpreted,
    shifted,
    sliced,
    transposed,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from omniops.backends.reference import carafe as reference

OPERATORS = ("carafe", "gradient of features", "gradient of masks")


def kernels(backend):
    return import_module(f"omniops.backends.{backend}.carafe")


def problem(n, c, h, w, k, g, s, t, dtype, seed=0):
    """features, masks, grad, and the integers behind them."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-h // t) * s, -(-w // t) * s
    shapes = (n, c, h, w), (n, g * k * k, rows, columns), (n, c, rows, columns)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes], (k, g, s, t)


def call(module, operator, features, masks, grad, sizes):
    if operator == "carafe":
        return module.carafe(features, masks, *sizes)
    if operator == "gradient of features":
        return module.carafe_backward(grad, None, masks, *features.shape[2:], *sizes)[0]
    return module.carafe_backward(grad, features, None, *features.shape[2:], *sizes)[1]


def assert_right(module, device, tensors, sizes, layout=lambda tensor: tensor):
    dtype = tensors[0].dtype
    for operator in OPERATORS:
        expected = call(reference, operator, *(tensor.double() for tensor in tensors), sizes)
        result = call(module, operator, *(layout(tensor.to(device)) for tensor in tensors), sizes)
        assert result.dtype == dtype
        assert_near(operator, result, expected, TOLERANCES[dtype])


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": channels_last,
    "shifted": shifted,
    "sliced": sliced,
    "transposed": transposed,
}


def test_the_reference_is_the_formula():
    for k, g, s, t in ((3, 2, 2, 1), (5, 1, 1, 2), (3, 1, 3, 1), (1, 2, 2, 3)):
        (features, masks, grad), sizes = problem(2, 4, 4, 5, k, g, s, t, torch.float64)
        expected = torch.zeros_like(grad)
        for n, c, i, j, u, v in (range_ for range_ in torch.cartesian_prod(
            *map(torch.arange, (*grad.shape, k, k)))):  # fmt: skip
            y, x = i // s * t + u - k // 2, j // s * t + v - k // 2
            if 0 <= y < 4 and 0 <= x < 5:
                weight = masks[n, c // (4 // g) * k * k + u * k + v, i, j]
                expected[n, c, i, j] += weight * features[n, c, y, x]
        torch.testing.assert_close(reference.carafe(features, masks, *sizes), expected)
        # The form is linear in each of the three, and the gradients are its partial derivatives.
        value = (expected * grad).sum()
        by_features = reference.carafe_backward_features(grad, masks, 4, 5, *sizes)
        torch.testing.assert_close((by_features * features).sum(), value)
        torch.testing.assert_close((reference.carafe_backward_masks(grad, features, *sizes) * masks).sum(), value)


@BACKENDS
def test_equal_weights_are_average_pooling(backend, device):
    features = torch.randn(2, 6, 5, 8, device=device)
    masks = torch.full((2, 9, 5, 8), 1 / 9, device=device)
    result = kernels(backend).carafe(features, masks, 3, 1, 1, 1)
    torch.testing.assert_close(result, F.avg_pool2d(features, 3, stride=1, padding=1))


@BACKENDS
def test_the_middle_tap_alone_is_nearest_upsampling(backend, device):
    features = torch.randn(1, 6, 5, 8, device=device)
    masks = torch.zeros(1, 2, 25, 15, 24, device=device)
    masks[:, :, 12] = 1
    result = kernels(backend).carafe(features, masks.flatten(1, 2), 5, 2, 3, 1)
    assert torch.equal(result, F.interpolate(features, scale_factor=3, mode="nearest"))


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_common_case(backend, device, dtype, layout):
    if dtype not in dtypes(backend):
        pytest.skip(f"the {backend} kernels have no {dtype}")
    if interpreted(backend, device) and dtype != torch.float32 and layout not in ("contiguous", "sliced"):
        pytest.skip("Triton's interpreter, which is slow, takes this layout in float32 only")
    h, w, k = (2, 4, 3) if interpreted(backend, device) else (3, 6, 5)
    tensors, sizes = problem(1, 4, h, w, k, 2, 2, 1, dtype)
    assert_right(kernels(backend), device, tensors, sizes, LAYOUTS[layout])


def examples(backend):
    """As many as take some seconds: Triton compiles most of them anew, or interprets them."""
    return {"reference": 300, "cpu": 600, "mps": 300, "cuda": 40 if torch.cuda.is_available() else 6}[backend]


@BACKENDS
def test_any_case(backend, device):
    @hypothesis_settings(max_examples=examples(backend))
    @given(data=st.data())
    def is_right(data):
        any_case(backend, device, data)

    is_right()


def any_case(backend, device, data):
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    small = interpreted(backend, device)
    g, k = integer(1, 3), data.draw(st.sampled_from((1, 3) if small else (1, 3, 5, 7)))
    s, t = data.draw(st.sampled_from(((1, 1), (2, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 2), (5, 1))))
    shape = integer(1, 2), g * integer(1, 5), integer(1, 3 if small else 7), integer(1, 5 if small else 9)
    dtype = data.draw(st.sampled_from(dtypes(backend)))
    tensors, sizes = problem(*shape, k, g, s, t, dtype, seed=integer(0, 99))
    assert_right(kernels(backend), device, tensors, sizes, LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))])


@BACKENDS
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 4, 2, 4), (5, 1, 2, 1)),  # the common case, of the common kernel size, also where it is interpreted
        ((1, 3, 2, 3), (9, 1, 2, 1)),  # a kernel larger than the map, and larger than what is unrolled
        ((1, 2, 1, 1), (3, 1, 7, 1)),  # a scale that is no power of two, from one pixel
        ((1, 1, 1, 70), (5, 1, 2, 1)),  # one row, wider than a tile
        ((1, 17, 37, 2), (3, 1, 2, 1)),  # taller than a tile, channels that fill no block
        ((1, 3, 2, 2), (3, 3, 2, 1)),  # a group for each channel
        ((1, 4, 5, 5), (3, 1, 1, 7)),  # a stride larger than the map
    ],
)
def test_odd_cases(backend, device, shape, sizes):
    k, g, s, t = sizes
    tensors, _ = problem(*shape, k, g, s, t, torch.float32)
    assert_right(kernels(backend), device, tensors, sizes)


@BACKENDS
def test_expanded_inputs(backend, device):
    features = torch.randn(1, 4, 3, 1, device=device).expand(2, 4, 3, 6)
    masks = torch.randn(1, 9, 1, 1, device=device).expand(2, 9, 6, 12)
    grad = torch.ones((), device=device).expand(2, 4, 6, 12)
    for operator in OPERATORS:
        expected = call(
            reference, operator, features.cpu().double(), masks.cpu().double(), grad.cpu().double(), (3, 1, 2, 1)
        )
        result = call(kernels(backend), operator, features, masks, grad, (3, 1, 2, 1))
        torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_result_has_the_memory_format_of_the_first_argument(backend, device, layout):
    (features, masks, grad), sizes = problem(2, 4, 2, 3, 3, 1, 2, 1, torch.float32)
    other = LAYOUTS["channels_last" if layout == "contiguous" else "contiguous"]
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    for operator in OPERATORS:
        first = {"carafe": features}.get(operator, grad)
        arranged = [(LAYOUTS[layout] if x is first else other)(x.to(device)) for x in (features, masks, grad)]
        assert call(kernels(backend), operator, *arranged, sizes).is_contiguous(memory_format=memory_format)


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_neighbourhood(backend, device, value):
    features = torch.ones(1, 2, 8, 12, device=device)
    features[0, 0, 4, 6] = value
    masks = torch.full((1, 25, 16, 24), 0.04, device=device)
    result = kernels(backend).carafe(features, masks, 5, 1, 2, 1)
    touched = torch.zeros(1, 2, 16, 24, dtype=torch.bool)
    touched[0, 0, 4:14, 8:18] = True
    assert torch.equal(~result.isfinite().cpu(), touched)


@BACKENDS
def test_the_same_bits_every_run(backend, device):
    tensors, sizes = problem(1, 16, *((2, 4, 3) if interpreted(backend, device) else (3, 8, 5)), 1, 2, 1, torch.float32)
    tensors = [tensor.to(device) for tensor in tensors]
    for operator in OPERATORS:
        first, second = (call(kernels(backend), operator, *tensors, sizes) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("s", "t"), [(2, 1), (1, 2), (2, 3)])
def test_the_reference_is_differentiable_by_autograd(s, t):
    (features, masks, grad), sizes = problem(1, 2, 2, 3, 3, 2, s, t, torch.float64)
    tensors = {"features": features.requires_grad_(), "masks": masks.requires_grad_(), "grad": grad.requires_grad_()}
    for operator, given_to in (
        ("carafe", ("features", "masks")),
        ("gradient of features", ("grad", "masks")),
        ("gradient of masks", ("grad", "features")),
    ):

        def function(*two, operator=operator, given_to=given_to):
            return call(reference, operator, sizes=sizes, **{**tensors, **dict(zip(given_to, two, strict=True))})

        inputs = tuple(tensors[name] for name in given_to)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    by_features, by_masks = torch.autograd.grad(reference.carafe(features, masks, *sizes), (features, masks), grad)
    torch.testing.assert_close(by_features, reference.carafe_backward_features(grad, masks, 2, 3, *sizes))
    torch.testing.assert_close(by_masks, reference.carafe_backward_masks(grad, features, *sizes))
