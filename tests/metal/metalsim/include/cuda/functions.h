// <metal_math>, <metal_common>, <metal_integer>, <metal_relational> for scalars.
#pragma once

namespace metal {

#define METAL_INTEGER_FUNCTIONS(T)                                                      \
  METAL_INLINE T min(T a, T b) { return b < a ? b : a; }                                \
  METAL_INLINE T max(T a, T b) { return a < b ? b : a; }                                \
  METAL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }           \
  METAL_INLINE T abs(T x) { return T(-1) < T(1) && x < T(1) ? T(-x) : x; }              \
  METAL_INLINE T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; }
METAL_INTEGER_FUNCTIONS(char)
METAL_INTEGER_FUNCTIONS(uchar)
METAL_INTEGER_FUNCTIONS(short)
METAL_INTEGER_FUNCTIONS(ushort)
METAL_INTEGER_FUNCTIONS(int)
METAL_INTEGER_FUNCTIONS(uint)
METAL_INTEGER_FUNCTIONS(long)
METAL_INTEGER_FUNCTIONS(ulong)
#undef METAL_INTEGER_FUNCTIONS

#define METAL_UNARY(name, function)                               \
  METAL_INLINE float name(float x) { return function(x); }        \
  METAL_INLINE half_t name(half_t x) { return half_t(function((float)x)); }
METAL_UNARY(abs, ::fabsf)
METAL_UNARY(fabs, ::fabsf)
METAL_UNARY(floor, ::floorf)
METAL_UNARY(ceil, ::ceilf)
METAL_UNARY(trunc, ::truncf)
METAL_UNARY(round, ::roundf)
METAL_UNARY(rint, ::rintf)
METAL_UNARY(sqrt, ::sqrtf)
METAL_UNARY(rsqrt, ::rsqrtf)
METAL_UNARY(exp, ::expf)
METAL_UNARY(exp2, ::exp2f)
METAL_UNARY(log, ::logf)
METAL_UNARY(log2, ::log2f)
METAL_UNARY(log10, ::log10f)
METAL_UNARY(sin, ::sinf)
METAL_UNARY(cos, ::cosf)
METAL_UNARY(tan, ::tanf)
METAL_UNARY(tanh, ::tanhf)
#undef METAL_UNARY

#define METAL_FLOAT_FUNCTIONS(T)                                                                    \
  METAL_INLINE T fma(T a, T b, T c) { return T(::fmaf((float)a, (float)b, (float)c)); }             \
  METAL_INLINE T min(T a, T b) { return T(::fminf((float)a, (float)b)); }                           \
  METAL_INLINE T max(T a, T b) { return T(::fmaxf((float)a, (float)b)); }                           \
  METAL_INLINE T fmin(T a, T b) { return min(a, b); }                                               \
  METAL_INLINE T fmax(T a, T b) { return max(a, b); }                                               \
  METAL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }                       \
  METAL_INLINE T saturate(T x) { return clamp(x, T(0.0f), T(1.0f)); }                               \
  METAL_INLINE T pow(T a, T b) { return T(::powf((float)a, (float)b)); }                            \
  METAL_INLINE T fmod(T a, T b) { return T(::fmodf((float)a, (float)b)); }                          \
  METAL_INLINE T copysign(T a, T b) { return T(::copysignf((float)a, (float)b)); }                  \
  METAL_INLINE T fract(T x) { return x - floor(x); }                                                \
  METAL_INLINE T mix(T a, T b, T t) { return a + (b - a) * t; }                                     \
  METAL_INLINE T sign(T x) { return x > T(0.0f) ? T(1.0f) : x < T(0.0f) ? T(-1.0f) : T(0.0f); }     \
  METAL_INLINE T step(T edge, T x) { return x < edge ? T(0.0f) : T(1.0f); }                         \
  METAL_INLINE T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; } \
  METAL_INLINE bool isnan(T x) { return ::isnan((float)x); }                                        \
  METAL_INLINE bool isinf(T x) { return ::isinf((float)x); }                                        \
  METAL_INLINE bool isfinite(T x) { return ::isfinite((float)x); }                                  \
  METAL_INLINE bool isunordered(T a, T b) { return isnan(a) || isnan(b); }
METAL_FLOAT_FUNCTIONS(float)
METAL_FLOAT_FUNCTIONS(half_t)
#undef METAL_FLOAT_FUNCTIONS

METAL_INLINE uint popcount(uint x) { return (uint)__popc(x); }
METAL_INLINE int popcount(int x) { return __popc((uint)x); }
METAL_INLINE ulong popcount(ulong x) { return (ulong)__popcll(x); }
METAL_INLINE uint clz(uint x) { return (uint)__clz((int)x); }
METAL_INLINE uint ctz(uint x) { return x ? (uint)__ffs((int)x) - 1 : 32; }
METAL_INLINE int mulhi(int a, int b) { return __mulhi(a, b); }
METAL_INLINE uint mulhi(uint a, uint b) { return __umulhi(a, b); }

namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

}  // namespace metal
