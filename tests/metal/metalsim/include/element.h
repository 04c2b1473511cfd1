// The scalar that a buffer's elements are made of, and the letter that names it to Python; '?' is a type of the kernel's.
#pragma once

namespace metal {
namespace host {

template <typename T>
struct Element {
  static constexpr char name = '?';
  using scalar = void;
};
#define METAL_ELEMENT(T, letter)             \
  template <>                                \
  struct Element<T> {                        \
    static constexpr char name = letter;     \
    using scalar = T;                        \
  };
METAL_ELEMENT(bool, 'b')
METAL_ELEMENT(char, 'c')
METAL_ELEMENT(signed char, 'c')
METAL_ELEMENT(uchar, 'C')
METAL_ELEMENT(short, 's')
METAL_ELEMENT(ushort, 'S')
METAL_ELEMENT(int, 'i')
METAL_ELEMENT(uint, 'I')
METAL_ELEMENT(long, 'l')
METAL_ELEMENT(ulong, 'L')
METAL_ELEMENT(half, 'h')
METAL_ELEMENT(bfloat, 'B')
METAL_ELEMENT(float, 'f')
#undef METAL_ELEMENT
template <typename T>
struct Element<atomic<T>> : Element<T> {};
template <>
struct Element<atomic<uint>> : Element<uint> {
  static constexpr char name = 'A';  // PyTorch's c10/metal/atomic.h lets one stand for two halves
};
template <typename T>
struct Element<const T> : Element<T> {};
template <typename T>
struct Element<volatile T> : Element<T> {};
template <typename T>
struct Element<const volatile T> : Element<T> {};
template <typename T, size_t n>
struct Element<T[n]> : Element<T> {};

// A buffer parameter; Python reads the same layout.
struct Parameter {
  char element;
  bool writable;
  bool reference;
  uint size;  // bytes of what it points or refers to
};

}  // namespace host
}  // namespace metal
