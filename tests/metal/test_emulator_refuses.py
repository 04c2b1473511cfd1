"""Launches and sources that the emulator refuses before a kernel runs."""
# A source and what is said of it stand on one line each.
# ruff: noqa: E501

import re
from typing import Any

import emulator
import pytest
import torch
from emulator import CompileError
from test_emulator import COPY, compiled

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


def test_a_kernel_that_does_not_say_how_many_threads_a_group_has() -> None:
    source = "#include <metal_stdlib>\n[[kernel]] void f(device float* x) { x[0] = 1; }"
    for launch in ({}, {"threads": 1}, {"threads": 64, "group_size": 32}):
        with pytest.raises(ValueError, match=re.escape("kernel f: it has no [[max_total_threads_per_threadgroup(n)]]")):
            emulator.compile_shader(source).f(torch.zeros(64), **launch)


def test_a_group_larger_than_the_kernel_says() -> None:
    library = compiled("""
    [[max_total_threads_per_threadgroup(64)]] kernel void plain(device int* x, uint i [[thread_position_in_grid]]) {
      x[i] = 1;
    }
    constant constexpr int ROWS = 3;
    template <int N>
    [[kernel, max_total_threads_per_threadgroup(ROWS * 32)]] void many(device int* x, uint i [[thread_position_in_grid]]) {
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
