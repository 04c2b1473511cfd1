// <metal_limits>, shared by the emulator and the CUDA shim.
#pragma once

namespace metal {

template <typename T>
struct numeric_limits;
#define METAL_INTEGER_LIMITS(T, least, most)                       \
  template <>                                                      \
  struct numeric_limits<T> {                                       \
    static constexpr bool is_integer = true;                       \
    METAL_INLINE static constexpr T min() { return (T)(least); }   \
    METAL_INLINE static constexpr T lowest() { return (T)(least); } \
    METAL_INLINE static constexpr T max() { return (T)(most); }    \
  };
METAL_INTEGER_LIMITS(char, -128, 127)
METAL_INTEGER_LIMITS(uchar, 0, 255)
METAL_INTEGER_LIMITS(short, -32768, 32767)
METAL_INTEGER_LIMITS(ushort, 0, 65535)
METAL_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647)
METAL_INTEGER_LIMITS(uint, 0, 4294967295u)
METAL_INTEGER_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
METAL_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul)
#undef METAL_INTEGER_LIMITS
#define METAL_FLOAT_LIMITS(T, CONSTEXPR, least, most, step)                     \
  template <>                                                          \
  struct numeric_limits<T> {                                           \
    static constexpr bool is_integer = false;                          \
    METAL_INLINE static CONSTEXPR T min() { return (T)(least); }       \
    METAL_INLINE static CONSTEXPR T lowest() { return (T)(-(most)); }  \
    METAL_INLINE static CONSTEXPR T max() { return (T)(most); }        \
    METAL_INLINE static CONSTEXPR T epsilon() { return (T)(step); }    \
    METAL_INLINE static CONSTEXPR T infinity() { return (T)__builtin_huge_valf(); } \
    METAL_INLINE static CONSTEXPR T quiet_NaN() { return (T)__builtin_nanf(""); }   \
  };
METAL_FLOAT_LIMITS(float, constexpr, 1.17549435e-38f, 3.40282347e+38f, 1.19209290e-07f)
METAL_FLOAT_LIMITS(half, METAL_HALF_CONSTEXPR, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
METAL_FLOAT_LIMITS(bfloat, METAL_HALF_CONSTEXPR, 1.17549435e-38f, 3.38953139e+38f, 7.8125e-03f)
#undef METAL_FLOAT_LIMITS

}  // namespace metal
