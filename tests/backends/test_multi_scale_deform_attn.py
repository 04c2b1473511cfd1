"""multi_scale_deform_attn's kernels on every backend of this machine, against the reference in float64 fed the rounded
inputs. Files beside this one have what is particular to the kernels of a backend.
"""

import gc
import weakref
from itertools import accumulate, product
from math import floor

import pytest
import torch
import torch.nn.functional as F
from backend_cases import BACKENDS, backends_with, dtypes, interpreted, map_tensors
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from multi_scale_attention import (
    DISCRETE,
    LAYOUTS,
    UNEVEN,
    Case,
    assert_right,
    backward,
    forward,
    kernels,
    problem,
    results,
)

from omniops.backends import prepared
from omniops.backends.reference import multi_scale_deform_attn as reference

HALVES = (torch.float16, torch.bfloat16)


def uneven(backend, device):
    """UNEVEN, or less of it for Triton's interpreter, which is slow."""
    return UNEVEN._replace(queries=3, heads=2) if interpreted(backend, device) else UNEVEN


def formula(case, x):
    """One number after another."""
    out = torch.zeros(case.n, case.queries, case.heads, case.channels, dtype=torch.float64)
    firsts = [0, *accumulate(height * width for height, width in case.shapes)]
    levels = [level for level, points in enumerate(case.points) for _ in range(points)]
    for n, q, m, d, k in product(*map(range, out.shape), range(len(levels))):
        height, width = case.shapes[levels[k]]
        pixels = x.value[n, firsts[levels[k]] :, m, d]
        across, down = (float(coordinate) for coordinate in x.locations[n, q, m, k])
        if case.discrete:
            row = min(max(int(down * height + 0.5), 0), height - 1)
            column = min(max(int(across * width + 0.5), 0), width - 1)
            sample = float(pixels[row * width + column])
        else:
            y, x_ = down * height - 0.5, across * width - 0.5
            sample = 0.0
            for row, column in product((floor(y), floor(y) + 1), (floor(x_), floor(x_) + 1)):
                if 0 <= row < height and 0 <= column < width:
                    sample += (1 - abs(y - row)) * (1 - abs(x_ - column)) * float(pixels[row * width + column])
        out[n, q, m, d] += float(x.weights[n, q, m, k]) * sample
    return out.flatten(2)


@BACKENDS
@DISCRETE
def test_the_kernels_are_the_formula(backend, device, discrete):
    case = Case(2, 3, 2, 3, ((4, 5), (2, 1)), (3, 2), discrete)
    tensors = problem(case, torch.float32)
    out = forward(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), tensors))
    torch.testing.assert_close(out.cpu().double(), formula(case, tensors), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_grid_sample_agrees(backend, device):
    case = uneven(backend, device)._replace(points=(3, 3, 3))
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    inputs = (x.value, x.locations, x.weights)
    for tensor in inputs:
        tensor.requires_grad_()
    maps = x.value.transpose(1, 2).flatten(0, 1).split([h * w for h, w in case.shapes], 1)
    grids = (2 * x.locations - 1).transpose(1, 2).flatten(0, 1).split(3, 2)
    samples = [
        F.grid_sample(level.mT.unflatten(2, shape), grid, align_corners=False)
        for level, grid, shape in zip(maps, grids, case.shapes, strict=True)
    ]
    sums = (torch.cat(samples, 3) * x.weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
    expected = sums.unflatten(0, (case.n, case.heads)).permute(0, 3, 1, 2).flatten(2)
    gradients = torch.autograd.grad(expected, inputs, x.grad)
    found = results(kernels(backend), case, map_tensors(torch.Tensor.detach, x))
    for result, wanted in zip(found.values(), (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@backends_with("dtype", torch.float32, torch.float64, *HALVES)
@DISCRETE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_common_case(backend, device, dtype, layout, discrete):
    if dtype not in dtypes(backend):
        pytest.skip(f"the {backend} kernels have no {dtype}")
    case = uneven(backend, device)._replace(discrete=discrete)
    assert_right(kernels(backend), device, case, problem(case, dtype), LAYOUTS[layout])


@backends_with("dtype", *HALVES)
@DISCRETE
@pytest.mark.parametrize(("wide_locations", "wide_weights"), [(True, True), (True, False), (False, True)])
def test_locations_and_weights_in_float32_beside_half_precision(
    backend, device, dtype, wide_locations, wide_weights, discrete
):
    case = uneven(backend, device)._replace(discrete=discrete)
    of_locations, of_weights = (torch.float32 if wide else dtype for wide in (wide_locations, wide_weights))
    tensors = problem(case, dtype, of_locations, of_weights)
    found = assert_right(kernels(backend), device, case, tensors)
    # What is summed in float32 is as right as that where it is not rounded.
    expected = results(reference, case, map_tensors(torch.Tensor.double, tensors))
    for name, wide in (("by_locations", wide_locations), ("by_weights", wide_weights)):
        if wide:
            scale = max(expected[name].abs().max().item(), 1e-30)
            assert (found[name].cpu().double() - expected[name]).abs().max().item() <= 1e-5 * scale, name


def examples(backend):
    return {"reference": 20, "cpu": 150, "mps": 100, "cuda": 40 if torch.cuda.is_available() else 4}[backend]


@st.composite
def cases(draw, most_queries):
    levels = draw(st.integers(1, 4))
    sides = st.integers(0, 9)
    shapes = draw(
        st.lists(st.tuples(sides, sides), min_size=levels, max_size=levels).filter(
            lambda found: any(height * width for height, width in found)
        )
    )
    points = draw(st.lists(st.integers(0, 7), min_size=levels, max_size=levels).filter(any))
    small = st.integers(1, 3)
    return Case(
        draw(small),
        draw(st.integers(1, most_queries)),
        draw(small),
        draw(st.integers(1, 70)),
        tuple(shapes),
        tuple(points),
        draw(st.booleans()),
    )


@BACKENDS
def test_any_case(backend, device):
    most_queries = 3 if interpreted(backend, device) else 12

    @hypothesis_settings(max_examples=examples(backend))
    @given(
        case=cases(most_queries),
        dtype=st.sampled_from(dtypes(backend)),
        wide=st.tuples(st.booleans(), st.booleans()),
        layout=st.sampled_from(sorted(LAYOUTS)),
        seed=st.integers(0, 99),
    )
    def is_right(case, dtype, wide, layout, seed):
        others = (torch.promote_types(dtype, torch.float32) if is_wide else dtype for is_wide in wide)
        assert_right(kernels(backend), device, case, problem(case, dtype, *others, seed=seed), LAYOUTS[layout])

    is_right()


@BACKENDS
@DISCRETE
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, ((1, 1),), (1,)),
        Case(1, 2, 1, 300, ((2, 3),), (2,)),  # channels for several vectors, and a rest
        Case(1, 3, 2, 8, ((3, 4), (0, 0), (2, 2)), (2, 2, 2)),  # a level without pixels
        Case(1, 3, 2, 8, ((0, 5), (3, 4), (4, 0)), (2, 2, 1)),
        Case(1, 3, 2, 8, ((3, 4), (3, 3), (2, 2)), (0, 3, 0)),  # levels without points
        Case(1, 3, 2, 8, ((3, 4), (0, 0), (2, 2)), (0, 3, 0)),  # no point on any pixel
        Case(1, 3, 2, 4, ((3, 4), (5, 2)), (37, 64)),  # points for several blocks
        Case(1, 1, 16, 2, ((1, 9), (9, 1)), (1, 1)),  # maps of one row, and of one column
        Case(1, 70, 1, 5, ((2, 2),), (3,)),  # many queries on few pixels
        Case(1, 2, 9, 33, ((4, 4),) * 7, (2,) * 7),
    ],
    ids=str,
)
def test_odd_cases(backend, device, case, discrete):
    case = case._replace(discrete=discrete)
    assert_right(kernels(backend), device, case, problem(case, torch.float32))


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_levels_and_points_as_two_axes(backend, device, layout):
    case = uneven(backend, device)._replace(points=(2, 2, 2))
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    expected = results(kernels(backend), case, x)
    x.locations, x.weights = (tensor.unflatten(3, (3, 2)) for tensor in (x.locations, x.weights))
    if layout == "transposed":
        x.locations, x.weights = (t.transpose(3, 4).contiguous().transpose(3, 4) for t in (x.locations, x.weights))
    shapes = {"by_locations": x.locations.shape, "by_weights": x.weights.shape}
    for name, result in results(kernels(backend), case, x).items():
        assert result.shape == shapes.get(name, expected[name].shape)
        assert result.stride() == torch.empty(result.shape).stride()
        torch.testing.assert_close(result.flatten(), expected[name].flatten())


@BACKENDS
@DISCRETE
def test_expanded_inputs(backend, device, discrete):
    case = uneven(backend, device)._replace(discrete=discrete)

    def expanded(tensor):
        """One image's and one query's for all."""
        return tensor[:1, :1].expand(tensor.shape)

    assert_right(kernels(backend), device, case, map_tensors(expanded, problem(case, torch.float32)))
    x = problem(case, torch.float32)
    x.grad = torch.ones(()).expand(x.grad.shape)  # that of a sum
    assert_right(kernels(backend), device, case, x)


@BACKENDS
@DISCRETE
def test_samples_on_pixels_and_on_the_border(backend, device, discrete):
    """Sides are powers of two, so that positions are exact: on pixels, on the border of the map, one pixel outside."""
    case = Case(1, 1, 1, 5, ((4, 8),), (9 * 17,), discrete)
    x = problem(case, torch.float32)
    positions = torch.tensor(list(product(range(-7, 10), range(-2, 7))), dtype=torch.float32)
    x.locations = ((positions + 0.5) / torch.tensor([8.0, 4.0])).view(x.locations.shape)
    found = assert_right(kernels(backend), device, case, x)
    outside = (positions[:, 0] <= -1) | (positions[:, 0] >= 8) | (positions[:, 1] <= -1) | (positions[:, 1] >= 4)
    by_locations = found["by_locations"].cpu().view(-1, 2)
    assert not by_locations[outside].any()
    assert by_locations[~outside].any() == (not discrete)


@BACKENDS
def test_the_nearest_pixel_is_that_of_pytorchs_operators(backend, device):
    """The middle of a pixel lies between two, and a more precise multiplication would often take the other."""
    width = 199
    case = Case(1, width, 1, 1, ((1, width),), (1,), discrete=True)
    across = (torch.arange(width) + 0.5) / width
    pixels = (across * width + 0.5).long().clamp(0, width - 1)
    precise = (across.double() * width + 0.5).long().clamp(0, width - 1)
    assert (pixels != precise).sum() > 10
    x = problem(case, torch.float32)
    x.value = torch.arange(width, dtype=torch.float32).view(x.value.shape)
    x.locations = torch.stack([across, torch.zeros(width)], -1).view(x.locations.shape)
    x.weights = torch.ones(x.weights.shape)
    out = forward(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), x))
    assert torch.equal(out.cpu().flatten().long(), pixels)


FAR = (1e30, -1e30, float("inf"), float("-inf"), float("nan"), 3e9, -3e9, 2.0**31, -(2.0**63))


@backends_with("dtype", torch.float32, *HALVES)
@DISCRETE
def test_locations_far_outside_or_not_finite(backend, device, dtype, discrete):
    case = Case(1, len(FAR) + 1, 2, 9, ((5, 6), (0, 0), (2, 3)), (3, 1, 2), discrete)
    for axes in ((0,), (1,), (0, 1)):
        x = problem(case, dtype)
        x.locations[0, :, 0, 1] = x.locations[0, :, 1, 5] = 0.3  # in the map along the other axis
        # In the dtype: PyTorch 2.7 refuses to round such a number to infinity itself.
        for query, coordinate in enumerate(torch.tensor(FAR, dtype=torch.float64).to(dtype)):
            for axis in axes:
                x.locations[0, query, 0, 1, axis] = coordinate
                x.locations[0, query, 0, 3, axis] = coordinate  # of the level without pixels
                x.locations[0, query, 1, 5, axis] = coordinate
        found = assert_right(kernels(backend), device, case, x)
        is_nan = found["out"].cpu().isnan().view(len(FAR) + 1, 2, 9)
        for query, coordinate in enumerate((*FAR, 0.0)):
            assert is_nan[query].all() == (coordinate != coordinate and not discrete)
            assert is_nan[query].any() == is_nan[query].all()
        assert found["by_value"].isfinite().all()


@BACKENDS
@DISCRETE
def test_what_is_not_finite_in_value_stays_where_it_is_sampled(backend, device, discrete):
    case = Case(2, 9, 2, 5, ((5, 6), (3, 2)), (2, 2), discrete)
    x = problem(case, torch.float32)
    x.value[0, 7, 0], x.value[0, 31, 1], x.value[1, 0, 1] = float("nan"), float("inf"), float("-inf")
    expected = results(reference, case, map_tensors(torch.Tensor.double, x))
    found = results(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), x))
    assert not found["out"].isfinite().all()
    for name in ("out", "by_value", "by_weights"):
        torch.testing.assert_close(
            found[name].cpu().double(), expected[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )


@BACKENDS
@DISCRETE
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["value", "locations", "weights", "grad"])
def test_a_number_that_is_not_finite_spoils_only_what_takes_it(backend, device, name, number, discrete):
    """A level without pixels takes none."""
    case = Case(2, 3, 2, 3, ((4, 5), (0, 0), (2, 2)), (2, 1, 1), discrete)
    x = problem(case, torch.float32)
    getattr(x, name)[0, 0] = getattr(x, name)[-1, -1] = number
    expected = results(reference, case, map_tensors(torch.Tensor.double, x))
    found = results(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), x))
    for result, wanted in zip(found.values(), expected.values(), strict=True):
        finite = wanted.isfinite()
        assert torch.equal(result.cpu().isfinite(), finite)
        torch.testing.assert_close(result.cpu().double()[finite], wanted[finite], rtol=1e-5, atol=1e-5)


@BACKENDS
@DISCRETE
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_weights_of_a_level_without_pixels_count_for_nothing(backend, device, number, discrete):
    case = Case(1, 3, 2, 3, ((4, 5), (0, 0)), (2, 1), discrete)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, torch.float32))
    expected = forward(kernels(backend), case, x)
    x.weights[..., 2] = number
    assert torch.equal(forward(kernels(backend), case, x), expected)


@BACKENDS
def test_what_is_not_finite_beside_a_map_is_not_sampled(backend, device):
    """Levels and heads of which every other one is NaN, and those between them are sampled up to their borders."""
    case = Case(1, 40, 3, 4, ((2, 3), (3, 3), (1, 4)), (0, 6, 0))
    x = problem(case, torch.float32)
    x.value[:, :6], x.value[:, 15:], x.value[:, :, ::2] = (float("nan"),) * 3
    out = forward(kernels(backend), case, map_tensors(lambda tensor: tensor.to(device), x))
    x.value = x.value.nan_to_num(0)
    expected = forward(reference, case, x)
    torch.testing.assert_close(out.cpu()[..., 4:8], expected[..., 4:8])


@pytest.mark.slow
@backends_with("dtype discrete", *product((torch.float32, torch.bfloat16), (False, True)))
def test_each_choice_of_gradients(backend, device, dtype, discrete):
    case = uneven(backend, device)._replace(discrete=discrete)
    x = map_tensors(lambda tensor: tensor.to(device), problem(case, dtype))
    x.locations = x.locations.float()
    module = kernels(backend)
    every = backward(module, case, x)
    for mask in product((False, True), repeat=3):
        found = backward(module, case, x, mask)
        assert len(found) == 3
        for result, wanted, is_wanted in zip(found, every, mask, strict=True):
            if is_wanted:
                torch.testing.assert_close(result, wanted)
                assert result.stride() == torch.empty(result.shape).stride()
            else:
                assert (result.shape, result.dtype, result.device) == ((0,), dtype, x.grad.device)


@backends_with("layout", *LAYOUTS)
def test_the_arguments_stay_as_they_are(backend, device, layout):
    x = map_tensors(lambda tensor: LAYOUTS[layout](tensor.to(device)), problem(uneven(backend, device), torch.float32))
    before = map_tensors(torch.Tensor.clone, x)
    results(kernels(backend), uneven(backend, device), x)
    for name, tensor in vars(x).items():
        assert torch.equal(tensor, getattr(before, name)), name


@pytest.mark.slow
@backends_with("layout", *LAYOUTS)
def test_what_is_prepared_serves_other_tensors_and_holds_none(backend, device, layout):
    module, case = kernels(backend), uneven(backend, device)
    for name in ("multi_scale_deform_attn", "multi_scale_deform_attn_backward"):
        kernel = getattr(module, name)
        if not isinstance(kernel, prepared):
            continue

        def make_arguments(seed, name=name):
            x = map_tensors(lambda t: LAYOUTS[layout](t.to(device)), problem(case, torch.float32, seed=seed))
            args = (x.value, case.sizes, x.locations, x.weights, list(case.points), False)
            return args if name == "multi_scale_deform_attn" else (x.grad, *args, [True] * 3)

        first, second = make_arguments(0), make_arguments(1)
        run = kernel.prepare(*first)
        run(*first)
        found, expected = run(*second), kernel(*second)
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        for result, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(result, wanted)
        tensors = [weakref.ref(value) for value in first if isinstance(value, torch.Tensor)]
        del first
        gc.collect()
        assert [ref() for ref in tensors] == [None] * len(tensors)


@DISCRETE
def test_the_backward_of_the_reference_is_autograds_of_its_forward(discrete):
    case = UNEVEN._replace(discrete=discrete)
    x = problem(case, torch.float64)
    inputs = (x.value, x.locations, x.weights)
    for tensor in inputs:
        tensor.requires_grad_()
    expected = torch.autograd.grad(forward(reference, case, x), inputs, x.grad, allow_unused=True)
    for result, wanted, tensor in zip(backward(reference, case, x), expected, inputs, strict=True):
        torch.testing.assert_close(result, torch.zeros_like(tensor) if wanted is None else wanted)
