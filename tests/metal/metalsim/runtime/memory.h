// Where the emulated kernels' memory lies, and what is known of every element of it.
//
// Each buffer argument and each threadgroup variable has a slot of address space to itself, far larger than any 32-bit
// index reaches, with its bytes in the middle and nothing around them. So an address tells which argument was meant,
// however far out of bounds it is, and two arguments that share storage stay distinct.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr int kBuffers = 31;
constexpr uint32_t kThreadgroupVariables = 33;
constexpr uint32_t kGroups = 4;  // how many run at once, each with threadgroup memory of its own
constexpr int kSlots = kBuffers + (int)(kGroups * kThreadgroupVariables);
constexpr uint64_t kSlotSize = 1ull << 37;
constexpr uint64_t kThreadgroupBytes = 32768;

enum Space : uint32_t { kThread = 0, kDevice = 1, kConstant = 2, kThreadgroup = 3 };

// One thread, or several that are not ordered among themselves, and when: the numbers of barriers passed by then.
struct Access {
  uint32_t thread;  // 0: nobody. 1 + index in the group, or kSimdgroup | index of the simdgroup, or kAll
  uint32_t group;   // 1 + index in the grid, or kAll
  uint32_t epoch;       // barriers of the threadgroup
  uint32_t simd_epoch;  // barriers of the simdgroup
};
constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kSimdgroup = 0x80000000u;

// Whether what ``access`` stands for happened before what the running thread, of that simdgroup, does now.
bool ordered(const Access& access, const Access& now, uint32_t simdgroup);

// What was done to one element in this launch.
struct Cell {
  Access writer;
  Access reader;
  bool atomic_writer;
  bool atomic_reader;
  uint32_t history;  // of its values as an atomic variable; 0: it has had one only
};

// One buffer argument, as the host describes it.
struct Buffer {
  uint64_t data;       // host address of the storage's first byte
  uint64_t storage;    // bytes of the storage
  uint64_t begin;      // the argument's bytes within the storage: [begin, end)
  uint64_t end;
  const uint8_t* touch;  // per element from begin: may it be touched? null: all of them
  uint8_t* written;      // per element of the storage: has it ever been written? null: all of it
  uint32_t element;      // bytes of an element
  int32_t same_as;       // the first argument with the same storage: itself, or an earlier one
  uint32_t space;
  uint32_t writable;
};

struct Slot {
  uint64_t base = 0;  // address of byte 0 of what the argument may touch
  uint64_t size = 0;
  uint32_t element = 1;
  uint32_t space = kThread;
  bool writable = false;
  const char* name = nullptr;
  const uint8_t* touch = nullptr;
  uint8_t* written = nullptr;  // from base on
  uint32_t* written_in = nullptr;  // threadgroup memory: the group (1 + index) that wrote the element
  Cell* cells = nullptr;  // from base on; null: nobody writes, so nobody races
};

void memory_reset();
void memory_bind(int index, const Buffer& buffer, bool track, const char* name);
void memory_unbind(const Buffer* buffers, int count);
uint64_t memory_address(int slot);
uint64_t memory_threadgroup(uint32_t site, uint64_t size, uint32_t element, const char* name, uint32_t line);

enum Kind : uint32_t { kRead = 1, kWrite = 2, kAtomic = 4 };  // or several of them
// Returns what an atomic read is given instead of the newest value, or null.
const void* memory_check(uint64_t address, uint64_t size, uint32_t align, uint32_t space, uint32_t kind, uint32_t line);
