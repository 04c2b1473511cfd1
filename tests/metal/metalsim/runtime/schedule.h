// The threads of a few groups at a time as fibers of one OS thread. They take turns where they wait and, now and then,
// before an atomic operation; a seed decides which of them runs next, so the same one gives the same order: any of them,
// or always the first, or always the last, so that whole simdgroups run one after the other, and backwards.
#pragma once

#include "memory.h"

struct Position {
  uint32_t thread_position_in_grid[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  uint32_t thread_index_in_threadgroup[3];
  uint32_t thread_index_in_simdgroup[3];
  uint32_t simdgroup_index_in_threadgroup[3];
  uint32_t simdgroups_per_threadgroup[3];
  uint32_t threads_per_simdgroup[3];
};

using Kernel = void (*)(const Position*, const uint64_t* buffers);

// The running thread, as memory sees it.
struct Self {
  uint32_t thread;  // index in the group
  uint32_t group;   // index in the grid
  uint32_t place;   // which of the groups that run at once it is
  uint32_t simdgroup;
  uint32_t threadgroup_epoch;
  uint32_t device_epoch;
  uint32_t threadgroup_simd_epoch;
  uint32_t device_simd_epoch;
};
const Self& schedule_self();

// A number below n, which the seed decides.
uint32_t schedule_random(uint32_t n);

// Ends the launch with a message; never returns to the kernel.
[[noreturn]] void fail(uint32_t line, const char* format, ...) __attribute__((format(printf, 2, 3)));
