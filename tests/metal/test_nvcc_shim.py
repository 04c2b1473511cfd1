"""The CUDA shim compiles Metal, and runs it where there is an NVIDIA GPU, as run_nvcc.py does with what ships."""

import shutil
import subprocess
from typing import Any

import emulator
import nvcc_shim
import pytest
import torch

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

SOURCE = """
#include <metal_stdlib>
using namespace metal;

struct Range {
  int first, end;
  Range(constant int* sizes) : first(sizes[0]), end(sizes[1]) {}
  bool has(int i) const { return i >= first && i < end; }
};

template <typename T>
inline float4 widened(device const T* from) {
  return float4(float(from[0]), float(from[1]), 0.5, float(half(1.5h) * half(2)));
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(64)]] void sums(
                 device const T* a [[buffer(0)]], device T* out [[buffer(1)]], device atomic_float* total [[buffer(2)]],
                 constant int* sizes [[buffer(3)]], uint i [[thread_position_in_grid]],
                 uint t [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  threadgroup T tile[64], more[2];
  const Range range(sizes);
  tile[t] = a[i];
  if (t < 2) more[t] = T(1);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float sum = simd_sum(float(tile[n - 1 - t]) * float(more[t & 1]));
  out[i] = range.has(int(i)) ? static_cast<T>(sum + max(0.0, widened(a).x * 0.0f)) : T(0);
  if (t % 32 == 0) atomic_fetch_add_explicit(total, sum, memory_order_relaxed);
}
#define INSTANTIATE(T) template [[host_name("sums_" #T)]] kernel void sums<T>( \\
  device const T*, device T*, device atomic_float*, constant int*, uint, uint, uint);
INSTANTIATE(float)
INSTANTIATE(half)
INSTANTIATE(bfloat)
"""


@needs_nvcc
def test_it_compiles() -> None:
    library = nvcc_shim.compile_shader(SOURCE)
    assert dir(library) == ["sums_bfloat", "sums_float", "sums_half"]
    assert [str(parameter) for parameter in library.sums_half.parameters] == [
        "device const half* a",
        "device half* out",
        "device float* total",
        "constant int* sizes",
    ]
    assert library.nvcc in subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(TypeError, match=r"argument 0 .*: got a torch.float32 tensor"):
        library.sums_half(*(torch.zeros(4),) * 3, [0, 4])


DTYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def check_sums(library: Any, dtype: torch.dtype, device: str) -> None:
    a = torch.randint(-3, 4, (150,)).to(device, dtype)  # the last group has 22 threads
    out, total = torch.zeros_like(a), torch.zeros(1, device=device)
    launch = getattr(library, f"sums_{DTYPES[dtype]}")
    launch(a, out, total, [3, 140], threads=150, group_size=64, arg_casts="int32")
    groups = [part.flip(0).split(32) for part in a.float().split(64)]
    expected = torch.cat([lanes.sum().expand(len(lanes)) for group in groups for lanes in group])
    expected[:3] = 0
    expected[140:] = 0
    assert torch.equal(out.float(), expected)
    assert total.item() == a.float().sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_emulator_runs_the_same(dtype: torch.dtype) -> None:
    check_sums(emulator.compile_shader(SOURCE), dtype, "cpu")


@needs_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_runs(dtype: torch.dtype) -> None:
    check_sums(nvcc_shim.compile_shader(SOURCE), dtype, "cuda")
