#include "schedule.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "history.h"

namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kWidth = 32;  // of a simdgroup
constexpr uint64_t kStack = 256 << 10;
constexpr uint32_t kMemDevice = 1, kMemThreadgroup = 2;

struct Launch {
  const char* name;
  Kernel kernel;
  const Buffer* buffers;
  const char* const* names;
  uint32_t buffer_count;
  uint32_t threads[3];
  uint32_t group_size[3];
  uint64_t seed;
  uint64_t most_steps;  // of a thread
  uint32_t newest_only;  // whether atomic loads never give an older value
  // What comes out: the thread that took the most steps.
  uint32_t worst_thread[3];
  uint64_t worst_steps;
};

enum Order : uint32_t { kAny, kForwards, kBackwards };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
};

enum State : uint32_t { kReady, kAtBarrier, kAtSimd, kDone };

struct Thread {
  State state;
  Fiber* fiber;   // null: it has not begun
  uint64_t site;  // line << 32 | column of what it waits at
  uint32_t flags;
  const char* operation;
  const void* give;   // a simd function's operand
  void* take;         // where the operands of all lanes go
  uint32_t size;
  uint32_t* active;   // where the mask of lanes goes
  uint64_t steps;     // basic blocks that it has entered
};

struct Simdgroup {
  uint32_t threadgroup_epoch, device_epoch;
};

struct Group {
  uint32_t index;  // in the grid
  uint32_t count;  // threads of it
  uint32_t ready;  // threads that neither wait nor have left the kernel
  uint32_t threadgroup_epoch, device_epoch;
  Thread threads[kMaxThreads];
  Simdgroup simdgroups[kMaxThreads / kWidth];
  Position positions[kMaxThreads];
};

Launch* launch;
uint64_t buffer_addresses[kBuffers];
uint32_t grid[3];  // how many groups
uint32_t* group_order;
uint32_t groups_left;   // how many of ``group_order`` have not begun
Group groups[kGroups];  // those that run at once
uint32_t ready[kGroups * kMaxThreads];  // the threads that can run and do not: place * kMaxThreads + index
uint32_t ready_count;
Order order;
Group* group;     // the running thread's
Thread* current;  // the running thread
Self self;        // the same, as memory sees it

Fiber fibers[kGroups * kMaxThreads];
uint32_t fibers_used;
Fiber* idle[kGroups * kMaxThreads];  // fibers whose threads have left the kernel
uint32_t idle_count;
Fiber host;  // who launched

char message[1024];
uint64_t random_state;
uint32_t patience;  // one atomic operation in so many lets another thread run first

void swap(uint32_t& a, uint32_t& b) {
  const uint32_t kept = a;
  a = b;
  b = kept;
}

void shuffle(uint32_t* values, uint32_t n) {
  for (uint32_t i = n; i > 1; --i) swap(values[i - 1], values[schedule_random(i)]);
}

[[noreturn]] void end_launch() {
  setcontext(&host.context);
  abort();
}

void set_message(uint32_t line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = snprintf(message, sizeof message, "kernel %s", launch->name);
  if (line) n += snprintf(message + n, sizeof message - n, ", line %u", line);
  n += snprintf(message + n, sizeof message - n, ": ");
  vsnprintf(message + n, sizeof message - n, format, arguments);
  va_end(arguments);
}

void make_ready(Group& its, uint32_t thread) {
  its.threads[thread].state = kReady;
  ++its.ready;
  ready[ready_count++] = (uint32_t)(&its - groups) * kMaxThreads + thread;
}

// The threads that were made ready since there were ``first``, in ascending order, run in the launch's.
void put_in_order(uint32_t first) {
  if (order != kForwards) return;
  for (uint32_t last = ready_count; first + 1 < last; ++first) swap(ready[first], ready[--last]);
}

bool is_finite(float value) { return (__builtin_bit_cast(uint32_t, value) & 0x7fffffffu) < 0x7f800000u; }

Fiber* fresh_fiber();

// Lets another of the threads that can run do so; comes back when ``fiber`` is to run again.
void leave(Fiber& fiber) {
  if (!ready_count) end_launch();
  if (order == kAny) swap(ready[schedule_random(ready_count)], ready[ready_count - 1]);
  const uint32_t chosen = ready[--ready_count];
  const uint32_t place = chosen / kMaxThreads, thread = chosen % kMaxThreads;
  group = &groups[place];
  current = &group->threads[thread];
  const Simdgroup& simdgroup = group->simdgroups[thread / kWidth];
  self = {thread, group->index, place, thread / kWidth, group->threadgroup_epoch, group->device_epoch,
          simdgroup.threadgroup_epoch, simdgroup.device_epoch};
  if (!current->fiber) current->fiber = idle_count ? idle[--idle_count] : fresh_fiber();
  if (current->fiber != &fiber) swapcontext(&fiber.context, &current->fiber->context);
}

// The next group of the grid, if there is one, in the place of one that has ended.
void begin_group(Group& its) {
  if (!groups_left) return;
  its.index = group_order[--groups_left];
  its.threadgroup_epoch = its.device_epoch = 0;
  memset(its.simdgroups, 0, sizeof its.simdgroups);
  const uint32_t at[3] = {its.index % grid[0], its.index / grid[0] % grid[1], its.index / grid[0] / grid[1]};
  uint32_t size[3];  // the last group of an axis has the threads that are left
  for (int axis = 0; axis < 3; ++axis) {
    const uint32_t left = launch->threads[axis] - at[axis] * launch->group_size[axis];
    size[axis] = left < launch->group_size[axis] ? left : launch->group_size[axis];
  }
  its.count = size[0] * size[1] * size[2];
  const uint32_t first_ready = ready_count;
  for (uint32_t i = 0; i < its.count; ++i) {
    Position& position = its.positions[i];
    const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int axis = 0; axis < 3; ++axis) {
      position.thread_position_in_grid[axis] = at[axis] * launch->group_size[axis] + inside[axis];
      position.threadgroup_position_in_grid[axis] = at[axis];
      position.thread_position_in_threadgroup[axis] = inside[axis];
      position.threads_per_threadgroup[axis] = size[axis];
      position.threadgroups_per_grid[axis] = grid[axis];
      position.threads_per_grid[axis] = launch->threads[axis];
    }
    position.thread_index_in_threadgroup[0] = i;
    position.thread_index_in_simdgroup[0] = i % kWidth;
    position.simdgroup_index_in_threadgroup[0] = i / kWidth;
    position.simdgroups_per_threadgroup[0] = (its.count + kWidth - 1) / kWidth;
    position.threads_per_simdgroup[0] = kWidth;
    its.threads[i] = Thread{};
    its.threads[i].steps = 1;
    make_ready(its, i);
  }
  put_in_order(first_ready);
}

uint32_t line_of(const Thread& thread) { return (uint32_t)(thread.site >> 32); }

// Releases the simdgroups all of whose threads wait at the same simd function. Threads that left the kernel are
// inactive lanes.
bool release_simdgroups(Group& its) {
  Thread* const threads = its.threads;
  bool released = false;
  const uint32_t first_ready = ready_count;
  for (uint32_t first = 0; first < its.count; first += kWidth) {
    const uint32_t end = first + kWidth < its.count ? first + kWidth : its.count;
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
    Simdgroup& simdgroup = its.simdgroups[first / kWidth];
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
      make_ready(its, i);
    }
    released = true;
  }
  put_in_order(first_ready);
  return released;
}

// Releases the threadgroup's barrier if every thread is at it. Ends the launch with a message: some are not.
void release_group(Group& its) {
  const Thread* const threads = its.threads;
  const Thread* one = nullptr;
  uint32_t done = 0, waiting = 0;
  for (uint32_t i = 0; i < its.count; ++i) {
    if (threads[i].state == kDone) {
      ++done;
      continue;
    }
    ++waiting;
    if (!one) one = &threads[i];
    if (threads[i].state != one->state || threads[i].site != one->site || threads[i].operation != one->operation) {
      set_message(line_of(*one), "divergence: thread %u of group %u waits at %s, thread %u at %s in line %u",
                  (uint32_t)(one - threads), its.index, one->operation, i, threads[i].operation, line_of(threads[i]));
      end_launch();
    }
  }
  if (one->state != kAtBarrier || done) {
    set_message(line_of(*one), "divergence: %u threads of group %u wait at %s, %u have left the kernel", waiting,
                its.index, one->operation, done);
    end_launch();
  }
  its.threadgroup_epoch += (one->flags & kMemThreadgroup) != 0;
  its.device_epoch += (one->flags & kMemDevice) != 0;
  const uint32_t first_ready = ready_count;
  for (uint32_t i = 0; i < its.count; ++i) make_ready(its, i);
  put_in_order(first_ready);
}

// The running thread waits or has left the kernel. Was it the last of its group that could run, then the group goes on,
// or another group takes its place.
void stop(State state) {
  current->state = state;
  if (--group->ready) return;
  bool done = true;
  for (uint32_t i = 0; i < group->count; ++i) done = done && group->threads[i].state == kDone;
  if (done)
    begin_group(*group);
  else if (!release_simdgroups(*group))
    release_group(*group);
}

void wait(State state, const char* operation, uint32_t line, uint32_t column, uint32_t flags) {
  current->operation = operation;
  current->site = (uint64_t)line << 32 | column;
  current->flags = flags;
  Fiber& fiber = *current->fiber;
  stop(state);
  leave(fiber);
}

void note_steps() {
  if (current->steps <= launch->worst_steps) return;
  launch->worst_steps = current->steps;
  memcpy(launch->worst_thread, group->positions[self.thread].thread_position_in_grid, sizeof launch->worst_thread);
}

// A fiber runs one thread after the other, as long as it is given any that have not begun.
void work() {
  for (;;) {
    launch->kernel(&group->positions[self.thread], buffer_addresses);
    note_steps();
    Fiber& fiber = *current->fiber;
    idle[idle_count++] = &fiber;
    stop(kDone);
    leave(fiber);
  }
}

Fiber* fresh_fiber() {
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
  return &fiber;
}

}  // namespace

const Self& schedule_self() { return self; }

uint32_t schedule_random(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)((random_state >> 11) % n);
}

void fail(uint32_t line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[768];
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint32_t* at = group->positions[self.thread].thread_position_in_grid;
  set_message(line, "thread (%u, %u, %u) of the grid %s", at[0], at[1], at[2], text);
  note_steps();
  end_launch();
}

extern "C" {

// Runs every thread of the grid. Returns null, or what went wrong.
const char* emulator_launch(Launch* what) {
  launch = what;
  random_state = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  message[0] = 0;
  memory_reset();
  for (int i = 0; i < (int)launch->buffer_count; ++i) {
    bool track = false;
    for (int j = 0; j < (int)launch->buffer_count; ++j)
      track |= launch->buffers[j].same_as == launch->buffers[i].same_as && launch->buffers[j].writable;
    memory_bind(i, launch->buffers[i], track, launch->names[i]);
    buffer_addresses[i] = memory_address(i);
  }
  for (int axis = 0; axis < 3; ++axis)
    grid[axis] = (launch->threads[axis] + launch->group_size[axis] - 1) / launch->group_size[axis];
  groups_left = grid[0] * grid[1] * grid[2];
  group_order = (uint32_t*)malloc(groups_left * sizeof(uint32_t));
  for (uint32_t i = 0; i < groups_left; ++i) group_order[i] = i;
  shuffle(group_order, groups_left);
  // From a turn at every operation to few, where a thread may stop while others run to their ends.
  patience = 1u << schedule_random(5);
  const uint32_t orders = schedule_random(4);
  order = orders < 2 ? kAny : orders == 2 ? kForwards : kBackwards;
  // In one launch of four loads give the newest values, in the others older ones too: often to seldom.
  const uint32_t older = schedule_random(4);
  history_reset(launch->newest_only || !older ? 0 : 1u << older);
  ready_count = idle_count = fibers_used = 0;
  for (Group& its : groups) {
    its.ready = 0;
    begin_group(its);
  }
  leave(host);
  free(group_order);
  memory_unbind(launch->buffers, (int)launch->buffer_count);
  return message[0] ? message : nullptr;
}

// What the kernels call.

void emulator_check(uint64_t address, uint64_t size, uint32_t align, uint32_t space_and_kind, uint32_t line) {
  if (size) memory_check(address, size, align, space_and_kind & 3, space_and_kind >> 2, line);
}

// Before an atomic operation. Puts into ``value`` what is there, or what a load is given in its place.
void emulator_atomic(uint64_t address, void* value, uint32_t size, uint32_t space_and_kind, uint32_t line) {
  if (schedule_random(patience) == 0) {
    ready[ready_count] = self.place * kMaxThreads + self.thread;
    if (order != kAny) swap(ready[ready_count], ready[schedule_random(ready_count + 1)]);
    ++ready_count;
    leave(*current->fiber);
  }
  const void* older = memory_check(address, size, size, space_and_kind & 3, space_and_kind >> 2, line);
  memcpy(value, older ? older : (const void*)address, size);
}

// Whether a weak compare-exchange fails although the values are the same.
bool emulator_fails() { return !launch->newest_only && schedule_random(8) == 0; }

// Under fast math, where a compiler may take all floats to be finite: what it makes of others is anybody's guess.
bool emulator_compare(bool result, float a, float b) {
  return is_finite(a) && is_finite(b) ? result : schedule_random(2) == 0;
}
void emulator_either(const float* a, const float* b, float* result) {
  if (!is_finite(*a) || !is_finite(*b)) *result = schedule_random(2) ? *a : *b;
}

// At the beginning of every basic block of the source but the first of a function.
void emulator_step(uint32_t line) {
  if (++current->steps > launch->most_steps)
    fail(line, "takes more than %llu steps, the budget of a thread", (unsigned long long)launch->most_steps);
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
  current->give = value;
  current->take = lanes;
  current->size = size;
  current->active = &active;
  wait(kAtSimd, operation, line, column, flags);
  return active;
}

uint32_t emulator_lane() { return self.thread % kWidth; }

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
