// half and bfloat with Metal's conversions: both become float by themselves, and a float becomes a half by itself, but
// not a bfloat.
#pragma once

namespace metal {

template <typename T>
constexpr bool is_arithmetic_v = is_same_v<T, float> || is_integral_v<T>;

struct half_t {
  __half value;

  half_t() = default;
  template <typename T, typename = enable_if_t<is_arithmetic_v<T>>>
  METAL_INLINE half_t(T x) : value(__float2half_rn((float)x)) {}
  METAL_INLINE explicit half_t(bfloat_t x);
  METAL_INLINE operator float() const { return __half2float(value); }
};

struct bfloat_t {
  __nv_bfloat16 value;

  bfloat_t() = default;
  template <typename T, typename = enable_if_t<is_arithmetic_v<T>>>
  METAL_INLINE explicit bfloat_t(T x) : value(__float2bfloat16_rn((float)x)) {}
  METAL_INLINE explicit bfloat_t(half_t x) : value(__float2bfloat16_rn((float)x)) {}
  METAL_INLINE operator float() const { return __bfloat162float(value); }
};

METAL_INLINE half_t::half_t(bfloat_t x) : value(__float2half_rn((float)x)) {}

// An operation of two of them, or of one and an integer, rounds to the type; with a float the result is a float.
#define METAL_OPERATOR(T, op)                                                                          \
  METAL_INLINE T operator op(T a, T b) { return T((float)a op(float) b); }                             \
  METAL_INLINE float operator op(T a, float b) { return (float)a op b; }                               \
  METAL_INLINE float operator op(float a, T b) { return a op(float) b; }                               \
  template <typename I, typename = enable_if_t<is_integral_v<I>>>                                      \
  METAL_INLINE T operator op(T a, I b) {                                                               \
    return T((float)a op(float) b);                                                                    \
  }                                                                                                    \
  template <typename I, typename = enable_if_t<is_integral_v<I>>>                                      \
  METAL_INLINE T operator op(I a, T b) {                                                               \
    return T((float)a op(float) b);                                                                    \
  }                                                                                                    \
  template <typename A>                                                                                \
  METAL_INLINE T& operator op##=(T & a, A b) {                                                         \
    a = T((float)a op(float) b);                                                                       \
    return a;                                                                                          \
  }
#define METAL_OPERATORS(T)                                    \
  METAL_OPERATOR(T, +)                                        \
  METAL_OPERATOR(T, -)                                        \
  METAL_OPERATOR(T, *)                                        \
  METAL_OPERATOR(T, /)                                        \
  METAL_INLINE T operator-(T a) { return T(-(float)a); }
METAL_OPERATORS(half_t)
METAL_OPERATORS(bfloat_t)
#undef METAL_OPERATORS
#undef METAL_OPERATOR

template <typename To, typename From>
METAL_INLINE To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace metal
