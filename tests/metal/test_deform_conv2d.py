"""The shipped Metal kernels of deform_conv2d and the code that launches them, in the emulator, against the float64
oracle. The matrix products are PyTorch's on the CPU."""

import re
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import emulator
import pytest
import torch
from layouts import channels_last, expanded, shifted, sliced, transposed
from problems import OPERATORS, TOLERANCES, DeformConv2d, arguments, error, oracle, results
from recorder import Recorder, record_launches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniops.backends import memory_format, mps, prepared
from omniops.backends.columns import Geometry
from omniops.backends.mps import deform_conv2d as metal
from omniops.backends.mps._library import METAL_TYPES, library, source
from omniops.backends.reference import deform_conv2d as reference

SOURCE = source("deform_conv2d")
FORWARD, BACKWARD = OPERATORS[DeformConv2d]
METHODS = {FORWARD: "forward", BACKWARD: "backward"}

pytestmark = pytest.mark.usefixtures("emulated")

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=METAL_TYPES.get)
operators = pytest.mark.parametrize("operator", OPERATORS[DeformConv2d])

CASES = [
    DeformConv2d(2, 16, 6, 5, 8),
    DeformConv2d(2, 6, 5, 4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),  # neither divides the other
    DeformConv2d(1, 24, 5, 4, 6, (1, 3), (1, 2), (0, 2), groups=3, offset_groups=2, masked=False),
    DeformConv2d(1, 80, 4, 4, 4, (2, 2), (1, 1), (0, 0), (2, 3)),
    DeformConv2d(1, 300, 2, 3, 1, (1, 1), padding=(0, 0)),  # several blocks of channels
    DeformConv2d(1, 37, 3, 3, 2, masked=False),
    DeformConv2d(3, 8, 1, 1, 8, groups=8, offset_groups=2),
    DeformConv2d(2, 4, 7, 1, 4, (5, 1), (3, 1), (2, 0), offset_groups=4),  # one channel a group
    DeformConv2d(1, 16, 5, 6, 4, (1, 1), padding=(0, 0), groups=4, offset_groups=4),
    DeformConv2d(1, 8, 5, 5, 4, (5, 5), padding=(2, 2), groups=2),
    DeformConv2d(1, 3, 4, 3, 2, (4, 3), (1, 1), (3, 2)),
]


def run(operator: str, args: list[Any]) -> tuple[Tensor, ...]:
    """The Metal kernels' results, every element of which something has written."""
    return results(emulator.launched(getattr(metal, operator), *args))


def check(operator: str, args: list[Any]) -> None:
    found = run(operator, args)
    expected = oracle(reference, operator, args)
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        assert (result.dtype, result.shape) == (args[0].dtype, wanted.shape)
        assert error(result, wanted) < TOLERANCES[result.dtype]


@dtypes
@operators
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_case(operator: str, dtype: torch.dtype, case: DeformConv2d) -> None:
    check(operator, arguments(operator, case, dtype))


@operators
@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize("max_bytes", [1, 8192])
def test_chunks_of_positions(
    operator: str, max_bytes: int, case: DeformConv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = replace(metal._COLUMNS, max_bytes=max_bytes)
    monkeypatch.setattr(metal, operator, prepared(getattr(columns, METHODS[operator])))
    check(operator, arguments(operator, case, torch.float32))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize(("samples", "cells"), [(1, 2**24), (100, 2**24), (2**22, 1), (150, 100)])
def test_a_chunk_in_parts(case: DeformConv2d, samples: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "MAX_SAMPLES", samples)
    monkeypatch.setattr(metal, "MAX_CELLS", cells)
    check(BACKWARD, arguments(BACKWARD, case, torch.float32))


@operators
@pytest.mark.parametrize("case", [CASES[1], CASES[9], DeformConv2d(1, 8, 5, 4, 4, offset_groups=4)], ids=str)
def test_threadgroups_that_take_several_tiles(
    operator: str, case: DeformConv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal, "GROUPS", 1)
    check(operator, arguments(operator, case, torch.float32))


@operators
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_products_in_parts(operator: str, case: DeformConv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = replace(metal._COLUMNS, longest_sum=5)
    monkeypatch.setattr(metal, operator, prepared(getattr(columns, METHODS[operator])))
    check(operator, arguments(operator, case, torch.float32))


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": transposed,
    "sliced": sliced,
    **{
        f"{layout} shifted by {elements}": partial(shifted, elements=elements, layout=layout)
        for elements in (1, 2, 3)
        for layout in (torch.contiguous_format, torch.channels_last)
    },
    "expanded": expanded,
}


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(operator: str, layout: str) -> None:
    args = arguments(operator, DeformConv2d(2, 16, 4, 5, 8, groups=2), torch.float16)
    args = [LAYOUTS[layout](x) if isinstance(x, Tensor) and x.ndim == 4 else x for x in args]
    check(operator, args)
    # As omniops.ops.deform_conv2d says: what each result of four dimensions is like.
    like = {FORWARD: [0], BACKWARD: [1, 2, 3, 4]}[operator]
    found = [result for result in run(operator, args) if result.ndim == 4]
    for result, i in zip(found, like, strict=True):
        assert memory_format(result) == memory_format(args[i])


def offsets_to(case: DeformConv2d, y: float, x: float) -> Tensor:
    """Offsets that take every sample to (y, x)."""
    offset = arguments(FORWARD, case, torch.float32)[1]
    tap = torch.arange(case.kernel_size[0] * case.kernel_size[1])
    rows = torch.arange(offset.shape[2]) * case.stride[0] - case.padding[0]
    columns = torch.arange(offset.shape[3]) * case.stride[1] - case.padding[1]
    by_y = y - (rows[None, :, None] + (tap // case.kernel_size[1] * case.dilation[0])[:, None, None])
    by_x = x - (columns[None, None, :] + (tap % case.kernel_size[1] * case.dilation[1])[:, None, None])
    offsets = torch.stack([by_y.expand(-1, -1, len(columns)), by_x.expand(-1, len(rows), -1)], 1).flatten(0, 1)
    return offsets.repeat(case.offset_groups, 1, 1).expand(offset.shape).clone()


@pytest.mark.parametrize(("y", "x"), [(1.25, 2.5), (-0.5, -0.75), (4.5, 3.25)])
@pytest.mark.parametrize("case", [DeformConv2d(2, 8, 5, 4, 4, offset_groups=2), CASES[1]], ids=str)
def test_all_samples_in_one_cell(case: DeformConv2d, y: float, x: float) -> None:
    args = arguments(BACKWARD, case, torch.float32)
    args[2] = offsets_to(case, y, x)
    check(BACKWARD, args)


def test_no_thread_takes_more_steps_than_there_are_samples_in_one_cell() -> None:
    worst = []
    for rows in (8, 16):
        case = DeformConv2d(1, 4, rows, 16, 4)
        args = arguments(BACKWARD, case, torch.float32)
        args[2] = offsets_to(case, 1.25, 1.5)
        with emulator.launches() as launched:
            getattr(metal, BACKWARD)(*args)
        worst.append(max(launch.worst_steps for launch in launched))
    # The basic blocks of a few loops over channels for each sample.
    assert worst[0] < 9 * 8 * 16 * 200
    assert worst[1] < 2.2 * worst[0]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], DeformConv2d(2, 5, 3, 3, 2)], ids=str)
def test_the_order_of_threads_changes_no_bit(case: DeformConv2d, together: bool) -> None:
    for operator in OPERATORS[DeformConv2d]:
        args = arguments(operator, case, torch.float32)
        if together:
            args[1 if operator == FORWARD else 2] = offsets_to(case, 1.25, 1.5)
        first, *others = (run(operator, args) for _ in range(3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_their_numbers_the_order_of_threads_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "slot += rows[other] < row ? 1 : 0;", "if (rows[other] == row) slot = other;"
    assert SOURCE.count(old) == 1
    monkeypatch.setattr(metal, "library", lambda name, dtype: emulator.compile_shader(SOURCE.replace(old, new)))
    args = arguments(BACKWARD, DeformConv2d(1, 4, 3, 3, 2), torch.float32)
    args[2] = offsets_to(DeformConv2d(1, 4, 3, 3, 2), 1.25, 1.5)
    first, second = (run(BACKWARD, args)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_each_cell_has_its_samples_in_order(
    case: DeformConv2d, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Tensor, ...]] = []
    original = metal._cells
    monkeypatch.setattr(metal, "_cells", lambda *args: made.append(original(*args)) or made[-1])
    args = arguments(BACKWARD, case, torch.float32)
    if together:
        args[2] = offsets_to(case, 1.25, 1.5)
    run(BACKWARD, args)
    ((cells, rows, records),) = made
    found = []
    for cell, (count, end) in enumerate(cells.view(-1, 2).tolist()):
        segment = records[end - count : end, 3].tolist() if count else []
        assert segment == sorted(set(segment)) == sorted(rows[end - count : end].tolist() if count else [])
        group = cell // ((case.h + 1) * (case.w + 1)) % case.offset_groups
        found += [row * case.offset_groups + group for row in segment]
    y, x = (args[2].unflatten(1, (-1, 2)) + offsets_to(case, 0.0, 0.0).unflatten(1, (-1, 2)).neg()).unbind(2)
    inside = (y >= -1) & (y < case.h) & (x >= -1) & (x < case.w)
    # (N, D, K, H_out, W_out) -> (N, H_out, W_out, K, D)
    inside = inside.unflatten(1, (case.offset_groups, -1)).permute(0, 3, 4, 2, 1).flatten()
    assert sorted(found) == inside.nonzero().flatten().tolist()


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=METAL_TYPES.get)
def test_positions_that_are_not_finite_or_at_the_border(operator: str, dtype: torch.dtype) -> None:
    # With one tap and one row of positions (y, x) = (offset[0], offset[1] + position).
    values = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -1.0, -0.5, 0.0, 1.0, 2.0, 2.5, 3.0, 4.0]
    positions = torch.tensor(list(product(values, values)))
    case = DeformConv2d(1, 4, 3, 3, 4, (1, 1), (1, 1), (0, 0))
    for part in positions.split(3):
        args = arguments(operator, case._replace(w=len(part)), dtype)
        offset = (part.T - torch.tensor([[0.0], [1.0]]) * torch.arange(len(part)))[None, :, None].to(dtype)
        i = 1 if operator == FORWARD else 2
        args[i] = torch.cat([offset, *[torch.zeros_like(offset)] * 2], 2)
        expected = oracle(reference, operator, args)
        for result, wanted in zip(run(operator, args), expected, strict=True):
            tolerance = TOLERANCES[dtype] * (1 + wanted.nan_to_num().abs().max().item())
            torch.testing.assert_close(result.double(), wanted, rtol=0, atol=tolerance, equal_nan=True)


@operators
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_pixel_that_is_not_finite_spoils_only_what_samples_it(operator: str, poison: float) -> None:
    case = DeformConv2d(2, 8, 4, 5, 3, offset_groups=2)
    args = arguments(operator, case, torch.float32)
    pixels = args[0 if operator == FORWARD else 1]
    for index in ((0, 0, 0, 0), (1, -1, -1, -1), (0, 3, 2, 2)):
        pixels[index] = poison
    expected = oracle(reference, operator, args)
    for result, wanted in zip(run(operator, args), expected, strict=True):
        assert torch.equal(result.isfinite(), wanted.isfinite())
        good = wanted.isfinite()
        torch.testing.assert_close(result[good].double(), wanted[good], rtol=1e-5, atol=1e-4)


@operators
@pytest.mark.parametrize(
    "case",
    [
        DeformConv2d(2, 4, 5, 6, 2, (3, 3), (2**40, 2**31)),
        DeformConv2d(2, 4, 5, 6, 2, (1, 1), (1, 1), (0, 0), (2**31, 2**40)),
        DeformConv2d(1, 4, 5, 6, 2, (1, 2), (2**29, 2**28), (2**28, 2**29), (1, 2**30)),
    ],
    ids=str,
)
def test_numbers_beyond_the_map(operator: str, case: DeformConv2d) -> None:
    args = arguments(operator, case, torch.float32)
    if case.padding[0] > 1:  # far outside the map, and offsets that lead back
        i = 1 if operator == FORWARD else 2
        args[i] = offsets_to(case, 2.0, 3.0)
        args[i][..., 0, 0] += 0.5
    expected = oracle(reference, operator, args)
    for result, wanted in zip(run(operator, args), expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return record_launches(monkeypatch, metal, "deform_conv2d")


def workspace(recorder: Recorder) -> tuple[int, int]:
    """The largest of the gradients: samples and cells."""
    gathers = [args for name, args in recorder.launches if name.startswith("deform_conv2d_backward_image")]
    return max(len(args[2]) for args in gathers), max(len(args[1]) for args in gathers) // 2


def test_the_cases_above_launch_every_kernel(recorder: Recorder) -> None:
    for operator, case, dtype in product(OPERATORS[DeformConv2d], CASES, (torch.float32, torch.float16)):
        getattr(metal, operator)(*arguments(operator, case, dtype, device="meta"))
    launched = {name for name, _ in recorder.launches}
    assert all(launched == {*dir(library("deform_conv2d", dtype)), "allocate_segments"} for dtype in METAL_TYPES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        DeformConv2d(1, 1, 2**15 - 1, 2**14 - 2, 1, (1, 1), (2, 2), (0, 0)),
        DeformConv2d(1, 2**29 - 1, 1, 1, 1, (1, 1), padding=(0, 0)),
        DeformConv2d(1, 2**27 - 1, 1, 1, 1, (1, 1), padding=(0, 0), offset_groups=2**27 - 1),
        DeformConv2d(1, 1, 1, 1, 1, (2**14 + 1, 2**14 - 1), padding=(2**13, 2**13 - 1)),
        DeformConv2d(1, 1, 1, 2**28 - 3, 1, (1, 1), padding=(0, 0)),
        DeformConv2d(1, 4, 2**13, 2**13, 4, stride=(2, 2), masked=False),
        DeformConv2d(2**21, 4, 8, 8, 4, (1, 1), (8, 8), (0, 0), offset_groups=4),
    ],
    ids=str,
)
def test_the_largest_sizes_fit_the_grid_and_32_bits(case: DeformConv2d, recorder: Recorder) -> None:
    for operator in OPERATORS[DeformConv2d]:
        getattr(metal, operator)(*arguments(operator, case, torch.float16, device="meta"))
    for _, args in recorder.launches:
        assert all(0 <= size < 2**31 for arg in args if isinstance(arg, list) for size in arg)
    samples, cells = workspace(recorder)
    taps = case.kernel_size[0] * case.kernel_size[1]
    cells_of_image = case.offset_groups * (case.h + 1) * (case.w + 1)
    assert samples <= max(metal.MAX_SAMPLES, case.offset_groups * taps)
    assert max(4 * samples, 2 * cells) < 2**31
    assert cells <= max(metal.MAX_CELLS, 2 * cells_of_image) < 2**31


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (DeformConv2d(1, 1, 2**15 - 1, 2**14 - 1, 1, (1, 1), (9, 9)), r"input must have .* \(W \+ 1\) below 2\*\*29"),
        (DeformConv2d(1, 2**27, 1, 1, 1, (1, 1), (9, 9), offset_groups=2**27), "input must have offset groups"),
        (DeformConv2d(1, 2**15, 2**10, 2**5, 1, (1, 1), (9, 9)), r"input must have fewer than 2\*\*30 elements"),
        (DeformConv2d(1, 1, 2**12, 2**12, 1, (8, 8), (1, 1), (4, 4)), r"offset must have fewer than 2\*\*31 elements"),
        (DeformConv2d(2**15, 1, 2**5, 2**5, 64, (1, 1), padding=(0, 0)), r"the result must have fewer than 2\*\*31 el"),
        (DeformConv2d(1, 2**20, 1, 1, 1, (2**5, 2**4), (9, 9), (2**4, 2**3)), r"weight must have C \* kh \* kw below"),
        (DeformConv2d(1, 2**17, 1, 1, 2**14, (1, 1), padding=(0, 0)), r"weight must have .* fewer than 2\*\*31"),
        (DeformConv2d(1, 1, 1, 1, 1, (1, 1), (2**31, 2**31), (2**30, 0)), r"padding must leave H \+ 2 \* padding"),
    ],
    ids=str,
)
def test_sizes_beyond_32_bits_are_refused_by_name(case: DeformConv2d, message: str, recorder: Recorder) -> None:
    for operator in OPERATORS[DeformConv2d]:
        with pytest.raises(ValueError, match=message):
            getattr(metal, operator)(*arguments(operator, case, torch.float32, device="meta"))
    assert not recorder.launches


class AsMpsTakesThem(TorchDispatchMode):
    """Fails where PyTorch's operators are called with what they get wrong on MPS."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        assert all(0 < x.numel() < 2**31 for x in tensors)
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.products += 1
            assert args[-2].shape[2] < 32767, "reads past its operands on M1 and M2"
            out = (kwargs or {}).get("out")
            if out is not None:
                assert out.is_contiguous(), "writes elsewhere"
                assert out.storage_offset() == 0, "writes elsewhere on macOS 14"
        return func(*args, **(kwargs or {}))


@dtypes
@operators
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        DeformConv2d(2, 256, 100, 152, 256),
        DeformConv2d(8, 64, 128, 128, 64),
        DeformConv2d(1, 64, 180, 320, 64, offset_groups=16),
        DeformConv2d(8, 128, 80, 80, 128),
        DeformConv2d(1, 32, 256, 256, 32, masked=False),
        DeformConv2d(4, 16, 200, 200, 1, (1, 1), padding=(0, 0)),
        DeformConv2d(1, 1024, 14, 14, 32, (7, 7), padding=(3, 3)),  # 50176 terms
        DeformConv2d(1, 4, 3, 3, 40000, (1, 1), padding=(0, 0)),
    ],
    ids=str,
)
def test_products_are_those_that_mps_gets_right(
    operator: str, dtype: torch.dtype, case: DeformConv2d, layout: torch.memory_format, recorder: Recorder
) -> None:
    args = arguments(operator, case, dtype, device="meta")
    args = [x.contiguous(memory_format=layout) if isinstance(x, Tensor) and x.ndim == 4 else x for x in args]
    with AsMpsTakesThem() as mode:
        getattr(metal, operator)(*args)
    assert mode.products > 0


def test_the_images_of_a_launch_are_those_of_its_positions(recorder: Recorder) -> None:
    # Positions 5 ... 14 of images that have 4 positions each.
    image, offset = torch.empty(9, 3, 3, 4), torch.empty(9, 2, 2, 2)
    geometry = Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1, 1)
    metal._sample(image, offset, None, geometry, 5, torch.empty(1, 10, 1, 4))
    ((_, args),) = recorder.launches
    assert [len(tensor) for tensor in args[:3]] == [3] * 3
    assert args[0].data_ptr() == image[1].data_ptr()


@pytest.mark.parametrize(
    "case",
    [
        DeformConv2d(1, 4, 2**9, 2**9, 4, (5, 5), padding=(2, 2)),
        DeformConv2d(4, 16, 200, 200, 4, offset_groups=4),
        DeformConv2d(1, 1, 9, 9, 1, (2**10, 2**9), padding=(2**9, 2**8)),  # more in one position
    ],
    ids=str,
)
def test_a_launch_has_few_samples_that_can_meet_in_one_cell(case: DeformConv2d, recorder: Recorder) -> None:
    getattr(metal, BACKWARD)(*arguments(BACKWARD, case, torch.float16, device="meta"))
    taps = case.kernel_size[0] * case.kernel_size[1]
    samples, _ = workspace(recorder)
    comparisons = samples**2 // case.offset_groups
    assert comparisons <= max(metal.MAX_COMPARISONS, case.offset_groups * taps**2)


def test_the_source_is_ascii() -> None:
    # PyTorch hands it to the compiler as ASCII, and a source that is not becomes nothing.
    assert SOURCE.isascii()


def test_the_launch_code_and_the_kernels_agree() -> None:
    for name in ("TILE_PAIRS", "TILE_POSITIONS", "GATHER_THREADS", "SIMD"):
        (value,) = re.findall(rf"constant constexpr int {name} = (\d+);", SOURCE)
        assert int(value) == getattr(metal, name)
    assert re.findall(r"^INSTANTIATE_ALL\((\d+)\)", SOURCE, re.MULTILINE) == [str(width) for width in metal.WIDTHS]


def test_every_dtype_of_the_backend_has_kernels() -> None:
    assert set(METAL_TYPES) == set(mps.DTYPES) == set(TOLERANCES)
