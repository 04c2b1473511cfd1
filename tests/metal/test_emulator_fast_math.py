"""Fast math: what a kernel reads and writes has to be right where the compiler takes all floats to be finite."""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import OPERATORS, TOLERANCES, DeformConv2d, MultiScaleDeformAttn, arguments
from test_emulator import compiled
from torch import Tensor

from omniops.backends.mps import deform_conv2d as metal
from omniops.backends.mps import multi_scale_deform_attn as attention
from omniops.backends.mps._library import library

VALUES = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -1.0, 0.5, 7.5]

# A thread looks x up in eight elements, if ``inside`` says that it may.
LOOK_UP = """
inline bool is_finite(float value) {{ return (as_type<uint>(value) & 0x7fffffffu) < 0x7f800000u; }}
kernel void look_up(device const {0}* x_ [[buffer(0)]], device const float* table [[buffer(1)]],
                    device float* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
  const float x = 1.5f * float(x_[i]);
  out[i] = {1} ? table[int({2})] : 0.0f;
}}"""
REMOVED = r"outside argument 1|converts a float that is not finite"
RANGE = "x >= 0.0f && x < 8.0f"


def look_up(inside: str, fast_math: bool, type: str = "float", index: str = "x") -> None:
    kernels = compiled(LOOK_UP.format(type, inside, index), fast_math=fast_math)
    x = torch.tensor(VALUES).to({"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}[type])
    for _ in range(20):  # what a comparison with a NaN says is left to chance
        kernels.look_up(x, torch.zeros(8), torch.zeros(8), threads=8, group_size=8)


@pytest.mark.parametrize(
    "inside",
    [
        RANGE,
        f"x == x && {RANGE}",
        f"!isnan(x) && !isinf(x) && {RANGE}",
        f"isfinite(x) && {RANGE}",
        "!(x < 0.0f || x >= 8.0f || isnan(x))",
        f"is_finite(x) && {RANGE}",  # the compiler knows an argument to be finite, and so its bits
    ],
)
def test_bounds_checks_that_fast_math_removes(inside: str) -> None:
    """Planted: without fast math they are right."""
    look_up(inside, fast_math=False)
    with pytest.raises(KernelError, match=REMOVED):
        look_up(inside, fast_math=True)


CLAMPS = ["clamp(x, 0.0f, 7.0f)", "fmin(fmax(x, 0.0f), 7.0f)", "min(max(float2(x), float2(0)), float2(7)).y"]


@pytest.mark.parametrize("index", CLAMPS)
def test_a_clamp_that_lets_a_nan_through(index: str) -> None:
    """Planted: without fast math a NaN becomes a bound."""
    look_up("true", fast_math=False, index=index)
    with pytest.raises(KernelError, match=REMOVED):
        look_up("true", fast_math=True, index=index)


@pytest.mark.parametrize(
    ("type", "bits"),
    [
        ("float", "(as_type<uint>(x_[i]) & 0x7fffffffu) < 0x7f800000u"),
        ("half", "(as_type<ushort>(x_[i]) & 0x7fffu) < 0x7c00u"),
        ("bfloat", "(as_type<ushort>(x_[i]) & 0x7fffu) < 0x7f80u"),
    ],
)
def test_a_bounds_check_of_the_bits_in_memory_stays(type: str, bits: str) -> None:
    look_up(f"{bits} && {RANGE}", fast_math=True, type=type)


@pytest.mark.parametrize("function", ["exp2(log2(x))", "pow(x, 1.0f)", "x * x * rsqrt(x * x)", "exp(log(x))"])
def test_functions_are_less_exact(function: str) -> None:
    source = f"""kernel void f(device const float* a, device float* out, uint i [[thread_position_in_grid]]) {{
      const float x = a[i]; out[i] = {function};
    }}"""
    a, out = torch.tensor([1.0, 2.0, 4.0, 64.0, 4096.0]), torch.zeros(5)
    compiled(source, fast_math=True).f(a, out)
    torch.testing.assert_close(out, a, rtol=1e-4, atol=0)
    assert not torch.equal(out, a)


def test_an_index_from_an_approximation() -> None:
    """Planted: 2 to the power of log2(8) is 8 if log2(8) is 3, and 4 where it is 2.9999."""
    source = """kernel void f(device const float* a, device float* out) {
      const int bits = int(log2(a[0]));
      out[(1 << bits) - 8] = 1.0f;
    }"""
    compiled(source).f(torch.tensor([8.0]), torch.zeros(1), threads=1)
    with pytest.raises(KernelError, match=re.escape("outside argument 1 (device float* out), byte -16 of 4")):
        compiled(source, fast_math=True).f(torch.tensor([8.0]), torch.zeros(1), threads=1)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The kernels that the launch code compiles, with fast math."""
    names: set[str] = set()

    def compile_shader(source: str) -> Any:
        compiled = emulator.compile_shader(source, fast_math=True)
        names.update(dir(compiled))
        return compiled

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
    library.cache_clear()
    yield names
    library.cache_clear()


FAR = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e30, -1e30, 65504.0, 2.0**31, -(2.0**31), -1.0, -0.5, 0.0, 2.5]


@pytest.mark.slow
def test_deform_conv2d_stays_in_bounds(kernels: set[str]) -> None:
    cases = [
        # 1, 4 and 8 channels of a group: each width that a kernel may load channels with.
        DeformConv2d(2, 16, 6, 5, 8),
        DeformConv2d(2, 12, 5, 6, 8),
        DeformConv2d(2, 6, 5, 4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    ]
    with emulator.launches() as launched:
        for case, dtype, operator, seed in product(cases, TOLERANCES, OPERATORS[DeformConv2d], range(4)):
            args = arguments(operator, case, dtype, seed)
            index = 1 if operator == "deform_conv2d" else 2
            args[index] = some_far(args[index], seed)
            with emulator.poisoned():
                getattr(metal, operator)(*args)
    others = {"collect_segments"}  # beside allocate_segments
    assert {launch.kernel for launch in launched} == kernels - others


def some_far(values: Tensor, seed: int) -> Tensor:
    """Half of them replaced."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 2 * len(FAR), values.shape, generator=generator)
    return torch.where(chosen < len(FAR), torch.tensor([*FAR, *FAR]).to(values.dtype)[chosen], values)


@pytest.mark.slow
def test_multi_scale_deform_attn_stays_in_bounds(kernels: set[str]) -> None:
    cases = [
        MultiScaleDeformAttn(2, ((6, 9), (0, 3), (4, 4)), 13, 2, channels, (2, 1, 3), discrete, wide)
        for channels in (3, 12, 16)
        for discrete in (False, True)
        for wide in ("", "locations")
    ]
    with emulator.launches() as launched:
        for case, dtype, operator, seed in product(cases, TOLERANCES, OPERATORS[MultiScaleDeformAttn], range(2)):
            args = arguments(operator, case, dtype, seed)
            index = 2 if operator == "multi_scale_deform_attn" else 3
            args[index] = some_far(args[index], seed)
            with emulator.poisoned():
                getattr(attention, operator)(*args)
    assert {launch.kernel for launch in launched} == kernels
