// What the emulator adds to a kernel: threadgroup memory, builtins, and a description of its parameters.
#pragma once

#define METAL_HERE uint line = __builtin_LINE(), uint column = __builtin_COLUMN()

extern "C" {
void emulator_check(ulong address, ulong size, uint align, uint space_and_kind, uint line);
void emulator_atomic(ulong address, void* value, uint size, uint space_and_kind, uint line);
bool emulator_fails();
void emulator_either(const float* a, const float* b, float* result);
ulong emulator_threadgroup(uint site, ulong size, uint element, const char* name, uint line);
void emulator_barrier(uint flags, uint line, uint column) __attribute__((convergent));
uint emulator_simd(const char* operation, const void* value, void* lanes, uint size, uint flags, uint line,
                   uint column) __attribute__((convergent));
uint emulator_lane();
void emulator_fail(const char* what, uint line);
}

namespace metal {

template <typename T, int n>
using vec = T __attribute__((ext_vector_type(n)));

template <typename T>
struct atomic;

}  // namespace metal
#include "../element.h"
namespace metal {

namespace host {
template <typename T, int n>
struct Element<T __attribute__((ext_vector_type(n)))> : Element<T> {};
}  // namespace host

namespace emulator {
using host::Element;
using host::Parameter;

template <typename T>
struct Size {
  static constexpr uint value = sizeof(T);
};
template <>
struct Size<void> {
  static constexpr uint value = 1;
};

template <uint site, typename T>
METAL_INLINE threadgroup T& threadgroup_variable(const char* name, uint line) {
  return *(threadgroup T*)emulator_threadgroup(site, sizeof(T), Size<typename Element<T>::scalar>::value, name, line);
}

struct Position {
  uint thread_position_in_grid[3];
  uint threadgroup_position_in_grid[3];
  uint thread_position_in_threadgroup[3];
  uint threads_per_threadgroup[3];
  uint threadgroups_per_grid[3];
  uint threads_per_grid[3];
  uint thread_index_in_threadgroup[3];
  uint thread_index_in_simdgroup[3];
  uint simdgroup_index_in_threadgroup[3];
  uint simdgroups_per_threadgroup[3];
  uint threads_per_simdgroup[3];
};

template <typename T>
struct Builtin {
  static T from(const uint* v) { return (T)v[0]; }
};
template <typename T>
struct Builtin<T __attribute__((ext_vector_type(2)))> {
  static vec<T, 2> from(const uint* v) { return vec<T, 2>{(T)v[0], (T)v[1]}; }
};
template <typename T>
struct Builtin<T __attribute__((ext_vector_type(3)))> {
  static vec<T, 3> from(const uint* v) { return vec<T, 3>{(T)v[0], (T)v[1], (T)v[2]}; }
};

template <typename P>
struct Buffer {
  static_assert(sizeof(P) == 0, "a buffer parameter is a device or constant pointer or reference");
};
#define METAL_BUFFER(QUALIFIED, writes)                                                          \
  template <typename T>                                                                          \
  struct Buffer<QUALIFIED T*> {                                                                  \
    static constexpr Parameter parameter = {Element<T>::name, writes, false, sizeof(T)};     \
    static QUALIFIED T* from(ulong address) { return (QUALIFIED T*)address; }                    \
  };                                                                                             \
  template <typename T>                                                                          \
  struct Buffer<QUALIFIED T&> {                                                                  \
    static constexpr Parameter parameter = {Element<T>::name, writes, true, sizeof(T)};     \
    static QUALIFIED T& from(ulong address) { return *(QUALIFIED T*)address; }                   \
  };
METAL_BUFFER(device, true)
METAL_BUFFER(device const, false)
METAL_BUFFER(constant, false)
#undef METAL_BUFFER

template <typename Function>
struct Kernel;
template <typename... P>
struct Kernel<void (*)(P...)> {
  template <int n>
  using Type = __type_pack_element<n, P...>;
  template <int n>
  using BufferAt = Buffer<Type<n>>;
  template <int n>
  static Type<n> builtin(const uint* v) {
    return Builtin<Type<n>>::from(v);
  }
};

}  // namespace emulator

// float4(a, b), as Metal has it: scalars and vectors one after the other, or one scalar for all.
namespace emulator {
template <typename S>
struct Width {
  static constexpr int value = 1;
};
template <typename S, int n>
struct Width<S __attribute__((ext_vector_type(n)))> {
  static constexpr int value = n;
};

template <typename V>
METAL_INLINE void fill(V&, int) {}
template <typename V, typename A, typename... Rest>
METAL_INLINE void fill(V& vector, int at, A first, Rest... rest);
template <typename V, typename A>
METAL_INLINE enable_if_t<Width<A>::value == 1> put(V& vector, int at, A value) {
  vector[at] = (typename Element<V>::scalar)value;
}
template <typename V, typename A>
METAL_INLINE enable_if_t<(Width<A>::value > 1)> put(V& vector, int at, A value) {
  for (int i = 0; i < Width<A>::value; ++i) vector[at + i] = (typename Element<V>::scalar)value[i];
}
template <typename V, typename A, typename... Rest>
METAL_INLINE void fill(V& vector, int at, A first, Rest... rest) {
  put(vector, at, first);
  fill(vector, at + Width<A>::value, rest...);
}
template <typename... A>
struct Total {
  static constexpr int value = 0;
};
template <typename A, typename... Rest>
struct Total<A, Rest...> {
  static constexpr int value = Width<A>::value + Total<Rest...>::value;
};
}  // namespace emulator

template <typename V>
METAL_INLINE V make() {
  return V(0);
}
template <typename V, typename A>
METAL_INLINE enable_if_t<emulator::Width<A>::value == 1, V> make(A value) {
  return V((typename emulator::Element<V>::scalar)value);
}
template <typename V, typename A>
METAL_INLINE enable_if_t<(emulator::Width<A>::value > 1), V> make(A value) {
  static_assert(emulator::Width<A>::value == emulator::Width<V>::value, "vectors of different width");
  return __builtin_convertvector(value, V);
}
template <typename V, typename A, typename B, typename... Rest>
METAL_INLINE V make(A first, B second, Rest... rest) {
  static_assert(emulator::Total<A, B, Rest...>::value == emulator::Width<V>::value, "as many values as the vector has");
  V vector = V(0);
  emulator::fill(vector, 0, first, second, rest...);
  return vector;
}

template <typename To, typename From>
METAL_INLINE To as_type(const From& value) {  // a value of a float type would be finite under fast math
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, value);
}

}  // namespace metal

using metal::as_type;
