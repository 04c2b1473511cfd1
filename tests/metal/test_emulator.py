"""The emulator itself: what it runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from torch import Tensor

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
# Of the kernels that declare none themselves, which are not those in templates' instantiations.
LIMIT = "[[max_total_threads_per_threadgroup(1024)]]"
_UNLIMITED = re.compile(r"(?<!\]\] )(?<!template )\bkernel (?=void|int)")


def compiled(source: str, **options: Any) -> Any:
    return emulator.compile_shader(HEADER + _UNLIMITED.sub(f"{LIMIT} kernel ", source), **options)


COPY = """kernel void copy(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
uint i [[thread_position_in_grid]]) { out[i] = a[i]; }"""


def mapped(expression: str, *inputs: Tensor, out: torch.dtype = torch.float32, type: str = "float") -> Tensor:
    """``expression`` of a, b, c at every element; ``type`` is the result's in Metal."""
    names = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat", torch.int32: "int",
             torch.int64: "long", torch.uint8: "uchar", torch.int16: "short"}  # fmt: skip
    parameters = "".join(f"device const {names[x.dtype]}* {n}_, " for x, n in zip(inputs, "abc", strict=False))
    values = "".join(f"const {names[x.dtype]} {n} = {n}_[i];" for x, n in zip(inputs, "abc", strict=False))
    library = compiled(
        f"kernel void map({parameters}device {type}* out, uint i [[thread_position_in_grid]]) "
        f"{{ {values} out[i] = {expression}; }}"
    )
    result = torch.zeros(inputs[0].shape, dtype=out)
    library.map(*inputs, result)
    return result


# What it runs.


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("exp(a)", torch.exp),
        ("metal::log(abs(a) + 1)", lambda a: torch.log(a.abs() + 1)),
        ("floor(a) + ceil(a) + trunc(a) + rint(a)", lambda a: a.floor() + a.ceil() + a.trunc() + a.round()),
        ("sqrt(fabs(a)) * rsqrt(fabs(a))", torch.ones_like),
        ("fma(a, a, 1.0)", lambda a: a * a + 1),
        ("clamp(a, -0.5, 0.5) + min(a, 0.0) + max(a, 0.0)", lambda a: a.clamp(-0.5, 0.5) + a),
        ("select(1.0f, 2.0f, a > 0)", lambda a: torch.where(a > 0, 2.0, 1.0)),
        ("mix(a, 1.0f, 0.25f)", lambda a: 0.75 * a + 0.25),
        ("pow(abs(a), 2.0f) + sign(a) + step(0.0f, a)", lambda a: a * a + a.sign() + (a >= 0)),
        ("sin(a) + cos(a) + tanh(a) + exp2(a)", lambda a: a.sin() + a.cos() + a.tanh() + a.exp2()),
        ("as_type<float>(as_type<int>(a) & 0x7fffffff)", torch.abs),
        ("float4(a, float2(1, 2), 3).z + float4(a).w", lambda a: a + 2),
        ("dot(float2(a, 1), vec<float, 2>(2.0, 3.0))", lambda a: 2 * a + 3),
        ("float(half(a))", lambda a: a.half().float()),
        ("float(static_cast<bfloat>(a))", lambda a: a.bfloat16().float()),
        ("float(1.5h * half(2)) + (isnan(NAN) && isinf(INFINITY) && isfinite(a) ? a : 0)", lambda a: a + 3),
        ("metal::numeric_limits<float>::max() > a ? a : 0", lambda a: a),
        ("a * (1.0 / 3)", lambda a: a * (torch.tensor(1.0) / 3)),
        ("float(popcount(uint(5)) + clz(1u) + ctz(8u)) + precise::exp(0.0) + fast::log(1.0f) + a", lambda a: a + 37),
    ],
)
def test_functions(expression: str, expected: Callable[[Tensor], Tensor]) -> None:
    a = torch.linspace(-3, 3, 62)
    torch.testing.assert_close(mapped(expression, a), expected(a), rtol=3e-6, atol=3e-6)


def test_halves_round_as_torch_rounds_them() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    floats = torch.cat([halves.float() * scale for scale in (1, 1 + 2**-11, 1 + 3 * 2**-12, 2**-9)])
    assert torch.equal(mapped("float(a)", halves).nan_to_num(7), halves.float().nan_to_num(7))
    for dtype, name in ((torch.float16, "half"), (torch.bfloat16, "bfloat")):
        result = mapped(f"{name}(a)", floats, out=dtype, type=name)
        assert torch.equal(result.nan_to_num(7), floats.to(dtype).nan_to_num(7))


def test_half_arithmetic_rounds_after_each_operation() -> None:
    a, b = torch.randn(2, 1000).half()
    assert torch.equal(mapped("a * b + a", a, b, out=torch.float16, type="half"), a * b + a)


def test_integers() -> None:
    a = torch.arange(-50, 50, dtype=torch.int32)
    assert torch.equal(mapped("abs(a) + max(a, 3) + (a >> 1)", a, out=torch.int32, type="int"),
                       a.abs() + a.clamp(3) + (a >> 1))  # fmt: skip
    b = a + 50
    assert torch.equal(mapped("long(a) << 40", b, out=torch.int64, type="long"), b.long() << 40)


def test_positions_of_partial_groups() -> None:
    library = compiled("""
    kernel void positions(device int* out, uint3 at [[thread_position_in_grid]], uint3 grid [[threads_per_grid]],
        ushort3 inside [[thread_position_in_threadgroup]], ushort3 size [[threads_per_threadgroup]],
        uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],
        ushort index [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]],
        ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
      device int* mine = out + 9 * ((at.z * grid.y + at.y) * grid.x + at.x);
      const int values[9] = {int(inside.x), int(size.x), int(size.y), int(group.x), int(group.y), int(groups.x),
                             int(index), int(lane), int(simdgroup)};
      for (int i = 0; i < 9; ++i) mine[i] = values[i];
    }""")
    out = torch.zeros(2, 5, 70, 9, dtype=torch.int32)
    library.positions(out, threads=(70, 5, 2), group_size=(32, 2, 1))
    for z, y, x in ((0, 0, 0), (1, 4, 69), (0, 3, 64)):
        width, height = min(32, 70 - x // 32 * 32), min(2, 5 - y // 2 * 2)
        index = y % 2 * width + x % 32
        expected = [x % 32, width, height, x // 32, y // 2, 3, index, index % 32, index // 32]
        assert out[z, y, x].tolist() == expected


def test_threads_default_to_the_elements_of_the_first_tensor() -> None:
    library = compiled("kernel void one(constant float& v, device float* out, uint i [[thread_position_in_grid]]) "
                       "{ out[i] = v; }")  # fmt: skip
    out = torch.zeros(3, 700)
    library.one(1.5, out)
    assert bool((out == 1.5).all())


def test_templates_macros_and_both_ways_to_instantiate() -> None:
    library = compiled("""
    template <typename T, int N> struct Times { T value; T get() const { return value * T(N); } };
    template <typename T, int N>
    kernel void times(device const T* a [[buffer(0)]], device T* out [[buffer(1)]],
                      uint i [[thread_position_in_grid]]) {
      const Times<T, N> times{a[i]};
      out[i] = times.get();
    }
    #define INSTANTIATE(T) \\
      template [[host_name("times_" #T)]] kernel void times<T, 3>(device const T*, device T*, uint);
    INSTANTIATE(float)
    INSTANTIATE(half)
    template [[host_name("times_two")]] [[kernel]] decltype(times<int, 2>) times<int, 2>;
    [[kernel, max_total_threads_per_threadgroup(1)]] void plain(device int* x) { x[0] = 7; }
    """)
    assert dir(library) == ["plain", "times_float", "times_half", "times_two"]
    for name, dtype, factor in (("times_float", torch.float32, 3), ("times_half", torch.float16, 3),
                                ("times_two", torch.int32, 2)):  # fmt: skip
        a, out = torch.arange(10, dtype=dtype), torch.zeros(10, dtype=dtype)
        getattr(library, name)(a, out)
        assert torch.equal(out, a * factor)
    with pytest.raises(AttributeError, match="no kernel 'missing'; the source has times_float"):
        library.missing(a)


def test_pytorch_headers_are_embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # One of ours, because no header of PyTorch's that the emulator compiles is in every version.
    header = tmp_path / "include" / "c10" / "metal" / "common.h"
    header.parent.mkdir(parents=True)
    header.write_text("#pragma once\nnamespace c10 { namespace metal { constant unsigned max_ndim = 16; } }\n")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    library = compiled(
        "#include <c10/metal/common.h>\nkernel void f(device int* x) { x[0] = int(c10::metal::max_ndim); }"
    )
    x = torch.zeros(1, dtype=torch.int32)
    library.f(x)
    assert x.item() == 16


TILE = """
kernel void reversed(device const float* x, device float* out, uint t [[thread_position_in_threadgroup]],
                     uint n [[threads_per_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
  threadgroup float tile[256];
  tile[t] = x[256 * g + t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[256 * g + t] = tile[n - 1 - t];
}"""


def test_threadgroup_memory() -> None:
    x = torch.randn(600)
    out = torch.zeros(600)
    compiled(TILE).reversed(x, out, threads=600, group_size=256)
    assert torch.equal(out, torch.cat([part.flip(0) for part in x.split(256)]))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(x)", lambda x: x.sum().expand(32)),
        ("simd_max(x) - simd_min(x)", lambda x: (x.max() - x.min()).expand(32)),
        ("simd_shuffle(x, ushort(31 - lane))", lambda x: x.flip(0)),
        ("simd_shuffle_xor(x, 1)", lambda x: x.view(16, 2).flip(1).flatten()),
        ("simd_shuffle_down(x, 4)", lambda x: torch.cat([x[4:], x[-4:]])),
        ("simd_shuffle_up(x, 4)", lambda x: torch.cat([x[:4], x[:-4]])),
        ("simd_broadcast(x, 5)", lambda x: x[5].expand(32)),
        ("simd_prefix_inclusive_sum(x)", lambda x: x.cumsum(0)),
        ("simd_prefix_exclusive_sum(x)", lambda x: x.cumsum(0) - x),
        ("float(popcount(uint(ulong(simd_ballot(x > 0)))))", lambda x: (x > 0).sum().float().expand(32)),
        ("(simd_all(x < 99) && simd_any(x == x) ? 1.0 : 0.0)", torch.ones_like),
    ],
)
def test_simdgroup_functions(expression: str, expected: Callable[[Tensor], Tensor]) -> None:
    library = compiled(f"""
    kernel void f(device const float* a, device float* out, uint i [[thread_position_in_grid]],
                  ushort lane [[thread_index_in_simdgroup]]) {{
      const float x = a[i];
      out[i] = {expression};
      (void)lane;
    }}""")
    a, out = torch.randint(-9, 9, (64,)).float(), torch.zeros(64)
    library.f(a, out, threads=64, group_size=64)
    assert torch.equal(out, torch.cat([expected(part) for part in a.split(32)]))


def test_lanes_of_a_partial_simdgroup_and_lanes_that_left_are_inactive() -> None:
    library = compiled("""
    kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
      if (i % 2 == 1) return;
      out[i] = simd_sum(1.0f);
    }""")
    out = torch.zeros(42)
    library.f(out, threads=42, group_size=42)
    assert out[::2].tolist() == [16.0] * 16 + [5.0] * 5


def test_atomics() -> None:
    library = compiled("""
    kernel void f(device atomic_int* sums, device atomic_float* total, device atomic_uint* peak, device float* out,
                  uint i [[thread_position_in_grid]], uint t [[thread_position_in_threadgroup]]) {
      threadgroup atomic_uint count;
      if (t == 0) atomic_store_explicit(&count, 0, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&sums[i % 3], int(i), memory_order_relaxed);
      atomic_fetch_add_explicit(total, 0.5f, memory_order_relaxed);
      atomic_fetch_max_explicit(peak, i, memory_order_relaxed);
      atomic_fetch_or_explicit(&count, 1u << t % 8, memory_order_relaxed);
      int expected = atomic_load_explicit(&sums[3], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(&sums[3], &expected, expected + 1, memory_order_relaxed,
                                                    memory_order_relaxed)) {}
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[i] = float(atomic_load_explicit(&count, memory_order_relaxed));
    }""")
    sums, total, peak, out = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(100),
    )
    library.f(sums, total, peak, out, threads=100, group_size=40)
    assert sums.tolist() == [sum(range(k, 100, 3)) for k in range(3)] + [100]
    assert (total.item(), peak.item()) == (50.0, 99)
    assert bool((out == 255).all())


def test_views_bind_at_their_storage_offset_and_may_share_storage() -> None:
    library = compiled("kernel void copy(device const float* a, device float* out, constant long& step, "
                       "uint i [[thread_position_in_grid]]) { out[i] = a[i * step]; }")  # fmt: skip
    storage = torch.arange(40.0)
    library.copy(storage[20:40:4], storage[3:8], 4, threads=5)
    assert storage[:10].tolist() == [0, 1, 2, 20, 24, 28, 32, 36, 8, 9]


def test_the_order_of_threads_is_shuffled_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled("kernel void f(device atomic_int* next, device int* out, uint i [[thread_position_in_grid]]) "
                       "{ out[i] = atomic_fetch_add_explicit(next, 1, memory_order_relaxed); }")  # fmt: skip

    def order(seed: int) -> list[int]:
        monkeypatch.setattr(emulator, "_seeds", iter([seed]))
        out = torch.zeros(100, dtype=torch.int32)
        library.f(torch.zeros(1, dtype=torch.int32), out, threads=100, group_size=10)
        return out.tolist()

    assert order(1) == order(1) != order(2) != sorted(order(1))


def test_simdgroups_run_in_any_order() -> None:
    """In some launches threads mix, in some whole simdgroups run one after the other, and in some backwards."""
    library = compiled("kernel void f(device atomic_int* next, device int* out, uint i [[thread_position_in_grid]]) "
                       "{ out[i] = atomic_fetch_add_explicit(next, 1, memory_order_relaxed); }")  # fmt: skip
    found = set()
    for _ in range(40):
        turns = torch.zeros(96, dtype=torch.int32)
        library.f(torch.zeros(1, dtype=torch.int32), turns, threads=96, group_size=96)
        first, second, third = (simdgroup.float().mean().item() for simdgroup in turns.split(32))
        if first + 20 < second < third - 20:
            found.add("forwards")
        elif first - 20 > second > third + 20:
            found.add("backwards")
        elif max(abs(first - second), abs(second - third)) < 20:
            found.add("mixed")
    assert found == {"forwards", "backwards", "mixed"}
