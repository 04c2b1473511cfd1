#include "instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#ifdef OMNIOPS_X86_DISPATCH
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace omniops {
namespace {

#ifdef OMNIOPS_X86_DISPATCH

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf) {
  Registers r{};
#ifdef _MSC_VER
  int values[4];
  __cpuidex(values, 0, 0);
  if (static_cast<unsigned>(values[0]) >= leaf) {
    __cpuidex(values, static_cast<int>(leaf), 0);
    r = {static_cast<unsigned>(values[0]), static_cast<unsigned>(values[1]), static_cast<unsigned>(values[2]),
         static_cast<unsigned>(values[3])};
  }
#else
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

unsigned enabled_state() {
#ifdef _MSC_VER
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

// The bits are those of Intel's manual, volume 2, CPUID, leaves 1 and 7, and of volume 1, 13.3, XCR0.
InstructionSet widest() {
  const unsigned leaf1 = cpuid(1).c;
  const unsigned leaf7 = cpuid(7).b;
  const unsigned osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
  if (!has(leaf1, osxsave | avx | fma | f16c) || !has(leaf7, 1u << 5 /* AVX2 */)) return InstructionSet::baseline;
  const unsigned state = enabled_state();
  if (!has(state, 0x6 /* the system saves XMM and YMM */)) return InstructionSet::baseline;
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  if (!has(leaf7, f | dq | bw | vl) || !has(state, 0xe6 /* and ZMM and mask registers */)) return InstructionSet::avx2;
  return InstructionSet::avx512;
}

#else

InstructionSet widest() { return InstructionSet::baseline; }

#endif

InstructionSet choose() {
  const InstructionSet available = widest();
  const char* wanted = std::getenv("OMNIOPS_CPU_CAPABILITY");
  for (InstructionSet set : {InstructionSet::baseline, InstructionSet::avx2}) {
    if (wanted != nullptr && std::strcmp(wanted, name(set)) == 0 && set < available) return set;
  }
  return available;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace omniops
