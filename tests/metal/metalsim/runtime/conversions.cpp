// The conversions that clang calls where the machine has no instruction for them. The C library has none of them.
#include <stdint.h>

namespace {

template <typename To, typename From>
To bits(From value) {
  return __builtin_bit_cast(To, value);
}

}  // namespace

extern "C" {

__bf16 __truncsfbf2(float value) {
  uint32_t x = bits<uint32_t>(value);
  if (value != value)
    x |= 0x00400000u;  // stays a NaN
  else
    x += 0x7fffu + (x >> 16 & 1);  // to nearest, ties to even
  return bits<__bf16>((uint16_t)(x >> 16));
}

_Float16 __truncsfhf2(float value) {
  const uint32_t x = bits<uint32_t>(value), sign = x >> 16 & 0x8000u, magnitude = x & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u)
    result = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // a NaN
  else if (magnitude >= 0x477ff000u)
    result = 0x7c00u;  // 65520 and more round to infinity
  else if (magnitude >= 0x38800000u)
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  else
    // Below the smallest normal half: adding 0.5 leaves multiples of 2^-24 in the last bits, rounded to even.
    result = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  return bits<_Float16>((uint16_t)(sign | result));
}

float __extendhfsf2(_Float16 value) {
  const uint32_t x = bits<uint16_t>(value), sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | magnitude << 13);
  if (magnitude >= 0x0400u) return bits<float>(sign | ((magnitude << 13) + 0x38000000u));
  return bits<float>(sign | bits<uint32_t>((float)magnitude * 0x1p-24f));
}

float __extendbfsf2(__bf16 value) { return bits<float>((uint32_t)bits<uint16_t>(value) << 16); }

}  // extern "C"
