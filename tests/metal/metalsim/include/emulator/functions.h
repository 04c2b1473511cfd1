// <metal_math>, <metal_common>, <metal_integer>, <metal_relational>: overloads for Metal's types, none for bfloat, and
// no templates, so that a mixed call such as max(int, uint) is ambiguous as it is in Metal. For bfloat they are deleted.
#pragma once

namespace metal {

#define METAL_EACH_WIDTH(M, T) M(T) M(T##2) M(T##3) M(T##4)
#define METAL_EACH_FLOAT(M) METAL_EACH_WIDTH(M, float) METAL_EACH_WIDTH(M, half)
#define METAL_EACH_INTEGER(M)                                                                              \
  METAL_EACH_WIDTH(M, char) METAL_EACH_WIDTH(M, uchar) METAL_EACH_WIDTH(M, short) METAL_EACH_WIDTH(M, ushort) \
  METAL_EACH_WIDTH(M, int) METAL_EACH_WIDTH(M, uint) METAL_EACH_WIDTH(M, long) METAL_EACH_WIDTH(M, ulong)

// With fast math the smaller of two numbers of which one is not finite is anybody's guess, and so is the larger.
#ifdef __FAST_MATH__
#define METAL_EITHER(a, b, result) emulator::either(a, b, result)
namespace emulator {
METAL_INLINE float either(float a, float b, float result) {
  emulator_either(&a, &b, &result);
  return result;
}
template <typename T>
METAL_INLINE enable_if_t<is_same_v<T, half>, T> either(T a, T b, T result) {
  return half(either(float(a), float(b), float(result)));
}
template <typename T>
METAL_INLINE enable_if_t<(Width<T>::value > 1), T> either(T a, T b, T result) {
  for (int i = 0; i < Width<T>::value; ++i) result[i] = either(a[i], b[i], result[i]);
  return result;
}
}  // namespace emulator
#else
#define METAL_EITHER(a, b, result) (result)
#endif

#define METAL_MIN_MAX(T, EITHER)                                                              \
  METAL_INLINE T min(T a, T b) { return EITHER(a, b, __builtin_elementwise_min(a, b)); }      \
  METAL_INLINE T max(T a, T b) { return EITHER(a, b, __builtin_elementwise_max(a, b)); }      \
  METAL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }                 \
  METAL_INLINE T min3(T a, T b, T c) { return min(min(a, b), c); }                            \
  METAL_INLINE T max3(T a, T b, T c) { return max(max(a, b), c); }
#define METAL_FLOAT_MIN_MAX(T) METAL_MIN_MAX(T, METAL_EITHER)
#define METAL_INTEGER_MIN_MAX(T) METAL_MIN_MAX(T, METAL_NEVER)
#define METAL_NEVER(a, b, result) (result)
METAL_EACH_FLOAT(METAL_FLOAT_MIN_MAX)
METAL_EACH_INTEGER(METAL_INTEGER_MIN_MAX)
#undef METAL_FLOAT_MIN_MAX
#undef METAL_INTEGER_MIN_MAX
#undef METAL_MIN_MAX
#undef METAL_NEVER
bfloat min(bfloat, bfloat) = delete;
bfloat max(bfloat, bfloat) = delete;
bfloat clamp(bfloat, bfloat, bfloat) = delete;
bfloat abs(bfloat) = delete;
bfloat fma(bfloat, bfloat, bfloat) = delete;
bfloat pow(bfloat, bfloat) = delete;

#define METAL_SIGNED_ABS(T) \
  METAL_INLINE T abs(T x) { return __builtin_elementwise_abs(x); }
#define METAL_UNSIGNED_ABS(T) \
  METAL_INLINE T abs(T x) { return x; }
METAL_EACH_FLOAT(METAL_SIGNED_ABS)
METAL_EACH_WIDTH(METAL_SIGNED_ABS, char)
METAL_EACH_WIDTH(METAL_SIGNED_ABS, short)
METAL_EACH_WIDTH(METAL_SIGNED_ABS, int)
METAL_EACH_WIDTH(METAL_SIGNED_ABS, long)
METAL_EACH_WIDTH(METAL_UNSIGNED_ABS, uchar)
METAL_EACH_WIDTH(METAL_UNSIGNED_ABS, ushort)
METAL_EACH_WIDTH(METAL_UNSIGNED_ABS, uint)
METAL_EACH_WIDTH(METAL_UNSIGNED_ABS, ulong)
#undef METAL_SIGNED_ABS
#undef METAL_UNSIGNED_ABS

// With fast math functions have errors, here always towards zero.
#ifdef __FAST_MATH__
#define METAL_ROUNDED(T, value) T((value) * T(0.999999f))
#else
#define METAL_ROUNDED(T, value) (value)
#endif

#define METAL_UNARY(name, builtin)                            \
  namespace emulator {                                        \
  template <typename T>                                       \
  METAL_INLINE T name##_of(T x) {                             \
    return METAL_EXACT(T, builtin(x));                        \
  }                                                           \
  }                                                           \
  bfloat name(bfloat) = delete;                               \
  METAL_INLINE float name(float x) { return emulator::name##_of(x); }    \
  METAL_INLINE float2 name(float2 x) { return emulator::name##_of(x); }  \
  METAL_INLINE float3 name(float3 x) { return emulator::name##_of(x); }  \
  METAL_INLINE float4 name(float4 x) { return emulator::name##_of(x); }  \
  METAL_INLINE half name(half x) { return emulator::name##_of(x); }      \
  METAL_INLINE half2 name(half2 x) { return emulator::name##_of(x); }    \
  METAL_INLINE half3 name(half3 x) { return emulator::name##_of(x); }    \
  METAL_INLINE half4 name(half4 x) { return emulator::name##_of(x); }
#define METAL_EXACT(T, value) (value)
METAL_UNARY(fabs, __builtin_elementwise_abs)
METAL_UNARY(floor, __builtin_elementwise_floor)
METAL_UNARY(ceil, __builtin_elementwise_ceil)
METAL_UNARY(trunc, __builtin_elementwise_trunc)
METAL_UNARY(round, __builtin_elementwise_round)
METAL_UNARY(rint, __builtin_elementwise_rint)
#undef METAL_EXACT
#define METAL_EXACT(T, value) METAL_ROUNDED(T, value)
METAL_UNARY(sqrt, __builtin_elementwise_sqrt)
METAL_UNARY(exp, __builtin_elementwise_exp)
METAL_UNARY(exp2, __builtin_elementwise_exp2)
METAL_UNARY(log, __builtin_elementwise_log)
METAL_UNARY(log2, __builtin_elementwise_log2)
METAL_UNARY(log10, __builtin_elementwise_log10)
METAL_UNARY(sin, __builtin_elementwise_sin)
METAL_UNARY(cos, __builtin_elementwise_cos)
METAL_UNARY(tan, __builtin_elementwise_tan)
METAL_UNARY(tanh, __builtin_elementwise_tanh)
#undef METAL_UNARY
#undef METAL_EXACT

#define METAL_FLOAT_FUNCTIONS(T)                                                             \
  METAL_INLINE T fma(T a, T b, T c) { return __builtin_elementwise_fma(a, b, c); }           \
  METAL_INLINE T fmin(T a, T b) { return min(a, b); }                                        \
  METAL_INLINE T fmax(T a, T b) { return max(a, b); }                                        \
  METAL_INLINE T pow(T a, T b) { return METAL_ROUNDED(T, __builtin_elementwise_pow(a, b)); } \
  METAL_INLINE T copysign(T a, T b) { return __builtin_elementwise_copysign(a, b); }         \
  METAL_INLINE T rsqrt(T x) { return T(1) / sqrt(x); }                                       \
  METAL_INLINE T fract(T x) { return x - floor(x); }                                         \
  METAL_INLINE T mix(T a, T b, T t) { return a + (b - a) * t; }                              \
  METAL_INLINE T saturate(T x) { return clamp(x, T(0), T(1)); }                              \
  METAL_INLINE T fmod(T a, T b) { return a - b * trunc(a / b); }
METAL_EACH_FLOAT(METAL_FLOAT_FUNCTIONS)
#undef METAL_FLOAT_FUNCTIONS
#undef METAL_ROUNDED
#undef METAL_EITHER

#define METAL_CLASSIFY(T)                                                    \
  METAL_INLINE bool isunordered(T a, T b) { return a != a || b != b; }       \
  METAL_INLINE T ldexp(T x, int e) { return (T)__builtin_ldexpf((float)x, e); } \
  METAL_INLINE bool isnan(T x) { return __builtin_isnan((float)x); }         \
  METAL_INLINE bool isinf(T x) { return __builtin_isinf((float)x); }         \
  METAL_INLINE bool isfinite(T x) { return __builtin_isfinite((float)x); }   \
  METAL_INLINE bool signbit(T x) { return __builtin_signbit((float)x); }     \
  METAL_INLINE T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0); } \
  METAL_INLINE T step(T edge, T x) { return x < edge ? T(0) : T(1); }
METAL_CLASSIFY(float)
METAL_CLASSIFY(half)
#undef METAL_CLASSIFY

#define METAL_SELECT(T) \
  METAL_INLINE T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; }
METAL_EACH_FLOAT(METAL_SELECT)
METAL_EACH_INTEGER(METAL_SELECT)
#undef METAL_SELECT

#define METAL_DOT(T)                                                                                    \
  METAL_INLINE T dot(T##2 a, T##2 b) { return a.x * b.x + a.y * b.y; }                                  \
  METAL_INLINE T dot(T##3 a, T##3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }                      \
  METAL_INLINE T dot(T##4 a, T##4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
METAL_DOT(float)
METAL_DOT(half)
#undef METAL_DOT

METAL_INLINE uint popcount(uint x) { return (uint)__builtin_popcount(x); }
METAL_INLINE int popcount(int x) { return __builtin_popcount((uint)x); }
METAL_INLINE ulong popcount(ulong x) { return (ulong)__builtin_popcountl(x); }
METAL_INLINE uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32; }
METAL_INLINE uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32; }
METAL_INLINE int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
METAL_INLINE uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }

// Both are the same functions here.
namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

}  // namespace metal

constexpr float INFINITY = __builtin_huge_valf();
constexpr float NAN = __builtin_nanf("");
constexpr float FLT_MAX = 3.40282347e+38f;
constexpr float FLT_MIN = 1.17549435e-38f;
constexpr float FLT_EPSILON = 1.19209290e-07f;
constexpr half HALF_MAX = (half)65504.0f;
constexpr int INT_MAX = 2147483647;
constexpr int INT_MIN = -2147483647 - 1;
constexpr uint UINT_MAX = 4294967295u;
constexpr float M_PI_F = 3.14159274f;
