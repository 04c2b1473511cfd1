// Rows of channels in vectors of simd.h: as many whole ones as fit, then ever shorter ones.
#pragma once

#include "simd.h"

namespace omniops {
namespace OMNIOPS_NAMESPACE {

using Index = std::int64_t;

// A compile-time number, as an argument.
template <int value_>
struct Constant {
  static constexpr int value = value_;
};

OMNIOPS_INLINE void prefetch(const void* address) {
#if OMNIOPS_VECTOR_EXTENSION
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

template <int lanes, class A, class Work>
OMNIOPS_INLINE void rest(Index x, Index count, const Work& work) {
  if constexpr (lanes > 0) {
    if (x + lanes <= count) {
      work(Constant<lanes>{}, x);
      x += lanes;
    }
    rest<lanes / 2, A>(x, count, work);
  }
}

// Calls work(lanes, x) for vectors that cover 0 ... count - 1: as many whole ones as fit, then ever shorter ones.
template <class A, class Work>
OMNIOPS_INLINE void for_vectors(Index count, const Work& work) {
  Index x = 0;
  for (; x + kLanes<A> <= count; x += kLanes<A>) work(Constant<kLanes<A>>{}, x);
  rest<kLanes<A> / 2, A>(x, count, work);
}

// Fewer numbers in half precision than simd.h's load and store take: what is left of a run, or a short one.
template <int lanes, class T>
OMNIOPS_INLINE Vector<float, lanes> widen_few(Constant<lanes>, const T* source) {
  Vector<float, lanes> v;
  for (int i = 0; i < lanes; ++i) v[i] = widen(source[i]);
  return v;
}

template <int lanes, class T, class V>
OMNIOPS_INLINE void narrow_few(Constant<lanes>, V v, T* target) {
  for (int i = 0; i < lanes; ++i) narrow(static_cast<float>(v[i]), target[i]);
}

#if OMNIOPS_VECTOR_EXTENSION
template <int lanes>
OMNIOPS_INLINE Vector<float, lanes> widen_few(Constant<lanes>, const BFloat16* source) {
  return widen_bfloat16<lanes>(load_bits<Vector<std::uint16_t, lanes>>(source));
}

template <int lanes, class V>
OMNIOPS_INLINE void narrow_few(Constant<lanes>, V v, BFloat16* target) {
  const auto bits = narrow_to_bfloat16<lanes>(v);
  std::memcpy(target, &bits, sizeof bits);
}

#if defined(__F16C__)
OMNIOPS_INLINE Vector<float, 8> widen_few(Constant<8>, const Float16* source) {
  return (Vector<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
OMNIOPS_INLINE Vector<float, 4> widen_few(Constant<4>, const Float16* source) {
  return (Vector<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
}
#endif
#endif

// Numbers from any address and to any, fewer than kLanes too.
template <int lanes, class T>
OMNIOPS_INLINE Vector<Accumulator<T>, lanes> vector_at(const T* source) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return load_bits<Vector<A, lanes>>(source);
  } else if constexpr (lanes == kLanes<A>) {
    return load(source);
  } else {
    return widen_few(Constant<lanes>{}, source);
  }
}

template <int lanes, class T>
OMNIOPS_INLINE void store_at(T* target, Vector<Accumulator<T>, lanes> v) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    std::memcpy(target, &v, sizeof v);
  } else if constexpr (lanes == kLanes<A>) {
    store(target, v);
  } else {
    narrow_few(Constant<lanes>{}, v, target);
  }
}

template <class A, class V>
OMNIOPS_INLINE void add(V value, A* target) {
  value = load_bits<V>(target) + value;
  std::memcpy(target, &value, sizeof value);
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
