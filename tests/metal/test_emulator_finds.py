"""What a kernel may do wrong while it runs: the emulator has to find it."""
# A source and what is said of it stand on one line each.
# ruff: noqa: E501

import re

import pytest
import torch
from emulator import KernelError
from test_emulator import COPY, TILE, compiled


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


def test_results_reach_the_tensors_of_a_launch_that_failed() -> None:
    # As on a GPU: what ran before the mistake has run.
    library = compiled("kernel void f(device float* out, uint i [[thread_position_in_grid]]) { out[i] = 1; }")
    out = torch.zeros(4)
    with pytest.raises(KernelError, match="outside argument 0"):
        library.f(out, threads=5, group_size=1)
    assert set(out.tolist()) <= {0.0, 1.0}
    library.f(out)  # and the emulator is as good as before
    assert out.tolist() == [1.0] * 4
