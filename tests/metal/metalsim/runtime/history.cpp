#include "history.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "schedule.h"

namespace {

constexpr uint32_t kKept = 4;           // values of a variable, beside the newest
constexpr uint32_t kViews = 8;          // threads of which is known what they have been given
constexpr uint32_t kVariables = 1 << 20;  // of a launch; what is beyond has its newest value only

// A version is the number of writes before it. The value of version v is at v % kKept.
struct Value {
  uint64_t bits;
  Access overwriter;  // who wrote the next version
};

struct View {
  Access reader;
  uint32_t version;  // what it has been given
};

struct History {
  uint32_t version;  // the newest
  uint32_t oldest;   // nobody is given an older one any more
  uint32_t views;
  Value values[kKept];
  View viewed[kViews];
};

History* histories;
uint32_t used;
uint32_t older_every;

uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

uint32_t oldest_kept(const History& history) {
  return larger(history.oldest, history.version > kKept ? history.version - kKept : 0);
}

// The oldest version that the running thread may still be given.
uint32_t oldest_for(const History& history, const Access& now, uint32_t simdgroup) {
  uint32_t oldest = oldest_kept(history);
  for (uint32_t v = history.version; v > oldest; --v)
    if (ordered(history.values[(v - 1) % kKept].overwriter, now, simdgroup)) {
      oldest = v;
      break;
    }
  for (uint32_t i = 0; i < history.views; ++i)
    if (history.viewed[i].version > oldest && ordered(history.viewed[i].reader, now, simdgroup))
      oldest = history.viewed[i].version;
  return oldest;
}

bool same(const Access& a, const Access& b) {
  return a.thread == b.thread && a.group == b.group && a.epoch == b.epoch && a.simd_epoch == b.simd_epoch;
}

// Notes that the running thread has been given this version. Where there is no room for it, all are given the newest.
void note(History& history, const Access& now, uint32_t version) {
  for (uint32_t i = 0; i < history.views; ++i)
    if (same(history.viewed[i].reader, now)) {
      history.viewed[i].version = version;
      return;
    }
  if (history.views == kViews) {
    const uint32_t oldest = oldest_kept(history);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < history.views; ++i)
      if (history.viewed[i].version > oldest) history.viewed[kept++] = history.viewed[i];
    history.views = kept;
  }
  if (history.views == kViews) {
    history.oldest = history.version;
    history.views = 0;
    return;
  }
  history.viewed[history.views++] = View{now, version};
}

}  // namespace

void history_reset(uint32_t every) {
  if (!histories) {
    void* memory = mmap(nullptr, kVariables * sizeof(History), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    histories = (History*)memory;
  }
  used = 1;  // 0 stands for a variable that has none
  older_every = every;
}

void history_keep(Cell& cell, uint64_t address, uint32_t size, const Access& now) {
  if (!older_every) return;
  if (!cell.history) {
    if (used == kVariables) return;
    cell.history = used++;
    histories[cell.history].version = histories[cell.history].oldest = histories[cell.history].views = 0;
  }
  History& history = histories[cell.history];
  Value& value = history.values[history.version % kKept];
  value.bits = 0;
  memcpy(&value.bits, (const void*)address, size);
  value.overwriter = now;
  ++history.version;
}

const void* history_load(const Cell& cell, const Access& now, uint32_t simdgroup) {
  if (!older_every || !cell.history) return nullptr;
  History& history = histories[cell.history];
  const uint32_t oldest = oldest_for(history, now, simdgroup);
  uint32_t version = history.version;
  if (oldest < version && schedule_random(older_every) == 0) version = oldest + schedule_random(version - oldest);
  note(history, now, version);
  return version == history.version ? nullptr : &history.values[version % kKept].bits;
}
