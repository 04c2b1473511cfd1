// <metal_simdgroup> and the barriers. Every lane that has not left the kernel has to come to the same call.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
METAL_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }

METAL_INLINE void threadgroup_barrier(mem_flags flags, METAL_HERE) { emulator_barrier((uint)flags, line, column); }
METAL_INLINE void simdgroup_barrier(mem_flags flags, METAL_HERE) {
  emulator_simd("simdgroup_barrier", nullptr, nullptr, 0, (uint)flags, line, column);
}

namespace emulator {

template <typename T>
struct Lanes {
  T value[32];
  uint active;
};

template <typename T>
METAL_INLINE Lanes<T> lanes(const char* operation, T value, uint line, uint column) {
  static_assert(Element<T>::name != '?' && Element<T>::name != 'b' && Element<T>::name != 'B' &&
                    Element<T>::name != 'l' && Element<T>::name != 'L',
                "simdgroup functions take integers of up to 32 bits, half and float");
  Lanes<T> all;
  all.active = emulator_simd(operation, &value, all.value, sizeof(T), 0, line, column);
  return all;
}

template <typename T>
METAL_INLINE T lane_of(const Lanes<T>& all, uint lane, uint line) {
  if (lane >= 32 || !(all.active >> lane & 1)) emulator_fail("reads a lane of its simdgroup that is not active", line);
  return all.value[lane & 31];
}

}  // namespace emulator

#define METAL_REDUCTION(name, combine)                                        \
  template <typename T>                                                       \
  METAL_INLINE T name(T value, METAL_HERE) {                                  \
    const auto all = emulator::lanes(#name, value, line, column);             \
    T a = value;                                                              \
    bool first = true;                                                        \
    for (int i = 0; i < 32; ++i) {                                            \
      if (!(all.active >> i & 1)) continue;                                   \
      const T b = all.value[i];                                               \
      a = first ? b : combine;                                                \
      first = false;                                                          \
    }                                                                         \
    return a;                                                                 \
  }
METAL_REDUCTION(simd_sum, T(a + b))
METAL_REDUCTION(simd_product, T(a * b))
METAL_REDUCTION(simd_max, max(a, b))
METAL_REDUCTION(simd_min, min(a, b))
METAL_REDUCTION(simd_and, T(a & b))
METAL_REDUCTION(simd_or, T(a | b))
METAL_REDUCTION(simd_xor, T(a ^ b))
#undef METAL_REDUCTION

template <typename T>
METAL_INLINE T simd_prefix_inclusive_sum(T value, METAL_HERE) {
  const auto all = emulator::lanes("simd_prefix_inclusive_sum", value, line, column);
  T sum = T(0);
  for (uint i = 0; i <= emulator_lane(); ++i)
    if (all.active >> i & 1) sum = T(sum + all.value[i]);
  return sum;
}
template <typename T>
METAL_INLINE T simd_prefix_exclusive_sum(T value, METAL_HERE) {
  const auto all = emulator::lanes("simd_prefix_exclusive_sum", value, line, column);
  T sum = T(0);
  for (uint i = 0; i < emulator_lane(); ++i)
    if (all.active >> i & 1) sum = T(sum + all.value[i]);
  return sum;
}

template <typename T>
METAL_INLINE T simd_shuffle(T value, ushort lane, METAL_HERE) {
  return emulator::lane_of(emulator::lanes("simd_shuffle", value, line, column), lane, line);
}
template <typename T>
METAL_INLINE T simd_shuffle_xor(T value, ushort mask, METAL_HERE) {
  return emulator::lane_of(emulator::lanes("simd_shuffle_xor", value, line, column), emulator_lane() ^ mask, line);
}
// Past the end of the simdgroup the lanes keep their own value.
template <typename T>
METAL_INLINE T simd_shuffle_down(T value, ushort delta, METAL_HERE) {
  const auto all = emulator::lanes("simd_shuffle_down", value, line, column);
  const uint lane = emulator_lane() + delta;
  return lane < 32 ? emulator::lane_of(all, lane, line) : value;
}
template <typename T>
METAL_INLINE T simd_shuffle_up(T value, ushort delta, METAL_HERE) {
  const auto all = emulator::lanes("simd_shuffle_up", value, line, column);
  return emulator_lane() >= delta ? emulator::lane_of(all, emulator_lane() - delta, line) : value;
}
template <typename T>
METAL_INLINE T simd_broadcast(T value, ushort lane, METAL_HERE) {
  return emulator::lane_of(emulator::lanes("simd_broadcast", value, line, column), lane, line);
}
template <typename T>
METAL_INLINE T simd_broadcast_first(T value, METAL_HERE) {
  const auto all = emulator::lanes("simd_broadcast_first", value, line, column);
  return all.value[__builtin_ctz(all.active)];
}

METAL_INLINE bool simd_is_first(METAL_HERE) {
  return (uint)__builtin_ctz(emulator::lanes("simd_is_first", 0, line, column).active) == emulator_lane();
}
METAL_INLINE bool simd_all(bool value, METAL_HERE) {
  const auto all = emulator::lanes("simd_all", (uint)value, line, column);
  for (int i = 0; i < 32; ++i)
    if ((all.active >> i & 1) && !all.value[i]) return false;
  return true;
}
METAL_INLINE bool simd_any(bool value, METAL_HERE) {
  const auto all = emulator::lanes("simd_any", (uint)value, line, column);
  for (int i = 0; i < 32; ++i)
    if ((all.active >> i & 1) && all.value[i]) return true;
  return false;
}

class simd_vote {
 public:
  using vote_t = ulong;
  explicit simd_vote(vote_t votes) : votes_(votes) {}
  explicit operator vote_t() const { return votes_; }
  bool all() const { return votes_ == 0xffffffffu; }
  bool any() const { return votes_ != 0; }

 private:
  vote_t votes_;
};
METAL_INLINE simd_vote simd_ballot(bool value, METAL_HERE) {
  const auto all = emulator::lanes("simd_ballot", (uint)value, line, column);
  ulong votes = 0;
  for (int i = 0; i < 32; ++i)
    if ((all.active >> i & 1) && all.value[i]) votes |= 1ul << i;
  return simd_vote(votes);
}
METAL_INLINE simd_vote simd_active_threads_mask(METAL_HERE) {
  return simd_vote(emulator::lanes("simd_active_threads_mask", 0u, line, column).active);
}

}  // namespace metal
