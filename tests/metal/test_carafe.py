"""The shipped Metal kernels of CARAFE and the code that launches them, in the emulator, against the float64 oracle."""

import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from layouts import channels_last, expanded, shifted, sliced, transposed
from problems import OPERATORS, TOLERANCES, Carafe, arguments, error
from torch import Tensor

from omniops.backends import memory_format, mps
from omniops.backends.mps import carafe as metal
from omniops.backends.mps._library import METAL_TYPES, library
from omniops.backends.reference import carafe as reference

SOURCES = {
    name: (Path(metal.__file__).parent / f"{name}.metal").read_text(encoding="utf-8")
    for name in ("carafe", "carafe_doubling")
}

pytestmark = pytest.mark.usefixtures("emulated")

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=METAL_TYPES.get)
operators = pytest.mark.parametrize("operator", OPERATORS[Carafe])

# N, C, H, W, kernel_size, group_size, scale_factor, stride
GENERAL = [(2, 6, 5, 7, k, 2, s, t) for k, s, t in product((1, 3, 5, 7), (1, 2, 3, 4), (1, 2, 3))] + [
    (1, 1, 1, 1, 5, 1, 2, 1),
    (1, 19, 3, 70, 5, 1, 3, 2),
    (3, 12, 33, 1, 3, 3, 2, 3),
    (1, 8, 1, 37, 7, 8, 4, 1),
    (2, 17, 6, 5, 9, 1, 2, 1),
]
DOUBLING = [
    (n, c, h, w, k, g, 2, 1)
    for k in (3, 5)
    for n, c, h, w, g in (
        (1, 8, 1, 1, 1),
        (1, 9, 1, 37, 1),
        (1, 11, 37, 1, 1),
        (1, 8, 2, 2, 1),
        (2, 20, 5, 6, 2),
        (1, 21, 6, 7, 1),
        (2, 8, 3, 35, 1),
        (1, 24, 4, 34, 3),
    )
]


def inputs(
    operator: str, dtype: torch.dtype, case: tuple[int, ...], device: str = "cpu"
) -> tuple[list[Tensor], list[int]]:
    """The tensors of an operator, and what it takes after them."""
    first, second, *numbers = arguments(operator, Carafe(*case), dtype, sum(case), device)
    return [first, second], numbers


def run(operator: str, tensors: list[Tensor], numbers: list[int]) -> Tensor:
    """The Metal kernel's result, every element of which it has written."""
    result: Tensor = emulator.launched(getattr(metal, operator), *tensors, *numbers)
    return result


def check(operator: str, tensors: list[Tensor], numbers: list[int]) -> None:
    result = run(operator, tensors, numbers)
    expected = getattr(reference, operator)(*(tensor.double() for tensor in tensors), *numbers)
    assert result.dtype == tensors[0].dtype
    assert result.shape == expected.shape
    assert memory_format(result) == memory_format(tensors[0])
    assert error(result, expected) < TOLERANCES[result.dtype]


@dtypes
@operators
@pytest.mark.parametrize("case", GENERAL, ids=str)
def test_every_kernel_size_scale_and_stride(operator: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    check(operator, *inputs(operator, dtype, case))


@dtypes
@operators
@pytest.mark.parametrize("case", DOUBLING, ids=str)
def test_doubling(operator: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    check(operator, *inputs(operator, dtype, case))


@dtypes
@operators
@pytest.mark.parametrize("case", [*GENERAL[::5], *GENERAL[-5:], *DOUBLING[::3]], ids=str)
def test_offsets_of_64_bits(
    operator: str, dtype: torch.dtype, case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal, "WIDE_ELEMENTS", 1)
    check(operator, *inputs(operator, dtype, case))


@dtypes
@pytest.mark.parametrize("case", [(2, 20, 5, 6, 5, 2, 2, 1), (1, 13, 3, 9, 3, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_channels_split_among_lanes(
    splits: int, dtype: torch.dtype, case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal, "MAX_SPLITS", splits)
    check("carafe_backward_masks", *inputs("carafe_backward_masks", dtype, case))


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": transposed,
    "sliced": sliced,
    **{f"shifted by {elements}": partial(shifted, elements=elements) for elements in (1, 2, 3)},
    "expanded": expanded,
}


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "as the first"])
@pytest.mark.parametrize("case", [(2, 16, 5, 6, 5, 2, 2, 1), (2, 4, 5, 7, 3, 2, 1, 2)], ids=str)
def test_layouts(operator: str, layout: str, other: str, case: tuple[int, ...]) -> None:
    (first, second), numbers = inputs(operator, torch.float16, case)
    change = LAYOUTS[layout]
    check(operator, [change(first), second if other == "contiguous" else change(second)], numbers)


@operators
@pytest.mark.parametrize(
    "case", [(1, 21, 6, 7, 5, 1, 2, 1), (1, 16, 3, 34, 5, 2, 2, 1), (2, 5, 6, 7, 3, 1, 3, 2)], ids=str
)
def test_the_order_of_threads_changes_no_bit(operator: str, case: tuple[int, ...]) -> None:
    tensors, numbers = inputs(operator, torch.float32, case)
    first, second = (run(operator, tensors, numbers) for _ in range(2))
    assert torch.equal(first, second)


@operators
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((1, 20, 6, 8, 5, 2, 2, 1), marks=pytest.mark.slow),
        (1, 9, 5, 7, 3, 1, 2, 1),
        (1, 8, 4, 7, 5, 1, 2, 1),
        (2, 6, 6, 7, 5, 2, 3, 2),
    ],
    ids=str,
)
def test_what_is_not_finite_spoils_only_what_depends_on_it(operator: str, poison: float, case: tuple[int, ...]) -> None:
    tensors, numbers = inputs(operator, torch.float32, case)
    taps = case[4] ** 2
    indices = [(0, c, y, x) for c in (0, taps // 2, -1) for y in (0, 2, -1) for x in (0, -1)]
    # The masks of the first and the last column of taps, which lie beside the map at its borders.
    indices += [
        (0, c, 2, x) for c in (taps // 2 - case[4] // 2, taps // 2 + case[4] // 2) for x in (0, 1, 2, -4, -2, -1)
    ]
    for i, index in ((i, index) for i in range(2) for index in indices if index[1] < tensors[i].shape[1]):
        spoilt = tensors.copy()
        spoilt[i] = tensors[i].clone()
        spoilt[i][index] = poison
        result = run(operator, spoilt, numbers)
        finite = getattr(reference, operator)(*(tensor.double() for tensor in tensors), *numbers)
        ones = [torch.ones_like(tensor) for tensor in tensors]
        ones[i].zero_()[index] = 1
        depends = getattr(reference, operator)(*ones, *numbers) != 0
        assert not result[depends].isfinite().any()
        torch.testing.assert_close(result[~depends].double(), finite[~depends], rtol=1e-5, atol=1e-5)


class Recorder:
    """Stands in for the library and keeps the launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, list[int], tuple[int, ...], tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def launch(*args: Any, threads: tuple[int, ...], group_size: tuple[int, ...], arg_casts: Any) -> None:
            assert arg_casts == {3: "int32"}
            self.launches.append((name, args[3], threads, group_size))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(metal, "library", lambda name, dtype: recorder)
    return recorder


def test_the_cases_above_launch_every_kernel(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for elements in (metal.WIDE_ELEMENTS, 1):
        monkeypatch.setattr(metal, "WIDE_ELEMENTS", elements)
        for operator, case in product(OPERATORS[Carafe], GENERAL + DOUBLING):
            tensors, numbers = inputs(operator, torch.float32, case, device="meta")
            getattr(metal, operator)(*tensors, *numbers)
    launched = {launch[0] for launch in recorder.launches}
    assert all(
        launched == {kernel for name in SOURCES for kernel in dir(library(name, dtype))} for dtype in METAL_TYPES
    )


@operators
@pytest.mark.parametrize(
    "case",
    [
        (1, 8, 1, 2**25 - 1, 5, 1, 2, 1),
        (1, 8, 2**25 - 1, 1, 5, 1, 2, 1),
        (1, 8, 1, 2**26 - 1, 5, 1, 2, 1),
        (1, 8, 2**13 - 1, 2**13 - 1, 5, 1, 2, 1),
        (1, 2**31 - 1, 1, 1, 5, 1, 2, 1),
        (1, 2**26, 3, 3, 5, 2**22, 2, 1),
        (2**20, 2**11 - 1, 1, 1, 1, 2**11 - 1, 1, 1),
        (1, 1, 2**28 - 1, 1, 7, 1, 1, 1),
        (1, 1, 2**14, 2**14 - 1, 1, 1, 1, 3),
        (1, 1, 1, 2**20, 1, 1, 2**4 - 1, 1),
        (1, 1, 1, 1, 46339, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_largest_sizes_fit_the_grid_and_32_bits(operator: str, case: tuple[int, ...], recorder: Recorder) -> None:
    tensors, numbers = inputs(operator, torch.float32, case, device="meta")
    getattr(metal, operator)(*tensors, *numbers)
    ((_, sizes, threads, group_size),) = recorder.launches
    assert all(0 < size < 2**31 for size in sizes)
    # Metal counts threads of an axis in 32 bits, and the kernels take them, whole groups of them, as int.
    assert all(-(-axis // group) * group <= 2**31 for axis, group in zip(threads, group_size, strict=True))
    assert torch.tensor(group_size).prod() <= 256


@operators
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((1, 8, 2**14, 2**14, 5, 1, 1, 2), r"features must have H \* W below 2\*\*28"),
        ((1, 8, 2**13, 2**13, 5, 1, 2, 1), r"(masks|grad) must have H \* W below 2\*\*28"),
        ((2, 2**30, 1, 1, 5, 1, 1, 1), r"(features|grad) must have N \* C below 2\*\*31"),
        ((1, 1, 1, 1, 46341, 1, 1, 1), r"masks must have N \* C below 2\*\*31"),
    ],
    ids=str,
)
def test_sizes_beyond_32_bits_are_refused_by_name(
    operator: str, case: tuple[int, ...], message: str, recorder: Recorder
) -> None:
    tensors, numbers = inputs(operator, torch.float32, case, device="meta")
    with pytest.raises(ValueError, match=message):
        getattr(metal, operator)(*tensors, *numbers)
    assert not recorder.launches


@operators
def test_a_stride_beyond_32_bits_leaves_one_centre(operator: str) -> None:
    for scale_factor, stride in ((1, 2**31), (2, 2**31 + 1), (1, 2**40)):
        check(operator, *inputs(operator, torch.float32, (2, 6, 5, 7, 3, 2, scale_factor, stride)))


@operators
@pytest.mark.parametrize(
    ("case", "variant"),
    [
        ((1, 8, 1, 2**24 - 2**19, 5, 1, 2, 1), "_k5_even"),  # the masks, and 8 planes more, are the largest
        ((1, 8, 1, 2**24, 5, 1, 2, 1), "_wide"),
        ((1, 2**10, 2**9, 2**9, 3, 1, 2, 1), "_k3_even"),  # the result
        ((1, 2**11 - 8, 2**9, 2**9, 3, 1, 2, 1), "_wide"),
        ((1, 2**11 - 9, 2**10, 2**10, 1, 1, 1, 2), ""),  # the features
        ((1, 2**11 - 8, 2**10, 2**10, 1, 1, 1, 2), "_wide"),
    ],
    ids=str,
)
def test_tensors_that_32_bits_do_not_reach_go_to_the_wide_kernels(
    operator: str, case: tuple[int, ...], variant: str, recorder: Recorder
) -> None:
    tensors, numbers = inputs(operator, torch.float32, case, device="meta")
    getattr(metal, operator)(*tensors, *numbers)
    assert [launch[0] for launch in recorder.launches] == [f"{operator}{variant}"]


def test_the_source_is_ascii() -> None:
    # PyTorch hands it to the compiler as ASCII, and a source that is not becomes nothing.
    assert all(source.isascii() for source in SOURCES.values())


@pytest.mark.parametrize("name", ["CHANNELS", "ROWS", "TAPS", "SIMD"])
def test_the_launch_code_and_the_kernels_agree(name: str) -> None:
    values = re.findall(rf"constant constexpr int {name} = (\d+);", "".join(SOURCES.values()))
    assert {int(value) for value in values} == {getattr(metal, name)}


@dtypes
def test_the_launch_code_and_the_kernels_agree_on_channels(dtype: torch.dtype) -> None:
    ((float_channels, half_channels),) = re.findall(
        r"FORWARD_CHANNELS = sizeof\(T\) == 4 \? (\d+) : (\d+);", SOURCES["carafe_doubling"]
    )
    assert int(float_channels if dtype.itemsize == 4 else half_channels) == metal.forward_channels(dtype)


def test_every_dtype_of_the_backend_has_kernels() -> None:
    assert set(METAL_TYPES) == set(mps.DTYPES) == set(TOLERANCES)
