// <metal_type_traits> and <metal_array>, shared by the emulator and the CUDA shim.
#pragma once

namespace metal {

template <typename A, typename B>
struct is_same {
  static constexpr bool value = false;
};
template <typename A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <typename A, typename B>
constexpr bool is_same_v = is_same<A, B>::value;

template <bool condition, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool condition, typename T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <bool condition, typename A, typename B>
struct conditional {
  using type = A;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool condition, typename A, typename B>
using conditional_t = typename conditional<condition, A, B>::type;

template <typename T>
T&& declval();

template <typename T>
struct remove_cv {
  using type = T;
};
template <typename T>
struct remove_cv<const T> : remove_cv<T> {};
template <typename T>
struct remove_cv<volatile T> : remove_cv<T> {};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;


template <typename T>
struct is_floating_point {
  static constexpr bool value = is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
                                is_same_v<remove_cv_t<T>, bfloat>;
};
template <typename T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;

template <typename T>
struct is_integral {
  using U = remove_cv_t<T>;
  static constexpr bool value = is_same_v<U, bool> || is_same_v<U, char> || is_same_v<U, signed char> ||
                                is_same_v<U, unsigned char> || is_same_v<U, short> || is_same_v<U, ushort> ||
                                is_same_v<U, int> || is_same_v<U, uint> || is_same_v<U, long> || is_same_v<U, ulong>;
};
template <typename T>
constexpr bool is_integral_v = is_integral<T>::value;

template <typename T, size_t n>
struct array {
  T elements[n];
  METAL_INLINE T& operator[](size_t i) { return elements[i]; }
  METAL_INLINE const T& operator[](size_t i) const { return elements[i]; }
  METAL_INLINE constexpr size_t size() const { return n; }
};

}  // namespace metal
