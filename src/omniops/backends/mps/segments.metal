// Lists in memory that are filled by many threads at once: each cell of a grid has a segment for as many numbers as
// were counted for it.
//
// ASCII and Metal 3.1 only: PyTorch hands the source to the compiler so.

#include <metal_stdlib>
using namespace metal;

// As _segments.py has it.
constant constexpr int CELLS = 4;  // that a thread takes

// Gives each cell a segment of memory for as many numbers as its first number says, and makes its second number the
// beginning of that. The segments of a simdgroup's 128 cells follow each other, those of simdgroups in any order. used is
// 0 before, and the length of all segments after.
//
// Grid: (simdgroups that have CELLS cells a lane).
[[kernel, max_total_threads_per_threadgroup(256)]] void allocate_segments(
    device int2* cells [[buffer(0)]],
    device atomic_int* used [[buffer(1)]],
    constant int& count [[buffer(2)]],
    uint gid [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  int numbers[CELLS], sum = 0;
#pragma unroll
  for (int i = 0; i < CELLS; ++i) {
    const int cell = int(gid) * CELLS + i;
    numbers[i] = cell < count ? cells[cell].x : 0;
    sum += numbers[i];
  }
  const int before = simd_prefix_exclusive_sum(sum);
  int first = 0;
  if (lane == 31 && before + sum > 0) {
    first = atomic_fetch_add_explicit(used, before + sum, memory_order_relaxed);
  }
  first = simd_shuffle(first, ushort(31)) + before;
#pragma unroll
  for (int i = 0; i < CELLS; ++i) {
    const int cell = int(gid) * CELLS + i;
    if (numbers[i] > 0) {
      cells[cell] = int2(numbers[i], first);
      first += numbers[i];
    }
  }
}

// Writes each number whose cell is not -1 into the segment of the cell, in any order, and moves the second number of the
// cell to its end.
//
// Grid: (numbers).
[[kernel, max_total_threads_per_threadgroup(256)]] void collect_segments(
    device const int* cell_of [[buffer(0)]],
    device atomic_int* cells [[buffer(1)]],
    device int* segments [[buffer(2)]],
    uint number [[thread_position_in_grid]]) {
  const int cell = cell_of[number];
  if (cell >= 0) {
    segments[atomic_fetch_add_explicit(&cells[2 * uint(cell) + 1], 1, memory_order_relaxed)] = int(number);
  }
}
