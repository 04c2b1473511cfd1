// Vectors as wide as a register of the instruction set that this file is compiled for, and loads and stores that
// convert float16 and bfloat16 to and from float.
//
// GCC's vector extension (clang's too) keeps a block of accumulators in registers, where loops over arrays that the
// compiler would have to vectorise and then to promote come out through memory. Other compilers get such loops.
//
// Everything here is in a namespace of the instruction set, and includes no header with functions of its own: the
// linker keeps one copy of an inline function, and a copy made for AVX-512 must never serve another processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(_MSC_VER)
#include <arm_neon.h>
#endif

// clang-cl has these extensions too, and does not define __GNUC__.
#if defined(__GNUC__) || defined(__clang__)
#define OMNIOPS_INLINE inline __attribute__((always_inline))
#define OMNIOPS_VECTOR_EXTENSION 1
#else
#define OMNIOPS_INLINE inline
#define OMNIOPS_VECTOR_EXTENSION 0
#endif

namespace omniops {
namespace OMNIOPS_NAMESPACE {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// What a type is accumulated in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

#if OMNIOPS_VECTOR_EXTENSION

template <class A, int lanes>
struct VectorOf {
  typedef A type __attribute__((vector_size(lanes * sizeof(A))));
};
template <class A, int lanes = kLanes<A>>
using Vector = typename VectorOf<A, lanes>::type;

template <class To, class From>
OMNIOPS_INLINE To convert(From from) {
  return __builtin_convertvector(from, To);
}

#else

template <class A, int lanes = kLanes<A>>
struct Vector {
  A lane[lanes];
  OMNIOPS_INLINE A& operator[](int i) { return lane[i]; }
  OMNIOPS_INLINE A operator[](int i) const { return lane[i]; }
};

#define OMNIOPS_LANEWISE(operation)                                                            \
  template <class A, int lanes>                                                                \
  OMNIOPS_INLINE Vector<A, lanes> operator operation(Vector<A, lanes> x, Vector<A, lanes> y) { \
    for (int i = 0; i < lanes; ++i) x.lane[i] = x.lane[i] operation y.lane[i];                 \
    return x;                                                                                  \
  }                                                                                            \
  template <class A, int lanes>                                                                \
  OMNIOPS_INLINE Vector<A, lanes> operator operation(Vector<A, lanes> x, A y) {                \
    for (int i = 0; i < lanes; ++i) x.lane[i] = x.lane[i] operation y;                         \
    return x;                                                                                  \
  }
OMNIOPS_LANEWISE(+)
OMNIOPS_LANEWISE(*)
#undef OMNIOPS_LANEWISE

#endif

template <class V>
OMNIOPS_INLINE V load_bits(const void* source) {
  V v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

// --- one number ---

OMNIOPS_INLINE double widen(double x) { return x; }
OMNIOPS_INLINE float widen(float x) { return x; }

OMNIOPS_INLINE float widen(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  return load_bits<float>(&bits);
}

OMNIOPS_INLINE std::uint32_t bits_of(float x) { return load_bits<std::uint32_t>(&x); }

// Exact: a subnormal float16 is its significand times 2**-24, and a float has the room.
OMNIOPS_INLINE float widen(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const std::uint32_t significand = x.bits & 0x3ffu;
  const std::uint32_t small = bits_of(static_cast<float>(static_cast<std::int32_t>(significand)) * 0x1p-24f);
  const std::uint32_t normal = ((exponent == 31 ? 255u : exponent + 112u) << 23) | (significand << 13);
  const std::uint32_t bits = sign | (exponent == 0 ? small : normal);
  return load_bits<float>(&bits);
}

OMNIOPS_INLINE void narrow(double x, double& out) { out = x; }
OMNIOPS_INLINE void narrow(float x, float& out) { out = x; }

// To the nearest, ties to even; a NaN stays one, quiet.
OMNIOPS_INLINE void narrow(float x, BFloat16& out) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// To the nearest, ties to even. Below the normal numbers the float adder rounds: 0.5 has the last place of a
// subnormal float16, 2**-24.
OMNIOPS_INLINE void narrow(float x, Float16& out) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t small = bits_of(load_bits<float>(&magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < (113u << 23) ? small : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

// --- a register of numbers ---

// kLanes numbers, from any address.
template <class T>
OMNIOPS_INLINE Vector<Accumulator<T>> load(const T* source) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return load_bits<Vector<A>>(source);
  } else {
    Vector<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = widen(source[i]);
    return v;
  }
}

template <class T>
OMNIOPS_INLINE void store(T* target, Vector<Accumulator<T>> v) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    std::memcpy(target, &v, sizeof v);
  } else {
    for (int i = 0; i < kLanes<A>; ++i) narrow(static_cast<A>(v[i]), target[i]);
  }
}

#if OMNIOPS_VECTOR_EXTENSION

template <int lanes>
OMNIOPS_INLINE Vector<float, lanes> widen_bfloat16(Vector<std::uint16_t, lanes> half) {
  return (Vector<float, lanes>)(convert<Vector<std::uint32_t, lanes>>(half) << 16);
}

template <int lanes>
OMNIOPS_INLINE Vector<std::uint16_t, lanes> narrow_to_bfloat16(Vector<float, lanes> v) {
  using Bits = Vector<std::uint32_t, lanes>;
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits chosen = (((bits >> 16) | 0x40u) & is_nan) | (rounded & ~is_nan);
  return convert<Vector<std::uint16_t, lanes>>(chosen);
}

template <>
OMNIOPS_INLINE Vector<float> load<BFloat16>(const BFloat16* source) {
  return widen_bfloat16<kLanes<float>>(load_bits<Vector<std::uint16_t, kLanes<float>>>(source));
}

template <>
OMNIOPS_INLINE void store<BFloat16>(BFloat16* target, Vector<float> v) {
  const auto half = narrow_to_bfloat16<kLanes<float>>(v);
  std::memcpy(target, &half, sizeof half);
}

#if defined(__AVX512F__)
template <>
OMNIOPS_INLINE Vector<float> load<Float16>(const Float16* source) {
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
template <>
OMNIOPS_INLINE void store<Float16>(Float16* target, Vector<float> v) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), half);
}
#elif defined(__F16C__)
template <>
OMNIOPS_INLINE Vector<float> load<Float16>(const Float16* source) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
template <>
OMNIOPS_INLINE void store<Float16>(Float16* target, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
template <>
OMNIOPS_INLINE Vector<float> load<Float16>(const Float16* source) {
  return (Vector<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&source->bits)));
}
template <>
OMNIOPS_INLINE void store<Float16>(Float16* target, Vector<float> v) {
  vst1_u16(&target->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
#endif

#endif  // OMNIOPS_VECTOR_EXTENSION

// Keeps a loaded value that several multiplications share in a register: GCC would rather load it again for each.
template <class V>
OMNIOPS_INLINE V loaded(V v) {
#if OMNIOPS_VECTOR_EXTENSION && !defined(__clang__) && defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Of a vector the first `count` numbers alone, by instructions that touch no memory beyond them.
#if OMNIOPS_VECTOR_EXTENSION && defined(__AVX512F__)
#define OMNIOPS_MASKED 1
OMNIOPS_INLINE __mmask16 first_lanes(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
OMNIOPS_INLINE Vector<float> load_part(const float* source, std::int64_t count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(count), source);
}
OMNIOPS_INLINE Vector<double> load_part(const double* source, std::int64_t count) {
  return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), source);
}
OMNIOPS_INLINE void store_part(float* target, Vector<float> v, std::int64_t count) {
  _mm512_mask_storeu_ps(target, first_lanes(count), (__m512)v);
}
OMNIOPS_INLINE void store_part(double* target, Vector<double> v, std::int64_t count) {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>(first_lanes(count)), (__m512d)v);
}
#elif OMNIOPS_VECTOR_EXTENSION && defined(__AVX2__)
#define OMNIOPS_MASKED 1
OMNIOPS_INLINE __m256i first_of_8(std::int64_t count) {
  return (__m256i)(Vector<std::int32_t, 8>{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<std::int32_t>(count));
}
OMNIOPS_INLINE __m256i first_of_4(std::int64_t count) { return (__m256i)(Vector<std::int64_t, 4>{0, 1, 2, 3} < count); }
OMNIOPS_INLINE Vector<float> load_part(const float* source, std::int64_t count) {
  return (Vector<float>)_mm256_maskload_ps(source, first_of_8(count));
}
OMNIOPS_INLINE Vector<double> load_part(const double* source, std::int64_t count) {
  return (Vector<double>)_mm256_maskload_pd(source, first_of_4(count));
}
OMNIOPS_INLINE void store_part(float* target, Vector<float> v, std::int64_t count) {
  _mm256_maskstore_ps(target, first_of_8(count), (__m256)v);
}
OMNIOPS_INLINE void store_part(double* target, Vector<double> v, std::int64_t count) {
  _mm256_maskstore_pd(target, first_of_4(count), (__m256d)v);
}
#else
#define OMNIOPS_MASKED 0
#endif

// `count` numbers and zeros after them.
template <class T>
OMNIOPS_INLINE Vector<Accumulator<T>> load(const T* source, std::int64_t count) {
  if (count >= kLanes<Accumulator<T>>) return load(source);
#if OMNIOPS_MASKED
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) return load_part(source, count);
#endif
  T buffer[kLanes<Accumulator<T>>] = {};
  for (std::int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
}

template <class T>
OMNIOPS_INLINE void store(T* target, Vector<Accumulator<T>> v, std::int64_t count) {
  if (count >= kLanes<Accumulator<T>>) return store(target, v);
#if OMNIOPS_MASKED
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) return store_part(target, v, count);
#endif
  T buffer[kLanes<Accumulator<T>>];
  store(buffer, v);
  for (std::int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

template <class A, int lanes>
OMNIOPS_INLINE A sum_of(const A* lane) {
  if constexpr (lanes == 1) {
    return lane[0];
  } else {
    return sum_of<A, lanes / 2>(lane) + sum_of<A, lanes / 2>(lane + lanes / 2);
  }
}

template <class A>
OMNIOPS_INLINE A sum(Vector<A> v) {
  A lane[kLanes<A>];
  std::memcpy(lane, &v, sizeof v);
  return sum_of<A, kLanes<A>>(lane);
}

template <class T>
OMNIOPS_INLINE void widen_row(const T* source, std::int64_t count, Accumulator<T>* target) {
  constexpr std::int64_t lanes = kLanes<Accumulator<T>>;
  for (std::int64_t x = 0; x < count; x += lanes) store(target + x, load(source + x, count - x), count - x);
}

template <class T>
OMNIOPS_INLINE void narrow_row(const Accumulator<T>* source, std::int64_t count, T* target) {
  constexpr std::int64_t lanes = kLanes<Accumulator<T>>;
  for (std::int64_t x = 0; x < count; x += lanes) store(target + x, load(source + x, count - x), count - x);
}

template <class A>
OMNIOPS_INLINE void fill_zero(A* target, std::int64_t count) {
  for (std::int64_t x = 0; x < count; ++x) target[x] = 0;
}

}  // namespace OMNIOPS_NAMESPACE
}  // namespace omniops
