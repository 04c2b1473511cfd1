// Vectors of 2, 3 and 4 with members x, y, z, w; no swizzles of more than one.
#pragma once

namespace metal {

template <typename T, int n>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  METAL_INLINE explicit vec(T s) : x(s), y(s) {}
  METAL_INLINE vec(T x, T y) : x(x), y(y) {}
  METAL_INLINE T& operator[](int i) { return (&x)[i]; }
  METAL_INLINE T operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  METAL_INLINE explicit vec(T s) : x(s), y(s), z(s) {}
  METAL_INLINE vec(T x, T y, T z) : x(x), y(y), z(z) {}
  METAL_INLINE T& operator[](int i) { return (&x)[i]; }
  METAL_INLINE T operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  METAL_INLINE explicit vec(T s) : x(s), y(s), z(s), w(s) {}
  METAL_INLINE vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  METAL_INLINE T& operator[](int i) { return (&x)[i]; }
  METAL_INLINE T operator[](int i) const { return (&x)[i]; }
};

#define METAL_VECTOR_OPERATOR(op)                                              \
  template <typename T, int n>                                                 \
  METAL_INLINE vec<T, n> operator op(vec<T, n> a, vec<T, n> b) {               \
    for (int i = 0; i < n; ++i) a[i] = a[i] op b[i];                           \
    return a;                                                                  \
  }                                                                            \
  template <typename T, int n>                                                 \
  METAL_INLINE vec<T, n> operator op(vec<T, n> a, typename remove_cv<T>::type b) { \
    return a op vec<T, n>(b);                                                  \
  }                                                                            \
  template <typename T, int n>                                                 \
  METAL_INLINE vec<T, n> operator op(typename remove_cv<T>::type a, vec<T, n> b) { \
    return vec<T, n>(a) op b;                                                  \
  }                                                                            \
  template <typename T, int n, typename B>                                     \
  METAL_INLINE vec<T, n>& operator op##=(vec<T, n>& a, B b) {                  \
    a = a op b;                                                                \
    return a;                                                                  \
  }
METAL_VECTOR_OPERATOR(+)
METAL_VECTOR_OPERATOR(-)
METAL_VECTOR_OPERATOR(*)
METAL_VECTOR_OPERATOR(/)
#undef METAL_VECTOR_OPERATOR

namespace host {
template <typename T>
struct Width {
  static constexpr int value = 1;
};
template <typename T, int n>
struct Width<vec<T, n>> {
  static constexpr int value = n;
};
template <typename V>
struct Scalar;
template <typename T, int n>
struct Scalar<vec<T, n>> {
  using type = T;
};

template <typename V>
METAL_INLINE void fill(V&, int) {}
template <typename V, typename A, typename... Rest>
METAL_INLINE void fill(V& vector, int at, A first, Rest... rest) {
  if constexpr (Width<A>::value == 1)
    vector[at] = (typename Scalar<V>::type)first;
  else
    for (int i = 0; i < Width<A>::value; ++i) vector[at + i] = (typename Scalar<V>::type)first[i];
  fill(vector, at + Width<A>::value, rest...);
}
}  // namespace host

template <typename V, typename... A>
METAL_INLINE V make(A... parts) {
  if constexpr (sizeof...(A) == 1 && (host::Width<A>::value + ... + 0) == 1) {
    return V((typename host::Scalar<V>::type)parts...);
  } else {
    static_assert((host::Width<A>::value + ... + 0) == host::Width<V>::value, "as many values as the vector has");
    V vector;
    host::fill(vector, 0, parts...);
    return vector;
  }
}

}  // namespace metal

#define float2 metal::vec<float, 2>
#define float3 metal::vec<float, 3>
#define float4 metal::vec<float, 4>
#define half2 metal::vec<metal::half_t, 2>
#define half3 metal::vec<metal::half_t, 3>
#define half4 metal::vec<metal::half_t, 4>
#define bfloat2 metal::vec<metal::bfloat_t, 2>
#define bfloat3 metal::vec<metal::bfloat_t, 3>
#define bfloat4 metal::vec<metal::bfloat_t, 4>
#define char2 metal::vec<char, 2>
#define char4 metal::vec<char, 4>
#define uchar2 metal::vec<uchar, 2>
#define uchar4 metal::vec<uchar, 4>
#define short2 metal::vec<short, 2>
#define short3 metal::vec<short, 3>
#define short4 metal::vec<short, 4>
#define ushort2 metal::vec<ushort, 2>
#define ushort3 metal::vec<ushort, 3>
#define ushort4 metal::vec<ushort, 4>
#define int2 metal::vec<int, 2>
#define int3 metal::vec<int, 3>
#define int4 metal::vec<int, 4>
#define uint2 metal::vec<uint, 2>
#define uint3 metal::vec<uint, 3>
#define uint4 metal::vec<uint, 4>
#define long2 metal::vec<long, 2>
#define long3 metal::vec<long, 3>
#define long4 metal::vec<long, 4>
