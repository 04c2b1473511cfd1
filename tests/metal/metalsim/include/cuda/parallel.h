// Barriers, <metal_simdgroup> and <metal_atomic>. A simdgroup is a warp.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
METAL_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
METAL_INLINE void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_INLINE void simdgroup_barrier(mem_flags) { __syncwarp(); }

namespace host {
constexpr uint kAllLanes = 0xffffffffu;

METAL_INLINE uint lane() {
  return ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) & 31;
}
// The lanes that have not left the kernel: those that have give a zero.
METAL_INLINE uint active() { return __ballot_sync(kAllLanes, 1); }

METAL_INLINE half_t from_lane(half_t value, uint lane) { return half_t{__shfl_sync(kAllLanes, (float)value, lane)}; }
template <typename T>
METAL_INLINE T from_lane(T value, uint lane) {
  return (T)__shfl_sync(kAllLanes, value, lane);
}
template <typename T, int n>
METAL_INLINE vec<T, n> from_lane(vec<T, n> value, uint lane) {
  for (int i = 0; i < n; ++i) value[i] = from_lane(value[i], lane);
  return value;
}
}  // namespace host

#define METAL_REDUCTION(name, combine)                                   \
  template <typename T>                                                  \
  METAL_INLINE T name(T a) {                                             \
    const uint active = host::active();                                  \
    if (active == host::kAllLanes) {                                     \
      for (uint mask = 16; mask > 0; mask >>= 1) {                       \
        const T b = host::from_lane(a, host::lane() ^ mask);             \
        a = combine;                                                     \
      }                                                                  \
      return a;                                                          \
    }                                                                    \
    const T own = a;                                                     \
    a = host::from_lane(own, __ffs((int)active) - 1);                    \
    for (uint left = active & (active - 1); left; left &= left - 1) {    \
      const T b = host::from_lane(own, __ffs((int)left) - 1);            \
      a = combine;                                                       \
    }                                                                    \
    return a;                                                            \
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
METAL_INLINE T simd_shuffle(T value, ushort lane) {
  return host::from_lane(value, lane);
}
template <typename T>
METAL_INLINE T simd_shuffle_xor(T value, ushort mask) {
  return host::from_lane(value, host::lane() ^ mask);
}
template <typename T>
METAL_INLINE T simd_shuffle_down(T value, ushort delta) {
  const uint lane = host::lane() + delta;
  return host::from_lane(value, lane < 32 ? lane : host::lane());
}
template <typename T>
METAL_INLINE T simd_shuffle_up(T value, ushort delta) {
  return host::from_lane(value, host::lane() >= delta ? host::lane() - delta : host::lane());
}
template <typename T>
METAL_INLINE T simd_broadcast(T value, ushort lane) {
  return host::from_lane(value, lane);
}
template <typename T>
METAL_INLINE T simd_broadcast_first(T value) {
  return host::from_lane(value, __ffs((int)host::active()) - 1);
}
template <typename T>
METAL_INLINE T simd_prefix_inclusive_sum(T value) {
  const uint active = host::active();
  for (uint delta = 1; delta < 32; delta <<= 1) {
    const T below = simd_shuffle_up(value, (ushort)delta);
    if (host::lane() >= delta && (active >> (host::lane() - delta) & 1)) value = T(value + below);
  }
  return value;
}
template <typename T>
METAL_INLINE T simd_prefix_exclusive_sum(T value) {
  return T(simd_prefix_inclusive_sum(value) - value);
}
METAL_INLINE bool simd_is_first() { return __ffs((int)host::active()) - 1 == (int)host::lane(); }
METAL_INLINE bool simd_all(bool value) { return __all_sync(host::kAllLanes, value); }
METAL_INLINE bool simd_any(bool value) { return __any_sync(host::kAllLanes, value); }

class simd_vote {
 public:
  using vote_t = ulong;
  METAL_INLINE explicit simd_vote(vote_t votes) : votes_(votes) {}
  METAL_INLINE explicit operator vote_t() const { return votes_; }
  METAL_INLINE bool all() const { return votes_ == 0xffffffffu; }
  METAL_INLINE bool any() const { return votes_ != 0; }

 private:
  vote_t votes_;
};
METAL_INLINE simd_vote simd_ballot(bool value) { return simd_vote(__ballot_sync(host::kAllLanes, value)); }
METAL_INLINE simd_vote simd_active_threads_mask() { return simd_vote(host::active()); }

enum memory_order { memory_order_relaxed };
namespace host {
template <typename T>
struct Same {
  using type = T;
};
}  // namespace host
#define METAL_GIVEN(T) typename host::Same<T>::type
#define METAL_FETCH(name, function)                                                                       \
  template <typename T>                                                                                   \
  METAL_INLINE T atomic_##name##_explicit(volatile atomic<T>* object, METAL_GIVEN(T) operand, memory_order) { \
    return function((T*)&object->value, operand);                                                         \
  }
METAL_FETCH(fetch_add, ::atomicAdd)
METAL_FETCH(fetch_min, ::atomicMin)
METAL_FETCH(fetch_max, ::atomicMax)
METAL_FETCH(fetch_and, ::atomicAnd)
METAL_FETCH(fetch_or, ::atomicOr)
METAL_FETCH(fetch_xor, ::atomicXor)
METAL_FETCH(exchange, ::atomicExch)
#undef METAL_FETCH
template <typename T>
METAL_INLINE T atomic_fetch_sub_explicit(volatile atomic<T>* object, METAL_GIVEN(T) operand, memory_order order) {
  return atomic_fetch_add_explicit(object, T(-operand), order);
}
template <typename T>
METAL_INLINE void atomic_store_explicit(volatile atomic<T>* object, METAL_GIVEN(T) desired, memory_order) {
#ifdef METAL_STORES_FOR_RACECHECK  // which takes a store for one that is not atomic
  ::atomicExch((T*)&object->value, (T)desired);
#else
  *(volatile T*)&object->value = desired;
#endif
}
template <typename T>
METAL_INLINE T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return *(const volatile T*)&object->value;
}
template <typename T>
METAL_INLINE bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, METAL_GIVEN(T) desired,
                                                        memory_order, memory_order) {
  const uint was = ::atomicCAS((uint*)&object->value, as_type<uint>(*expected), as_type<uint>((T)desired));
  const bool same = was == as_type<uint>(*expected);
  *expected = as_type<T>(was);
  return same;
}
#undef METAL_GIVEN

using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;

}  // namespace metal
