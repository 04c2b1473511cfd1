"""The emulator itself: what it runs, and the mistakes that it has to catch."""
# A source and what is said of it stand on one line each.
# ruff: noqa: E501

import math
import re
from collections.abc import Callable
from typing import Any

import emulator
import pytest
import torch
from emulator import CompileError, KernelError
from torch import Tensor

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def compiled(source: str) -> Any:
    return emulator.compile_shader(HEADER + source)


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
    [[kernel]] void plain(device int* x) { x[0] = 7; }
    """)
    assert dir(library) == ["plain", "times_float", "times_half", "times_two"]
    for name, dtype, factor in (("times_float", torch.float32, 3), ("times_half", torch.float16, 3),
                                ("times_two", torch.int32, 2)):  # fmt: skip
        a, out = torch.arange(10, dtype=dtype), torch.zeros(10, dtype=dtype)
        getattr(library, name)(a, out)
        assert torch.equal(out, a * factor)
    with pytest.raises(AttributeError, match="no kernel 'missing'; the source has times_float"):
        library.missing(a)


def test_pytorch_headers_are_embedded() -> None:
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
    kernel void f(device atomic_int* sums, device atomic_float* total, device atomic_uint* most, device float* out,
                  uint i [[thread_position_in_grid]], uint t [[thread_position_in_threadgroup]]) {
      threadgroup atomic_uint count;
      if (t == 0) atomic_store_explicit(&count, 0, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&sums[i % 3], int(i), memory_order_relaxed);
      atomic_fetch_add_explicit(total, 0.5f, memory_order_relaxed);
      atomic_fetch_max_explicit(most, i, memory_order_relaxed);
      atomic_fetch_or_explicit(&count, 1u << t % 8, memory_order_relaxed);
      int expected = atomic_load_explicit(&sums[3], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(&sums[3], &expected, expected + 1, memory_order_relaxed,
                                                    memory_order_relaxed)) {}
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[i] = float(atomic_load_explicit(&count, memory_order_relaxed));
    }""")
    sums, total, most, out = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(100),
    )
    library.f(sums, total, most, out, threads=100, group_size=40)
    assert sums.tolist() == [sum(range(k, 100, 3)) for k in range(3)] + [100]
    assert (total.item(), most.item()) == (50.0, 99)
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


# The argument rules.

SCALARS = """
kernel void floats(device float* out, constant float* v) { out[0] = v[0]; }
kernel void longs(device long* out, constant long* v, uint i [[thread_position_in_grid]]) { out[i] = v[i]; }
kernel void one_long(device long* out, constant long& v) { out[0] = v; }
kernel void one_int(device int* out, constant int& v) { out[0] = v; }
kernel void one_uint(device int* out, constant uint& v) { out[0] = int(v); }
kernel void one_char(device int* out, constant char& v) { out[0] = v; }
kernel void one_uchar(device int* out, constant uchar& v) { out[0] = v; }
kernel void one_short(device int* out, constant short& v) { out[0] = v; }
kernel void one_half(device half* out, constant half& v) { out[0] = v; }
kernel void one_bfloat(device bfloat* out, constant bfloat& v) { out[0] = v; }
kernel void three(device int* out, constant int3& v) { out[0] = v.z; }
struct Two { int a; int b; };
kernel void two(device int* out, constant Two& v) { out[0] = v.a + v.b; }
"""


@pytest.mark.parametrize(
    ("name", "dtype", "value", "casts", "expected"),
    [
        ("floats", torch.float32, 0.1, None, 0.1),
        ("floats", torch.float32, [0.25, 1.0], None, 0.25),
        ("one_long", torch.int64, -(2**62), None, -(2**62)),
        ("one_int", torch.int32, -5, "int32", -5),
        ("one_int", torch.int32, -5, {1: "int32"}, -5),
        ("one_short", torch.int32, -300, "int16", -300),
        ("one_char", torch.int32, -3, "int8", -3),
        ("one_uchar", torch.int32, 200, "uint8", 200),
        ("one_half", torch.float16, 0.5, "fp16", 0.5),
        ("one_bfloat", torch.bfloat16, 3.0, "bf16", 3.0),
        ("two", torch.int32, (3, 4), "int32", 7),
    ],
)
def test_python_values_arrive(name: str, dtype: torch.dtype, value: Any, casts: Any, expected: float) -> None:
    out = torch.zeros(1, dtype=dtype)
    getattr(compiled(SCALARS), name)(out, value, arg_casts=casts, threads=1)
    assert out.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "dtype", "value", "casts", "error", "message"),
    [
        ("one_long", torch.int64, True, None, TypeError, "got bool"),
        ("longs", torch.int64, [1, True], None, TypeError, "got bool"),
        (
            "one_long",
            torch.int64,
            1.0,
            None,
            TypeError,
            "1.0 arrives as float; declare constant float or use arg_casts",
        ),
        ("floats", torch.float32, 1, None, TypeError, "1 arrives as long"),
        ("one_int", torch.int32, 1, None, TypeError, "1 arrives as long"),
        ("longs", torch.int64, [1, 2], "int32", TypeError, "arrives as int; declare constant int"),
        ("one_uint", torch.int32, 1, "int32", TypeError, "1 arrives as int"),
        ("one_uint", torch.int32, 1, "uint32", ValueError, "unknown arg_casts 'uint32'"),
        ("one_int", torch.int32, 2**31, "int32", ValueError, "does not fit into int32"),
        ("one_long", torch.int64, 2**63, None, ValueError, "does not fit into int64"),
        ("one_half", torch.float16, 1e6, "fp16", ValueError, "does not fit into fp16"),
        ("one_int", torch.int32, 1.5, "int32", TypeError, "would truncate the float 1.5"),
        ("three", torch.int32, [1, 2, 3], "int32", TypeError, "has 12 bytes, the parameter has 16"),
        ("one_long", torch.int64, [1, 2], None, TypeError, "has 16 bytes, the parameter has 8"),
        ("longs", torch.int64, [], None, ValueError, "empty list"),
        ("longs", torch.int64, [1, 2.0], None, TypeError, "both int and float"),
        ("longs", torch.int64, "12", None, TypeError, "got str"),
        ("longs", torch.int64, None, None, TypeError, "got NoneType"),
        ("longs", torch.int64, [1] * 513, None, ValueError, "setBytes takes at most 4096"),
        ("one_long", torch.int64, 1, {0: "int32"}, ValueError, "arg_casts names argument 0"),
        ("one_long", torch.int64, 1, ["int32"], TypeError, "arg_casts must be a string or a dict"),
    ],
)
def test_python_values_that_would_be_misread(
    name: str, dtype: torch.dtype, value: Any, casts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        getattr(compiled(SCALARS), name)(torch.zeros(600, dtype=dtype), value, arg_casts=casts, threads=1)


COPY = """kernel void copy(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
uint i [[thread_position_in_grid]]) { out[i] = a[i]; }"""


@pytest.mark.parametrize(
    ("args", "launch", "error", "message"),
    [
        ((), {}, ValueError, "threads is not given"),
        (("f",), {}, TypeError, "1 arguments for 2 buffers (device const float* a, device float* out)"),
        (("f", "f", "f"), {}, TypeError, "3 arguments for 2 buffers"),
        (("h", "f"), {}, TypeError, "argument 0 (device const float* a): got a torch.float16 tensor"),
        (("f", "i"), {}, TypeError, "argument 1 (device float* out): got a torch.int32 tensor"),
        (("d", "f"), {}, TypeError, "MPS has no torch.float64"),
        (("f", "number"), {}, TypeError, "a Python value needs a constant parameter"),
        (("f", "f"), {"threads": (2, 2), "group_size": 4}, ValueError, "group_size has 1 axes, threads has 2"),
        (("f", "f"), {"threads": 4, "group_size": (4, 1)}, ValueError, "group_size has 2 axes, threads has 1"),
        (("f", "f"), {"threads": 2048, "group_size": 1025}, ValueError, "more than 1024 threads"),
        (("f", "f"), {"threads": (64, 64), "group_size": (64, 64)}, ValueError, "more than 1024 threads"),
        (("f", "f"), {"threads": 0}, ValueError, "threads must be positive"),
        (("f", "f"), {"threads": -1}, ValueError, "threads must be positive"),
        (("f", "f"), {"threads": True}, TypeError, "threads must be ints"),
        (("f", "f"), {"threads": 4.0}, TypeError, "threads must be ints"),
        (("f", "f"), {"threads": (1, 1, 1, 1)}, ValueError, "1 to 3 axes"),
    ],
)  # fmt: skip
def test_launches_that_are_refused(
    args: tuple[str, ...], launch: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = {"f": torch.zeros(4), "h": torch.zeros(4).half(), "i": torch.zeros(4).int(), "d": torch.zeros(4).double(),
              "number": 1.0}  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        compiled(COPY).copy(*(values[arg] for arg in args), **launch)


def test_a_group_larger_than_the_kernel_says() -> None:
    library = compiled("""
    [[max_total_threads_per_threadgroup(64)]] kernel void plain(device int* x, uint i [[thread_position_in_grid]]) {
      x[i] = 1;
    }
    template <int N>
    [[kernel, max_total_threads_per_threadgroup(96)]] void many(device int* x, uint i [[thread_position_in_grid]]) {
      x[i] = N;
    }
    template [[host_name("many_2")]] [[kernel]] decltype(many<2>) many<2>;
    """)
    x = torch.zeros(100, dtype=torch.int32)
    library.plain(x)
    assert bool((x == 1).all())
    library.many_2(x, threads=100, group_size=96)
    assert bool((x == 2).all())
    with pytest.raises(ValueError, match=re.escape("group_size (65,) is more than its max_total_threads_per_threadgr")):
        library.plain(x, threads=100, group_size=65)
    with pytest.raises(ValueError, match=re.escape("(32, 4) is more than its max_total_threads_per_threadgroup(96)")):
        library.many_2(x, threads=(100, 1), group_size=(32, 4))


def test_constant_tensors_begin_at_multiples_of_four_bytes() -> None:
    library = compiled("kernel void f(constant half* a, device half* out) { out[0] = a[0]; }")
    with pytest.raises(ValueError, match="has to begin at a multiple of 4 bytes"):
        library.f(torch.zeros(4).half()[1:], torch.zeros(1).half(), threads=1)
    library.f(torch.zeros(4).half()[2:], torch.zeros(1).half(), threads=1)


def test_a_storage_of_two_element_sizes() -> None:
    library = compiled("kernel void f(device float* a, device half* b) { b[0] = half(a[0]); }")
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="share storage but not the size of elements"):
        library.f(x, x.view(torch.float16), threads=1)


# Sources that are not Metal.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kernel void f(device float* x) { double y = 1; }", "line 3: Metal has no double"),
        ("kernel void f(device const float* x) { x[0] = 1; }", "read-only variable is not assignable"),
        ("kernel void f(constant float* x) { x[0] = 1; }", "read-only variable is not assignable"),
        ("kernel void f(device float* x, constant float* y) { device const float* z = y; x[0] = z[0]; }", "cannot initialize"),
        ("float g(threadgroup float* x) { return x[0]; }\nkernel void f(device float* x) { x[0] = g(x); }", "no matching function"),
        ("kernel void f(device float* x) { thread float* y = x; y[0] = 1; }", "cannot initialize"),
        ("kernel void f(device float* x) { thread float* y = (thread float*)x; y[0] = 1; }", "line 3: a cast between address spaces"),
        ("float g(float* x) { return x[0]; }\nkernel void f(device float* x) { x[0] = 1; }", "line 3: a pointer to float needs an address space"),
        ("void g(int& x) { x = 1; }\nkernel void f(device float* x) { x[0] = 1; }", "line 3: a reference to int needs an address space"),
        ("kernel void f(float* x) { x[0] = 1; }", "is neither a buffer nor has an attribute"),
        ("kernel void f(device float* x) { bfloat y = x[0]; x[0] = float(y); }", "no implicit conversion to bfloat"),
        ("kernel void f(device float* x) { x[0] = max(1, 2u); }", "ambiguous"),
        ("kernel void f(device float* x) { x[0] = float(exp(bfloat(x[1]))); }", "deleted function"),
        ("kernel void f(device float* x) { x[0] = float(simd_sum(long(1))); }", "simdgroup functions take"),
        ("kernel void f(device float* x) { threadgroup atomic_float y; atomic_fetch_add_explicit(&y, 1.0f, memory_order_relaxed); }", "no such type in this address space"),
        ("kernel void f(device float* x) { threadgroup float y = 1; }", "line 3: a threadgroup variable cannot be initialised"),
        ("void g() { threadgroup float y[3]; }\nkernel void f(device float* x) { x[0] = 1; }", "in kernels only"),
        ("kernel void f(device float* x, threadgroup float* y [[threadgroup(0)]]) { x[0] = 1; }", "no dynamic threadgroup memory"),
        ("kernel int f(device float* x) { return 1; }", "must return void"),
        ("kernel void f(device float* x [[buffer(1)]]) { x[0] = 1; }", "declares buffers [1]"),
        ("[[max_total_threads_per_threadgroup(2048)]] kernel void f(device float* x) { x[0] = 1; }", "is not 1 to 1024"),
        ("[[max_threads(256)]] kernel void f(device float* x) { x[0] = 1; }", "unknown attribute [[max_threads]]"),
        ("kernel void f(device float* x, uint2 i [[thread_position_in_grid]], uint n [[threads_per_grid]]) { x[0] = 1; }", "as many axes"),
        ("kernel void f(device float* x, int i [[thread_position_in_grid]]) { x[0] = 1; }", "cannot be int"),
        ("kernel void f(device float* x, uint i [[thread_position]]) { x[0] = 1; }", "unknown attribute [[thread_position]]"),
        ("template <typename T> kernel void f(device T* x) { x[0] = 1; }\ntemplate kernel void f<float>(device float*);", "needs [[host_name"),
        ("kernel void f(device float* x) { auto g = [](float y) { return y; }; x[0] = g(1); }", "no lambdas"),
        ("float g(float x) { return x; }", "the source has no kernel"),
        ('#include "other.h"\nkernel void f(device float* x) { x[0] = 1; }', 'other.h'),
    ],
)  # fmt: skip
def test_sources_that_do_not_compile(source: str, message: str) -> None:
    with pytest.raises(CompileError, match=re.escape(message)):
        compiled(source)


def test_metal_functions_need_the_include() -> None:
    with pytest.raises(CompileError, match="without #include <metal_stdlib>"):
        emulator.compile_shader("using namespace metal; kernel void f(device float* x) { x[0] = 1; }")


# What a kernel may do wrong.


def launch_one(body: str, threads: int = 64, group_size: int = 32, parameters: str = "") -> None:
    library = compiled(f"""
    kernel void f(device const float* a [[buffer(0)]], device float* out [[buffer(1)]], {parameters}
        uint i [[thread_position_in_grid]], uint t [[thread_position_in_threadgroup]]) {{ {body} }}""")
    library.f(torch.zeros(64), torch.zeros(64), threads=threads, group_size=group_size)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[i] = a[i + 1];", "thread (63, 0, 0) of the grid reads 4 bytes outside argument 0 (device const float* a), byte 256 of 256"),
        ("out[i] = a[int(i) - 1];", "thread (0, 0, 0) of the grid reads 4 bytes outside argument 0 (device const float* a), byte -4 of 256"),
        ("out[2 * i] = 1;", "writes 4 bytes outside argument 1 (device float* out), byte"),
        ("out[i - 5000000000L] = 1;", "outside argument 1 (device float* out), byte -"),
        ("*(device float4*)(out + 4 * (i & 7) + 1) = float4(1);", "not aligned to 16 bytes"),
        ("*(device float4*)(out + 64 + 4 * i) = float4(1);", "writes 16 bytes outside argument 1"),
        ("out[i / 2] = 1;", "with no barrier between: a data race"),
        ("out[i] = 1; if (i > 0) out[i] = out[i - 1];", "a data race"),
        ("out[i] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); if (t > 0) out[i] += out[i - 1];", "a data race"),
        ("out[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (i > 31) a = out + i - 32; out[i] = a[0];", "a data race"),
        ("threadgroup float s[32]; s[t] = a[i]; out[i] = s[31 - t];", "threadgroup variable s"),
        ("threadgroup float s[32]; s[t] = a[i]; threadgroup_barrier(mem_flags::mem_none); out[i] = s[31 - t];", "a data race"),
        ("threadgroup float s[32]; s[t] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[31 - t]; s[t] = 1;", "a data race"),
        ("threadgroup float s; s = a[i]; out[i] = 1;", "writes threadgroup variable s, byte 0 of 4, which thread"),
        ("threadgroup float s[32]; out[i] = s[t];", "reads memory that nothing wrote: threadgroup variable s"),
        ("threadgroup float s[33]; s[t] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t + 1];", "reads memory that nothing wrote"),
        ("threadgroup float s[32]; s[t + 1] = 1; out[i] = 1;", "indexes an array of its own outside its bounds"),
        ("threadgroup float s[32]; threadgroup float* p = s; p[t + 1] = 1; out[i] = 1;", "writes 4 bytes outside threadgroup variable s, byte 128 of 128"),
        ("threadgroup float s[8193]; s[t] = 1; out[i] = 1;", "32772 bytes of threadgroup memory with s, Metal has 32768"),
        ("threadgroup float s[8000], r[200]; s[t] = 1; r[t] = 1; out[i] = 1;", "32800 bytes of threadgroup memory with r"),
        ("if (t < 16) threadgroup_barrier(mem_flags::mem_none); out[i] = 1;", "16 threads of group"),
        ("if (t == 3) return; threadgroup_barrier(mem_flags::mem_none); out[i] = 1;", "31 threads of group"),
        ("if (t < 16) { threadgroup_barrier(mem_flags::mem_none); } else { threadgroup_barrier(mem_flags::mem_none); }", "divergence"),
        ("if (t < 16) out[i] = simd_sum(1.0f); else threadgroup_barrier(mem_flags::mem_none);", "divergence"),
        ("out[i] = t < 16 ? simd_sum(1.0f) : simd_max(1.0f);", "divergence"),
        ("if (t > 20) return; out[i] = simd_shuffle_down(1.0f, 5);", "reads a lane of its simdgroup that is not active"),
        ("float s[4] = {1, 2, 3, 4}; out[i] = s[t & 7];", "indexes an array of its own outside its bounds"),
        ("out[i] = float(int(i) * 100000000);", "overflows a signed multiplication"),
        ("out[i] = float(1 << int(i));", "shifts by"),
        ("out[i] = float(int(NAN * a[i]));", "converts a float that is not finite"),
        ("out[i] = float(int(i) / (int(i) - 7));", "divides by zero"),
    ],
)  # fmt: skip
def test_planted_bugs(body: str, message: str) -> None:
    for _ in range(5):  # in any order of the threads
        with pytest.raises(KernelError, match=re.escape(message)) as error:
            launch_one(body)
        assert str(error.value).startswith("kernel f, line 5: ")


def test_local_values_are_not_zero_by_chance() -> None:
    out = torch.zeros(4)
    compiled("kernel void f(device float* out, uint i [[thread_position_in_grid]]) { float x[4]; out[i] = x[i]; }").f(
        out
    )
    assert bool((out != 0).all())


def test_a_missing_barrier_is_caught_in_every_order() -> None:
    library = compiled(TILE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""))
    for _ in range(20):
        with pytest.raises(KernelError, match="threadgroup variable tile"):
            library.reversed(torch.zeros(64), torch.zeros(64), threads=64, group_size=64)


def test_barriers_order_simdgroups_and_threadgroups() -> None:
    launch_one(
        """
      threadgroup float s[32];
      s[t] = a[i];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      const float other = s[31 - t];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      s[t] = other;
      out[i] = 1;
      threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
      if (t > 0) { out[i - 1] += s[t - 1]; }
    """.replace("\n", " ")
    )


def test_a_simdgroup_barrier_does_not_order_two_simdgroups() -> None:
    with pytest.raises(KernelError, match="a data race"):
        launch_one("threadgroup float s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); s[63 - t] = 2; "
                   "simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t];", group_size=64)  # fmt: skip


def test_atomic_and_plain_accesses_race() -> None:
    library = compiled("kernel void f(device atomic_int* x, device int* y, uint i [[thread_position_in_grid]]) "
                       "{ atomic_fetch_add_explicit(x, 1, memory_order_relaxed); if (i == 9) y[0] = 1; }")  # fmt: skip
    x = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelError, match="a data race"):
        library.f(x, x, threads=32)


def test_no_access_between_the_elements_of_a_view() -> None:
    library = compiled(COPY)
    with pytest.raises(KernelError, match="between the elements of argument 0"):
        library.copy(torch.zeros(20)[::2], torch.zeros(10), threads=10)
    with pytest.raises(KernelError, match=r"outside argument 1 .* of 20"):
        library.copy(torch.zeros(10), torch.zeros(20)[3:8], threads=10)


def test_what_nothing_wrote() -> None:
    library = compiled(COPY + "kernel void some(device float* out, uint i [[thread_position_in_grid]]) "
                              "{ if (i != 3) out[i] = 1; }")  # fmt: skip
    with emulator.poisoned():
        unwritten, out = torch.empty(4, 5), torch.empty(20)
        with pytest.raises(KernelError, match="reads memory that nothing wrote: argument 0"):
            library.copy(unwritten, out)
        library.some(unwritten)
        with pytest.raises(AssertionError, match=re.escape("nothing wrote 1 of 20 elements, first [0, 3]")):
            emulator.assert_written(unwritten)
        with pytest.raises(KernelError, match="reads memory that nothing wrote"):
            library.copy(unwritten, out)
        unwritten[0, 3] = 2  # PyTorch's operators write too
        library.copy(unwritten, out)
        emulator.assert_written(out)
        assert out.sum().item() == 21
        assert math.isnan(torch.empty(1).item())
    library.copy(unwritten, out)


def test_results_reach_the_tensors_of_a_launch_that_failed() -> None:
    # As on a GPU: what ran before the mistake has run.
    library = compiled("kernel void f(device float* out, uint i [[thread_position_in_grid]]) { out[i] = 1; }")
    out = torch.zeros(4)
    with pytest.raises(KernelError, match="outside argument 0"):
        library.f(out, threads=5, group_size=1)
    assert set(out.tolist()) <= {0.0, 1.0}
    library.f(out)  # and the emulator is as good as before
    assert out.tolist() == [1.0] * 4
