#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "history.h"
#include "schedule.h"

namespace {

Slot slots[kSlots];
uint64_t arena = 0;

struct Storage {
  int file = -1;
  uint64_t bytes = 0;
  Cell* cells = nullptr;
  uint64_t cell_bytes = 0;
};
Storage storages[kBuffers];

struct Mapping {
  uint64_t address = 0;
  uint64_t bytes = 0;
};
Mapping mappings[kSlots];

uint32_t threadgroup_written[kSlots - kBuffers][kThreadgroupBytes];

uint64_t pages(uint64_t bytes) {
  const uint64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

[[noreturn]] void system_failure(const char* what) {
  perror(what);
  abort();
}

void* anonymous(uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) system_failure("the emulator's shadow memory");
  return memory;
}

uint64_t middle(int slot) { return arena + slot * kSlotSize + kSlotSize / 2; }

// Both of them, unordered: who a later access has to come after.
Access merge(const Access& access, const Access& now, uint32_t simdgroup) {
  if (ordered(access, now, simdgroup)) return now;
  Access both = now;
  if (access.group != now.group) {
    both.group = both.thread = kAll;
    return both;
  }
  const bool single = access.thread != kAll && !(access.thread & kSimdgroup);
  const bool same_simdgroup =
      access.thread == (kSimdgroup | simdgroup) || (single && (access.thread - 1) / 32 == simdgroup);
  both.thread = same_simdgroup ? kSimdgroup | simdgroup : kAll;
  return both;
}

void describe(char* text, size_t size, const Access& access) {
  if (access.group == kAll)
    snprintf(text, size, "threads of several groups");
  else if (access.thread == kAll)
    snprintf(text, size, "several threads of group %u", access.group - 1);
  else if (access.thread & kSimdgroup)
    snprintf(text, size, "several threads of simdgroup %u of group %u", access.thread & ~kSimdgroup, access.group - 1);
  else
    snprintf(text, size, "thread %u of group %u", access.thread - 1, access.group - 1);
}

const char* const kSpaceNames[] = {"thread", "device", "constant", "threadgroup"};
const char* const kKindNames[] = {"",           "reads",           "writes",           "updates",
                                  "atomically", "atomically reads", "atomically writes", "atomically updates"};

void place(char* text, size_t size, const Slot& slot, int index, int64_t offset) {
  if (index < kBuffers)
    snprintf(text, size, "argument %d (%s), byte %lld of %llu", index, slot.name, (long long)offset,
             (unsigned long long)slot.size);
  else
    snprintf(text, size, "threadgroup variable %s, byte %lld of %llu", slot.name, (long long)offset,
             (unsigned long long)slot.size);
}

}  // namespace

bool ordered(const Access& access, const Access& now, uint32_t simdgroup) {
  if (access.thread == 0) return true;
  if (access.group != now.group) return false;
  if (access.thread == now.thread) return true;
  if (access.epoch < now.epoch) return true;
  if (access.thread == kAll) return false;
  const uint32_t other = access.thread & kSimdgroup ? access.thread & ~kSimdgroup : (access.thread - 1) / 32;
  return other == simdgroup && access.simd_epoch < now.simd_epoch;
}

void memory_reset() {
  if (!arena) {
    void* memory =
        mmap(nullptr, kSlots * kSlotSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) system_failure("the emulator's address space");
    arena = (uint64_t)memory;
  }
  for (int i = kBuffers; i < kSlots; ++i) slots[i].size = 0;
}

void memory_bind(int index, const Buffer& buffer, bool track, const char* name) {
  Storage& storage = storages[buffer.same_as];
  if (buffer.same_as == index) {
    storage.bytes = pages(buffer.storage ? buffer.storage : 1);
    storage.file = memfd_create("metal", 0);
    if (storage.file < 0 || ftruncate(storage.file, storage.bytes)) system_failure("a buffer of the emulator");
    storage.cells = nullptr;
  }
  // The argument's first byte is in the middle of the slot, so its storage begins earlier.
  const uint64_t first_page = buffer.begin / pages(1) * pages(1);
  const uint64_t address = middle(index) + first_page;
  void* mapped = storage.bytes > first_page
                     ? mmap((void*)address, storage.bytes - first_page, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_FIXED, storage.file, (off_t)first_page)
                     : nullptr;
  if (mapped == MAP_FAILED) system_failure("a buffer of the emulator");
  mappings[index] = {address, storage.bytes > first_page ? storage.bytes - first_page : 0};
  if (buffer.same_as == index && buffer.storage) {
    for (uint64_t done = 0; done < buffer.storage;) {
      const ssize_t n = pwrite(storage.file, (const char*)buffer.data + done, buffer.storage - done, (off_t)done);
      if (n <= 0) system_failure("a buffer of the emulator");
      done += (uint64_t)n;
    }
  }
  if (track && !storage.cells) {
    storage.cell_bytes = pages((buffer.storage / buffer.element + 1) * sizeof(Cell));
    storage.cells = (Cell*)anonymous(storage.cell_bytes);
  }
  const uint64_t first = buffer.begin / buffer.element;
  Slot& slot = slots[index];
  slot = Slot{};
  slot.base = middle(index) + buffer.begin;
  slot.size = buffer.end - buffer.begin;
  slot.element = buffer.element;
  slot.space = buffer.space;
  slot.writable = buffer.writable;
  slot.name = name;
  slot.touch = buffer.touch;
  slot.written = buffer.written ? buffer.written + first : nullptr;
  slot.cells = storage.cells ? storage.cells + first : nullptr;
}

void memory_unbind(const Buffer* buffers, int count) {
  for (int i = 0; i < count; ++i) {
    Storage& storage = storages[i];
    if (mappings[i].bytes)
      mmap((void*)mappings[i].address, mappings[i].bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    mappings[i] = {};
    slots[i] = Slot{};
    if (buffers[i].same_as != i) continue;
    bool written = false;
    for (int j = 0; j < count; ++j) written |= buffers[j].same_as == i && buffers[j].writable;
    for (uint64_t done = 0; written && done < buffers[i].storage;) {
      const ssize_t n = pread(storage.file, (char*)buffers[i].data + done, buffers[i].storage - done, (off_t)done);
      if (n <= 0) system_failure("a buffer of the emulator");
      done += (uint64_t)n;
    }
    close(storage.file);
    if (storage.cells) munmap(storage.cells, storage.cell_bytes);
    storage = Storage{};
  }
}

uint64_t memory_address(int slot) { return slots[slot].base; }

uint64_t memory_threadgroup(uint32_t site, uint64_t size, uint32_t element, const char* name, uint32_t line) {
  if (site >= kThreadgroupVariables) fail(line, "more than %u threadgroup variables", kThreadgroupVariables);
  const int first = kBuffers + (int)(schedule_self().place * kThreadgroupVariables), index = first + (int)site;
  Slot& slot = slots[index];
  if (slot.size) return slot.base;
  uint64_t total = size;
  for (int i = first; i < first + (int)kThreadgroupVariables; ++i) total += slots[i].size;
  if (total > kThreadgroupBytes)
    fail(line, "%llu bytes of threadgroup memory with %s, Metal has %llu", (unsigned long long)total, name,
         (unsigned long long)kThreadgroupBytes);
  if (!mappings[index].bytes) {
    const uint64_t address = middle(index);
    void* mapped = mmap((void*)address, kThreadgroupBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (mapped == MAP_FAILED) system_failure("the emulator's threadgroup memory");
    mappings[index] = {address, kThreadgroupBytes};
    slot.cells = (Cell*)anonymous(kThreadgroupBytes * sizeof(Cell));
  } else {
    memset(slot.cells, 0, (size / element) * sizeof(Cell));
  }
  memset(threadgroup_written[index - kBuffers], 0, (size / element) * sizeof(uint32_t));
  memset((void*)middle(index), 0x7f, kThreadgroupBytes);
  slot.base = middle(index);
  slot.size = size;
  slot.element = element;
  slot.space = kThreadgroup;
  slot.writable = true;
  slot.name = name;
  slot.written_in = threadgroup_written[index - kBuffers];
  return slot.base;
}

const void* memory_check(uint64_t address, uint64_t size, uint32_t align, uint32_t space, uint32_t kind, uint32_t line) {
  const void* older = nullptr;
  const uint64_t relative = address - arena;
  if (relative >= kSlots * kSlotSize) {
    // Constants at program scope lie in the library itself, and the compiler checks their bounds.
    if (space != kConstant)
      fail(line, "%s address 0x%llx, which no %s argument or variable has", kKindNames[kind],
           (unsigned long long)address, kSpaceNames[space]);
    return nullptr;
  }
  const int index = (int)(relative / kSlotSize);
  const Slot& slot = slots[index];
  const int64_t offset = (int64_t)(address - (slot.size ? slot.base : middle(index)));
  char where[160];
  if (offset < 0 || (uint64_t)offset + size > slot.size) {
    place(where, sizeof where, slot, index, offset);
    fail(line, "%s %llu bytes outside %s", kKindNames[kind], (unsigned long long)size, where);
  }
  if (slot.space != space && slot.space != kThread) {
    place(where, sizeof where, slot, index, offset);
    fail(line, "%s %s as %s memory", kKindNames[kind], where, kSpaceNames[space]);
  }
  if (align && address % align) {
    place(where, sizeof where, slot, index, offset);
    fail(line, "%s %s, which is not aligned to %u bytes", kKindNames[kind], where, align);
  }
  if ((kind & kWrite) && !slot.writable) {
    place(where, sizeof where, slot, index, offset);
    fail(line, "%s read-only %s", kKindNames[kind], where);
  }
  const Self& self = schedule_self();
  const bool local = space == kThreadgroup;
  const Access now = {self.thread + 1, self.group + 1, local ? self.threadgroup_epoch : self.device_epoch,
                      local ? self.threadgroup_simd_epoch : self.device_simd_epoch};
  const uint64_t first = (uint64_t)offset / slot.element;
  const uint64_t last = ((uint64_t)offset + size - 1) / slot.element;
  for (uint64_t i = first; i <= last; ++i) {
    if (slot.touch && !slot.touch[i]) {
      place(where, sizeof where, slot, index, offset);
      fail(line, "%s between the elements of %s: no index of the tensor leads there", kKindNames[kind], where);
    }
    if (kind & kRead) {
      const bool known = slot.written_in ? slot.written_in[i] == now.group : !slot.written || slot.written[i];
      if (!known) {
        place(where, sizeof where, slot, index, offset);
        fail(line, "%s memory that nothing wrote: %s", kKindNames[kind], where);
      }
    }
    if (kind & kWrite) {
      if (slot.written_in) slot.written_in[i] = now.group;
      if (slot.written) slot.written[i] = 1;
    }
    if (!slot.cells) continue;
    Cell& cell = slot.cells[i];
    if (local && cell.writer.group != now.group) {
      cell.writer = Access{};
      cell.history = 0;
    }
    if (local && cell.reader.group != now.group) cell.reader = Access{};
    const bool atomic = kind & kAtomic;
    const Access* other = nullptr;
    const char* did = "";
    if (!(atomic && cell.atomic_writer) && !ordered(cell.writer, now, self.simdgroup)) {
      other = &cell.writer;
      did = cell.atomic_writer ? "atomically updated" : "wrote";
    } else if ((kind & kWrite) && !(atomic && cell.atomic_reader) && !ordered(cell.reader, now, self.simdgroup)) {
      other = &cell.reader;
      did = "read";
    }
    if (other) {
      char who[96];
      describe(who, sizeof who, *other);
      place(where, sizeof where, slot, index, offset);
      fail(line, "%s %s, which %s %s with no barrier between: a data race", kKindNames[kind], where, who, did);
    }
    if (kind & kWrite) {
      cell.writer = merge(cell.writer, now, self.simdgroup);
      cell.atomic_writer = atomic;
      if (atomic && size == slot.element)
        history_keep(cell, address, (uint32_t)size, now);
      else
        cell.history = 0;  // everything before is ordered before this
    } else {
      if (atomic && size == slot.element) older = history_load(cell, now, self.simdgroup);
      cell.atomic_reader = atomic && (cell.atomic_reader || ordered(cell.reader, now, self.simdgroup));
      cell.reader = merge(cell.reader, now, self.simdgroup);
    }
  }
  return older;
}
