#include "schedule.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kWidth = 32;  // of a simdgroup
constexpr uint64_t kStack = 256 << 10;
constexpr uint32_t kMemDevice = 1, kMemThreadgroup = 2;

enum State : uint32_t { kWaitingToStart, kReady, kAtBarrier, kAtSimd, kDone };

struct Thread {
  State state;
  int fiber;
  uint64_t site;  // line << 32 | column of what it waits at
  uint32_t flags;
  const char* operation;
  const void* give;   // a simd function's operand
  void* take;         // where the operands of all lanes go
  uint32_t size;
  uint32_t* active;   // where the mask of lanes goes
};

struct Simdgroup {
  uint32_t threadgroup_epoch, device_epoch;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
};

Thread threads[kMaxThreads];
Simdgroup simdgroups[kMaxThreads / kWidth];
Position positions[kMaxThreads];
Fiber fibers[kMaxThreads];
int fibers_used;
ucontext_t scheduler;

Kernel kernel;
const char* kernel_name;
uint64_t buffer_addresses[kBuffers];
uint32_t count;            // threads of the group
uint32_t order[kMaxThreads];
uint32_t started;          // how many of ``order`` have begun
uint32_t current;          // the running thread
bool running, failed;
Self self;
char message[1024];
uint64_t random_state;

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)((random_state >> 11) % n);
}

void shuffle(uint32_t* values, uint32_t n) {
  for (uint32_t i = n; i > 1; --i) {
    const uint32_t j = random_below(i);
    const uint32_t kept = values[i - 1];
    values[i - 1] = values[j];
    values[j] = kept;
  }
}

void enter(uint32_t thread) {
  current = thread;
  self.thread = thread;
  self.simdgroup = thread / kWidth;
  self.threadgroup_simd_epoch = simdgroups[self.simdgroup].threadgroup_epoch;
  self.device_simd_epoch = simdgroups[self.simdgroup].device_epoch;
}

// A fiber runs threads that have not begun one after the other: a kernel that never waits needs one fiber.
void work() {
  for (;;) {
    while (started < count) {
      const uint32_t thread = order[started++];
      enter(thread);
      threads[thread].fiber = fibers_used - 1;
      kernel(&positions[thread], buffer_addresses);
      threads[thread].state = kDone;
      // A thread that had waited ends in the fiber of its own; only the newest fiber begins others.
      if (threads[thread].fiber != fibers_used - 1) break;
    }
    swapcontext(&fibers[threads[current].fiber].context, &scheduler);
  }
}

void wait(State state, const char* operation, uint32_t line, uint32_t column, uint32_t flags) {
  Thread& thread = threads[current];
  const int fiber = thread.fiber;
  thread.state = state;
  thread.operation = operation;
  thread.site = (uint64_t)line << 32 | column;
  thread.flags = flags;
  swapcontext(&fibers[fiber].context, &scheduler);
}

void begin_fiber() {
  Fiber& fiber = fibers[fibers_used++];
  if (!fiber.stack) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) abort();
    fiber.stack = (char*)stack;
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, work, 0);
  swapcontext(&scheduler, &fiber.context);
}

uint32_t line_of(const Thread& thread) { return (uint32_t)(thread.site >> 32); }

// Releases the simdgroups all of whose threads wait at the same simd function. Threads that left the kernel are
// inactive lanes.
bool release_simdgroups() {
  bool released = false;
  for (uint32_t first = 0; first < count; first += kWidth) {
    const uint32_t end = first + kWidth < count ? first + kWidth : count;
    uint32_t mask = 0;
    const Thread* one = nullptr;
    bool all = true;
    for (uint32_t i = first; i < end; ++i) {
      if (threads[i].state == kDone) continue;
      if (threads[i].state != kAtSimd) {
        all = false;
        break;
      }
      if (!one) one = &threads[i];
      if (threads[i].site != one->site || threads[i].operation != one->operation) all = false;
      mask |= 1u << (i - first);
    }
    if (!all || !one) continue;
    Simdgroup& simdgroup = simdgroups[first / kWidth];
    const bool barrier = one->size == 0;
    if (barrier) {
      simdgroup.threadgroup_epoch += (one->flags & kMemThreadgroup) != 0;
      simdgroup.device_epoch += (one->flags & kMemDevice) != 0;
    }
    for (uint32_t i = first; i < end; ++i) {
      if (threads[i].state != kAtSimd) continue;
      for (uint32_t j = first; !barrier && j < end; ++j)
        if (mask >> (j - first) & 1)
          memcpy((char*)threads[i].take + (j - first) * threads[i].size, threads[j].give, threads[j].size);
      if (!barrier) *threads[i].active = mask;
      threads[i].state = kReady;
    }
    released = true;
  }
  return released;
}

[[noreturn]] void report_in_scheduler();

void set_message(uint32_t line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = snprintf(message, sizeof message, "kernel %s", kernel_name);
  if (line) n += snprintf(message + n, sizeof message - n, ", line %u", line);
  n += snprintf(message + n, sizeof message - n, ": ");
  vsnprintf(message + n, sizeof message - n, format, arguments);
  va_end(arguments);
}

// Releases the threadgroup's barrier if every thread is at it. False with a message: some are not.
bool release_group() {
  const Thread* one = nullptr;
  uint32_t done = 0, waiting = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (threads[i].state == kDone) {
      ++done;
      continue;
    }
    ++waiting;
    if (!one) one = &threads[i];
    if (threads[i].state != one->state || threads[i].site != one->site || threads[i].operation != one->operation) {
      set_message(line_of(*one), "divergence: thread %u of group %u waits at %s, thread %u at %s in line %u",
                  (uint32_t)(one - threads), self.group, one->operation, i, threads[i].operation, line_of(threads[i]));
      return false;
    }
  }
  if (one->state != kAtBarrier || done) {
    set_message(line_of(*one), "divergence: %u threads of group %u wait at %s, %u have left the kernel", waiting,
                self.group, one->operation, done);
    return false;
  }
  self.threadgroup_epoch += (one->flags & kMemThreadgroup) != 0;
  self.device_epoch += (one->flags & kMemDevice) != 0;
  for (uint32_t i = 0; i < count; ++i) threads[i].state = kReady;
  return true;
}

bool run_group() {
  for (uint32_t i = 0; i < count; ++i) {
    threads[i] = Thread{};
    order[i] = i;
  }
  memset(simdgroups, 0, sizeof simdgroups);
  self.threadgroup_epoch = self.device_epoch = 0;
  shuffle(order, count);
  fibers_used = 0;
  started = 0;
  while (started < count) {
    begin_fiber();
    if (failed) return false;
  }
  uint32_t turn[kMaxThreads];
  for (;;) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; ++i)
      if (threads[i].state != kDone) turn[left++] = i;
    if (!left) return true;
    if (!release_simdgroups() && !release_group()) return false;
    shuffle(turn, left);
    for (uint32_t i = 0; i < left; ++i) {
      if (threads[turn[i]].state != kReady) continue;
      enter(turn[i]);
      swapcontext(&scheduler, &fibers[threads[turn[i]].fiber].context);
      if (failed) return false;
    }
  }
}

}  // namespace

const Self& schedule_self() { return self; }

void fail(uint32_t line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[768];
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint32_t* at = positions[current].thread_position_in_grid;
  set_message(line, "thread (%u, %u, %u) of the grid %s", at[0], at[1], at[2], text);
  failed = true;
  setcontext(&scheduler);
  abort();
}

extern "C" {

struct Launch {
  const char* name;
  Kernel kernel;
  const Buffer* buffers;
  const char* const* names;
  uint32_t buffer_count;
  uint32_t threads[3];
  uint32_t group_size[3];
  uint64_t seed;
};

// Runs every thread of the grid. Returns null, or what went wrong.
const char* emulator_launch(const Launch* launch) {
  kernel = launch->kernel;
  kernel_name = launch->name;
  random_state = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  failed = false;
  message[0] = 0;
  memory_reset();
  for (int i = 0; i < (int)launch->buffer_count; ++i) {
    bool track = false;
    for (int j = 0; j < (int)launch->buffer_count; ++j)
      track |= launch->buffers[j].same_as == launch->buffers[i].same_as && launch->buffers[j].writable;
    memory_bind(i, launch->buffers[i], track, launch->names[i]);
    buffer_addresses[i] = memory_address(i);
  }
  uint32_t groups[3];
  for (int axis = 0; axis < 3; ++axis)
    groups[axis] = (launch->threads[axis] + launch->group_size[axis] - 1) / launch->group_size[axis];
  const uint32_t total = groups[0] * groups[1] * groups[2];
  uint32_t* group_order = (uint32_t*)malloc(total * sizeof(uint32_t));
  for (uint32_t i = 0; i < total; ++i) group_order[i] = i;
  shuffle(group_order, total);
  for (uint32_t g = 0; g < total; ++g) {
    const uint32_t group = group_order[g];
    const uint32_t at[3] = {group % groups[0], group / groups[0] % groups[1], group / groups[0] / groups[1]};
    uint32_t size[3];  // the last group of an axis has the threads that are left
    for (int axis = 0; axis < 3; ++axis) {
      const uint32_t first = at[axis] * launch->group_size[axis];
      const uint32_t left = launch->threads[axis] - first;
      size[axis] = left < launch->group_size[axis] ? left : launch->group_size[axis];
    }
    count = size[0] * size[1] * size[2];
    for (uint32_t i = 0; i < count; ++i) {
      Position& position = positions[i];
      const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
      for (int axis = 0; axis < 3; ++axis) {
        position.thread_position_in_grid[axis] = at[axis] * launch->group_size[axis] + inside[axis];
        position.threadgroup_position_in_grid[axis] = at[axis];
        position.thread_position_in_threadgroup[axis] = inside[axis];
        position.threads_per_threadgroup[axis] = size[axis];
        position.threadgroups_per_grid[axis] = groups[axis];
        position.threads_per_grid[axis] = launch->threads[axis];
      }
      position.thread_index_in_threadgroup[0] = i;
      position.thread_index_in_simdgroup[0] = i % kWidth;
      position.simdgroup_index_in_threadgroup[0] = i / kWidth;
      position.simdgroups_per_threadgroup[0] = (count + kWidth - 1) / kWidth;
      position.threads_per_simdgroup[0] = kWidth;
    }
    self.group = group;
    if (!run_group()) break;
  }
  free(group_order);
  memory_unbind(launch->buffers, (int)launch->buffer_count);
  return message[0] ? message : nullptr;
}

// What the kernels call.

void emulator_check(uint64_t address, uint64_t size, uint32_t align, uint32_t space_and_kind, uint32_t line) {
  if (size) memory_check(address, size, align, space_and_kind & 3, space_and_kind >> 2, line);
}

uint64_t emulator_threadgroup(uint32_t site, uint64_t size, uint32_t element, const char* name, uint32_t line) {
  return memory_threadgroup(site, size, element, name, line);
}

void emulator_barrier(uint32_t flags, uint32_t line, uint32_t column) {
  wait(kAtBarrier, "threadgroup_barrier", line, column, flags);
}

// Gives ``value`` to the other lanes of the simdgroup and takes theirs. Size 0: a barrier.
uint32_t emulator_simd(const char* operation, const void* value, void* lanes, uint32_t size, uint32_t flags,
                       uint32_t line, uint32_t column) {
  uint32_t active = 0;
  Thread& thread = threads[current];
  thread.give = value;
  thread.take = lanes;
  thread.size = size;
  thread.active = &active;
  wait(kAtSimd, operation, line, column, flags);
  return active;
}

uint32_t emulator_lane() { return current % kWidth; }

void emulator_fail(const char* what, uint32_t line) { fail(line, "%s", what); }

// What clang's checks of undefined behaviour call; each first argument begins with the place in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, what)                                                    \
  void __ubsan_handle_##name(const SourceLocation* where) { fail(where->line, "%s", what); } \
  void __ubsan_handle_##name##_abort(const SourceLocation* where) { fail(where->line, "%s", what); }
UNDEFINED(out_of_bounds, "indexes an array of its own outside its bounds")
UNDEFINED(add_overflow, "overflows a signed addition")
UNDEFINED(sub_overflow, "overflows a signed subtraction")
UNDEFINED(mul_overflow, "overflows a signed multiplication")
UNDEFINED(negate_overflow, "overflows a signed negation")
UNDEFINED(divrem_overflow, "divides by zero or overflows a division")
UNDEFINED(shift_out_of_bounds, "shifts by a negative number or by more bits than there are")
UNDEFINED(float_cast_overflow, "converts a float that is not finite or too large for the integer type")
}
