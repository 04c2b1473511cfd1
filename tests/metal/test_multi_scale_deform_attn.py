"""The shipped Metal kernels of multi_scale_deform_attn and the code that launches them, in the emulator, against the
float64 oracle."""

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import emulator
import pytest
import torch
from layouts import shifted, sliced
from problems import OPERATORS, TOLERANCES, MultiScaleDeformAttn, arguments, error, oracle, results
from recorder import Recorder, record_launches
from torch import Tensor

from omniops.backends import mps
from omniops.backends.mps import _segments
from omniops.backends.mps import multi_scale_deform_attn as metal
from omniops.backends.mps._library import METAL_TYPES, library, source
from omniops.backends.reference import multi_scale_deform_attn as reference

SOURCE = source("multi_scale_deform_attn")
FORWARD, BACKWARD = OPERATORS[MultiScaleDeformAttn]

pytestmark = pytest.mark.usefixtures("emulated")

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=METAL_TYPES.get)
operators = pytest.mark.parametrize("operator", OPERATORS[MultiScaleDeformAttn])
discretely = pytest.mark.parametrize("discrete", [False, True], ids=["default", "discrete"])

PYRAMID = ((6, 5), (3, 3), (2, 1))
CASES = [
    MultiScaleDeformAttn(2, PYRAMID, 41, 2, 32, (2, 3, 1)),  # queries that are pixels
    MultiScaleDeformAttn(1, PYRAMID, 7, 3, 5, (2, 0, 4)),
    MultiScaleDeformAttn(1, ((9, 20),), 40, 1, 12, (4,)),
    MultiScaleDeformAttn(2, PYRAMID, 3, 2, 1, (1, 1, 1)),
    MultiScaleDeformAttn(1, PYRAMID, 5, 1, 37, (4, 4, 4)),  # several blocks of channels
    MultiScaleDeformAttn(1, PYRAMID, 5, 2, 264, (1, 2, 1)),
    MultiScaleDeformAttn(1, ((0, 7), (3, 2), (4, 0), (0, 0), (1, 1)), 6, 2, 8, (2, 3, 1, 1, 2)),
    MultiScaleDeformAttn(1, ((2, 2), (30, 1)), 9, 2, 8, (1, 37)),  # more points than a simdgroup has lanes
    MultiScaleDeformAttn(3, ((1, 1),), 1, 1, 3, (1,)),
    MultiScaleDeformAttn(1, ((17, 8), (8, 17)), 10, 1, 16, (3, 3)),  # several tiles of cells
]


def run(operator: str, args: list[Any]) -> tuple[Tensor, ...]:
    """The Metal kernels' results, every element of which something has written."""
    return results(emulator.launched(getattr(metal, operator), *args))


def check(operator: str, args: list[Any]) -> None:
    found = run(operator, args)
    expected = oracle(reference, operator, args)
    value, locations, weights = args[0 if operator == FORWARD else 1], *args[2 if operator == FORWARD else 3 :][:2]
    dtypes = [value.dtype] if operator == FORWARD else [tensor.dtype for tensor in (value, locations, weights)]
    assert len(found) == len(expected) == len(dtypes)
    for result, wanted, dtype in zip(found, expected, dtypes, strict=True):
        assert (result.dtype, result.shape) == (dtype, wanted.shape)
        assert result.stride() == torch.empty(wanted.shape).stride()
        assert error(result, wanted) < TOLERANCES[dtype]


@dtypes
@operators
@discretely
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_case(operator: str, dtype: torch.dtype, case: MultiScaleDeformAttn, discrete: bool) -> None:
    check(operator, arguments(operator, case._replace(discrete=discrete), dtype))


@operators
@discretely
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=METAL_TYPES.get)
@pytest.mark.parametrize("wide", ["locations", "weights", "locations weights"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_float32_beside_half_precision(
    operator: str, dtype: torch.dtype, wide: str, case: MultiScaleDeformAttn, discrete: bool
) -> None:
    check(operator, arguments(operator, case._replace(wide=wide, discrete=discrete), dtype))


BOUNDS = {
    "heads": {"MAX_SAMPLES": 41 * 6 * 3},
    "one head": {"MAX_SAMPLES": 41 * 6},
    "queries": {"MAX_SAMPLES": 100},
    "one query": {"MAX_SAMPLES": 1},
    "by comparisons": {"MAX_COMPARISONS": 1000},
    "by cells": {"MAX_CELLS": 150},
    "with more cells": {"MAX_CELLS": 1, "MAX_SAMPLES": 150},
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=METAL_TYPES.get
)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_the_gradient_of_value_in_batches(
    bounds: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, bound in bounds.items():
        monkeypatch.setattr(metal, name, bound)
    with emulator.launches() as launched:
        check(BACKWARD, arguments(BACKWARD, CASES[0], dtype))
    assert sum(launch.kernel == "multi_scale_deform_attn_count" for launch in launched) > 1


def test_batches_keep_their_bounds_and_have_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for case, bounds in product(CASES, BOUNDS.values()):
        args = arguments(FORWARD, case, torch.float32)
        with monkeypatch.context() as patch:
            for name, bound in bounds.items():
                patch.setattr(metal, name, bound)
            problem = metal._Problem.of(*args)
            batches = list(problem.batches())
            rows = [
                (head, query)
                for batch in batches
                for head in range(batch.first_head, batch.first_head + batch.heads)
                for query in range(batch.first_query, batch.first_query + batch.queries)
            ]
            assert sorted(rows) == list(product(range(case.n * case.heads), range(case.queries)))
            for batch in batches:
                samples = batch.queries * problem.points
                assert batch.heads * samples <= metal.MAX_SAMPLES or (batch.heads, batch.queries) == (1, 1)
                assert batch.heads * problem.cells <= metal.MAX_CELLS or batch.heads == 1
                meeting = batch.heads * sum((batch.queries * points) ** 2 for points in case.points)
                assert meeting <= metal.MAX_COMPARISONS or (batch.heads, batch.queries) == (1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": sliced,
    "expanded": lambda tensor: tensor.flatten()[:1].view((1,) * tensor.dim()).expand(tensor.shape),  # as of a sum
    **{f"shifted by {elements}": partial(shifted, elements=elements) for elements in (1, 2, 3, 4, 8)},
}


@operators
@pytest.mark.parametrize("discrete", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "discrete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=METAL_TYPES.get)
@pytest.mark.parametrize("wide", ["", "locations"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(operator: str, layout: str, dtype: torch.dtype, wide: str, discrete: bool) -> None:
    case = MultiScaleDeformAttn(2, ((3, 2), (2, 2), (1, 1)), 3, 2, 16, (2, 1, 2), discrete, wide)
    args = arguments(operator, case, dtype)
    check(operator, [LAYOUTS[layout](arg) if isinstance(arg, Tensor) else arg for arg in args])
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            check(operator, [*args[:i], LAYOUTS[layout](arg), *args[i + 1 :]])


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=METAL_TYPES.get)
@pytest.mark.parametrize("transposed", [False, True])
def test_levels_and_points_as_two_axes(operator: str, dtype: torch.dtype, transposed: bool) -> None:
    args = arguments(operator, MultiScaleDeformAttn(2, PYRAMID, 5, 2, 8, (4, 4, 4), wide="locations"), dtype)
    expected = run(operator, args)
    i = 2 if operator == FORWARD else 3
    for index in (i, i + 1):
        args[index] = args[index].unflatten(3, (3, 4))
        if transposed:
            args[index] = args[index].transpose(3, 4).contiguous().transpose(3, 4)
    found = run(operator, args)
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result.flatten(), wanted.flatten())
        assert result.is_contiguous()
    assert [tensor.shape for tensor in found[1:]] == [tensor.shape for tensor in args[i:][:2] if operator == BACKWARD]


@operators
def test_an_axis_of_one_has_the_stride_of_a_new_tensor(operator: str) -> None:
    args = arguments(operator, MultiScaleDeformAttn(1, PYRAMID, 1, 1, 8, (1, 2, 1)), torch.float32)
    check(operator, [torch.stack([x] * 3)[1:2, 0] if isinstance(x, Tensor) else x for x in args])
    check(operator, [torch.cat([x] * 2, 1)[:, : x.shape[1]] if isinstance(x, Tensor) else x for x in args])


@dtypes
@pytest.mark.parametrize("wide", ["", "locations weights"])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_gradients_that_are_not_asked_for(wanted: tuple[bool, ...], dtype: torch.dtype, wide: str) -> None:
    args = arguments(BACKWARD, MultiScaleDeformAttn(1, PYRAMID, 5, 2, 8, (2, 1, 2), wide=wide), dtype)
    everything = emulator.launched(metal.multi_scale_deform_attn_backward, *args)
    with emulator.launches() as launched:
        found = emulator.launched(metal.multi_scale_deform_attn_backward, *args[:-1], list(wanted))
    for gradient, expected, is_wanted in zip(found, everything, wanted, strict=True):
        if is_wanted:
            assert gradient.dtype == expected.dtype
            assert torch.equal(gradient, expected)
        else:
            assert (gradient.shape, gradient.dtype) == ((0,), dtype)
    kernels = {launch.kernel.rstrip("148").rpartition("_by_")[2] for launch in launched}
    assert ("value" in kernels) == wanted[0]
    assert ("points" in kernels) == any(wanted[1:])


def with_locations_at(args: list[Any], x: float, y: float) -> list[Any]:
    """With every location there."""
    i = -4 if isinstance(args[-1], bool) else -5
    moved = torch.tensor([x, y]).to(args[i].dtype).expand(args[i].shape).contiguous()
    return [*args[:i], moved, *args[i:][1:]]


@discretely
@pytest.mark.parametrize(("x", "y"), [(0.4, 0.6), (-0.01, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_all_samples_in_one_cell(case: MultiScaleDeformAttn, x: float, y: float, discrete: bool) -> None:
    check(BACKWARD, with_locations_at(arguments(BACKWARD, case._replace(discrete=discrete), torch.float32), x, y))


def test_no_thread_takes_more_steps_than_there_are_samples_in_one_cell() -> None:
    worst = []
    for queries in (100, 200):
        args = arguments(BACKWARD, MultiScaleDeformAttn(1, ((5, 5),), queries, 1, 8, (4,)), torch.float32)
        with emulator.launches() as launched:
            getattr(metal, BACKWARD)(*with_locations_at(args, 0.5, 0.5))
        worst.append(max(launch.worst_steps for launch in launched))
    # The basic blocks of a few loops over channels for each sample.
    assert worst[0] < 4 * 100 * 300
    assert worst[1] < 2.2 * worst[0]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_order_of_threads_changes_no_bit(case: MultiScaleDeformAttn, together: bool) -> None:
    for operator in OPERATORS[MultiScaleDeformAttn]:
        args = arguments(operator, case, torch.float32)
        args = with_locations_at(args, 0.3, 0.6) if together else args
        first, *others = (run(operator, args) for _ in range(3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_their_numbers_the_order_of_threads_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "slot += samples[other] < sample ? 1 : 0;", "if (samples[other] == sample) slot = other;"
    assert SOURCE.count(old) == 1
    monkeypatch.setattr(metal, "library", lambda name, dtype: emulator.compile_shader(SOURCE.replace(old, new)))
    args = with_locations_at(arguments(BACKWARD, CASES[2], torch.float32), 0.3, 0.6)
    first, second = (run(BACKWARD, args)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)


@discretely
@pytest.mark.parametrize("case", [*CASES[:4], CASES[6], CASES[9]], ids=str)
def test_each_cell_has_its_samples_in_order(
    case: MultiScaleDeformAttn, discrete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Tensor, ...]] = []
    original = metal._records
    monkeypatch.setattr(metal, "_records", lambda *args: made.append(original(*args)) or made[-1])
    args = arguments(BACKWARD, case._replace(discrete=discrete), torch.float32)
    run(BACKWARD, args)
    ((cells, records),) = made
    _, _, _, locations, weights, *_ = args
    head_cells = len(cells) // 2 // (case.n * case.heads)
    total = 0
    for cell, (count, end) in enumerate(cells.view(-1, 2).tolist()):
        segment = records[end - count : end, 3].tolist() if count else []
        assert segment == sorted(segment)
        of_head = weights.transpose(1, 2).flatten(0, 1)[cell // head_cells]  # (Q, K)
        for query, bits in zip(segment, records[end - count : end, 2], strict=True):
            assert bits.view(torch.float32) in of_head[query]
        total += count
    inside = 0
    for level, (height, width) in enumerate(case.shapes):
        start = sum(case.points[:level])
        x, y = locations[..., start : start + case.points[level], :].unbind(-1)
        x, y = x * width - 0.5, y * height - 0.5
        within = (y > -1) & (y < height) & (x > -1) & (x < width) | torch.tensor(discrete)
        inside += int(within.sum()) if height * width else 0
    assert total == inside > 0


VALUES = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e30, -1e30, -1.0, -0.25, 0.0, 0.2, 1.0, 1.25, 2.0]


@operators
@discretely
@dtypes
@pytest.mark.parametrize("wide", ["", "locations"])
def test_locations_that_are_not_finite_or_at_the_border(
    operator: str, dtype: torch.dtype, wide: str, discrete: bool
) -> None:
    # So many pixels that -0.25 and 1.25 are one pixel outside of the map.
    shapes = ((2, 2), (0, 3), (5, 1))
    positions = torch.tensor(list(product(VALUES, VALUES)))
    args = arguments(operator, MultiScaleDeformAttn(1, shapes, len(positions), 1, 8, (1, 1, 1), discrete, wide), dtype)
    i = 2 if operator == FORWARD else 3
    level = torch.arange(len(positions)) % 3
    for query, position in enumerate(positions):  # one point of each query, so that a NaN is seen alone
        args[i][0, query, 0, level[query]] = position.to(args[i].dtype)
    expected = oracle(reference, operator, args)
    found = run(operator, args)
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        tolerance = TOLERANCES[result.dtype] * (1 + wanted.nan_to_num().abs().max().item())
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=tolerance, equal_nan=True)


@operators
@discretely
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_spoils_only_what_takes_it(operator: str, poison: float, discrete: bool) -> None:
    case = MultiScaleDeformAttn(2, ((4, 5), (0, 0), (2, 2)), 12, 2, 8, (2, 1, 1), discrete)
    for i, arg in enumerate(arguments(operator, case, torch.float32)):
        if not isinstance(arg, Tensor):
            continue
        args = arguments(operator, case, torch.float32)
        args[i][0, 0] = poison
        args[i][-1, -1] = poison
        expected = oracle(reference, operator, args)
        if discrete and operator == BACKWARD:  # the method has no derivative by the location, whatever the others are
            expected = expected[0], torch.zeros_like(expected[1]), expected[2]
        for result, wanted in zip(run(operator, args), expected, strict=True):
            assert torch.equal(result.isfinite(), wanted.isfinite()), i
            good = wanted.isfinite()
            torch.testing.assert_close(result[good].double(), wanted[good], rtol=1e-5, atol=1e-4)
            if operator == FORWARD:  # an infinite weight times a pixel is no NaN
                assert torch.equal(result.isnan(), wanted.isnan()), i


@discretely
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_the_weights_of_a_level_without_pixels_count_for_nothing(poison: float, discrete: bool) -> None:
    args = arguments(FORWARD, MultiScaleDeformAttn(1, ((4, 5), (0, 0)), 5, 2, 8, (2, 1), discrete), torch.float32)
    (expected,) = run(FORWARD, args)
    args[3][..., 2] = poison
    assert torch.equal(run(FORWARD, args)[0], expected)


def test_the_nearest_pixel_is_that_of_pytorchs_operators() -> None:
    """The middle of a pixel lies between two, and a more precise multiplication would often take the other."""
    width = 199
    across = (torch.arange(width) + 0.5) / width
    pixels = (across * width + 0.5).long().clamp(0, width - 1)
    assert ((across.double() * width + 0.5).long() != pixels).sum() > 10
    args = arguments(FORWARD, MultiScaleDeformAttn(1, ((1, width),), width, 1, 1, (1,), discrete=True), torch.float32)
    args[0] = torch.arange(width, dtype=torch.float32).view(args[0].shape)
    args[2] = torch.stack([across, torch.zeros(width)], -1).view(args[2].shape)
    args[3] = torch.ones_like(args[3])
    assert torch.equal(run(FORWARD, args)[0].flatten().long(), pixels)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return record_launches(monkeypatch, metal, "multi_scale_deform_attn")


def test_the_cases_above_launch_every_kernel(recorder: Recorder) -> None:
    for operator, case, dtype in product(OPERATORS[MultiScaleDeformAttn], CASES, (torch.float32, torch.float16)):
        getattr(metal, operator)(*arguments(operator, case, dtype, device="meta"))
    launched, segments = {name for name, _ in recorder.launches}, dir(library("segments"))
    assert all(launched == {*dir(library("multi_scale_deform_attn", dtype)), *segments} for dtype in METAL_TYPES)


@pytest.mark.parametrize(
    "case",
    [
        MultiScaleDeformAttn(2, ((100, 134), (50, 67), (25, 34), (13, 17)), 17821, 8, 32, (4, 4, 4, 4)),
        MultiScaleDeformAttn(1, ((2**13, 2**13 - 3),), 1, 1, 32, (1,)),
        MultiScaleDeformAttn(1, ((1, 2**25 - 2),), 1, 1, 63, (1,)),
        MultiScaleDeformAttn(1, ((2**25 - 2, 1),), 1, 1, 1, (1,)),
        MultiScaleDeformAttn(1, ((1, 1),), 1, 1, 2**31 - 1, (1,)),
        MultiScaleDeformAttn(1, ((1, 1),), 2**28 - 1, 1, 7, (4,)),
        MultiScaleDeformAttn(1, ((1, 1),), 2**28 + 2**26, 1, 5, (1,)),
        MultiScaleDeformAttn(1, ((1, 1),), 2**30 - 1, 1, 1, (1,)),
        MultiScaleDeformAttn(2**14 - 1, ((1, 1),), 1, 2**14, 7, (4,)),
        MultiScaleDeformAttn(1, ((4, 4),), 1, 1, 1, (2**29 - 1,)),
        MultiScaleDeformAttn(1, ((2, 2),) * 32, 2, 1, 1, (1,) * 32),
    ],
    ids=str,
)
def test_the_largest_sizes_fit_the_grid_and_32_bits(case: MultiScaleDeformAttn, recorder: Recorder) -> None:
    problem = metal._Problem.of(*meta(FORWARD, case))
    for operator in OPERATORS[MultiScaleDeformAttn]:
        args = meta(operator, case)
        if len(list(problem.batches())) > 1000:  # each takes its time
            args[-1] = [False, True, True] if operator == BACKWARD else args[-1]
        getattr(metal, operator)(*args)
    for name, args in recorder.launches:
        assert all(0 <= size < 2**31 for arg in args if isinstance(arg, list) for size in arg)
        assert all(arg.numel() < 2**31 for arg in args if isinstance(arg, Tensor))
        if "_by_value" in name:
            assert len(args[2]) <= max(metal.MAX_SAMPLES, problem.points)
            assert len(args[1]) // 2 <= max(metal.MAX_CELLS, problem.cells)


def meta(operator: str, case: MultiScaleDeformAttn) -> list[Any]:
    """Arguments without memory, in float16."""
    n, shapes, queries, heads, channels, points, discrete, _ = case
    pixels = sum(height * width for height, width in shapes)
    grad, value, locations, weights = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in (
            (n, queries, heads * channels),
            (n, pixels, heads, channels),
            (n, queries, heads, sum(points), 2),
            (n, queries, heads, sum(points)),
        )
    )
    flat = [size for shape in shapes for size in shape]
    args = [value, flat, locations, weights, list(points), discrete]
    return args if operator == FORWARD else [grad, *args, [True] * 3]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (MultiScaleDeformAttn(1, ((2**13, 2**13),), 1, 1, 32, (1,)), r"value must have fewer than 2\*\*31 elements"),
        (MultiScaleDeformAttn(1, ((1, 1),), 2**28, 1, 1, (4,)), r"sampling_locations must have fewer than 2\*\*31"),
        (MultiScaleDeformAttn(1, ((1, 1),), 2**28, 2, 4, (1,)), r"the result must have fewer than 2\*\*31 elements"),
        (
            MultiScaleDeformAttn(1, ((4, 4),), 1, 1, 1, (2**28, 2**28)),
            r"points_per_level must have a sum below 2\*\*29",
        ),
        (MultiScaleDeformAttn(1, ((2, 2),) * 33, 1, 1, 1, (1,) * 33), "spatial_shapes must have at most 32 levels"),
        (MultiScaleDeformAttn(1, ((1, 2**25 - 1),), 1, 1, 1, (1,)), r"spatial_shapes must have .* below 2\*\*26"),
    ],
    ids=str,
)
def test_sizes_beyond_32_bits_are_refused_by_name(case: MultiScaleDeformAttn, message: str, recorder: Recorder) -> None:
    for operator in OPERATORS[MultiScaleDeformAttn]:
        with pytest.raises(ValueError, match=message):
            getattr(metal, operator)(*meta(operator, case))
    assert not recorder.launches


def test_the_memory_of_the_gradient_of_value(recorder: Recorder) -> None:
    """In one launch whole heads, so that sums need no float32 beside half precision."""
    case = MultiScaleDeformAttn(2, ((100, 134), (50, 67), (25, 34), (13, 17)), 17821, 8, 32, (4, 4, 4, 4))
    getattr(metal, BACKWARD)(*meta(BACKWARD, case))
    gathers = [args for name, args in recorder.launches if "_by_value" in name]
    assert len(gathers) == 6
    assert {args[3].dtype for args in gathers} == {torch.float16}
    assert max(len(args[2]) for args in gathers) <= metal.MAX_SAMPLES


def test_the_source_is_ascii() -> None:
    # PyTorch hands it to the compiler as ASCII, and a source that is not becomes nothing.
    assert SOURCE.isascii()
    assert source("segments").isascii()


def test_the_launch_code_and_the_kernels_agree() -> None:
    for name in ("SIMD", "ROWS"):
        (value,) = re.findall(rf"constant constexpr int {name} = (\d+);", SOURCE)
        assert int(value) == getattr(metal, name)
    (value,) = re.findall(r"constant constexpr int CELLS = (\d+);", source("segments"))
    assert int(value) == _segments.CELLS
    assert re.findall(r"^INSTANTIATE_ALL\((\d+)\)", SOURCE, re.MULTILINE) == [str(width) for width in metal.WIDTHS]
    fields = re.findall(r"^  int ([^;]+);", SOURCE.partition("struct Sizes {")[2].partition("};")[0], re.MULTILINE)
    problem = metal._Problem.of(*arguments(FORWARD, CASES[0], torch.float32))
    assert sum(len(names.split(",")) for names in fields) == len(problem.sizes(lanes=1))


def test_every_dtype_of_the_backend_has_kernels() -> None:
    assert set(METAL_TYPES) == set(mps.DTYPES) == set(TOLERANCES)
