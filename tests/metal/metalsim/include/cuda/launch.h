// How a launch reaches a kernel: everything by value, in the kernel's parameters.
#pragma once

namespace metal {
namespace host {

template <typename T, int n>
struct Element<vec<T, n>> : Element<T> {};

constexpr int kBuffers = 31;
constexpr int kInlineBytes = 2048;

// Python fills in the same layout.
struct Launch {
  uint threads[3];
  ulong buffers[kBuffers];               // device addresses
  alignas(16) char bytes[kInlineBytes];  // what the constant ones hold
};

// Metal's groups at the end of an axis have fewer threads. CUDA's blocks all have the same number, so threads beyond it
// leave at once, and the others are numbered as Metal numbers them.
struct Position {
  uint thread_position_in_grid[3];
  uint threadgroup_position_in_grid[3];
  uint thread_position_in_threadgroup[3];
  uint threads_per_threadgroup[3];
  uint threadgroups_per_grid[3];
  uint threads_per_grid[3];
  uint thread_index_in_threadgroup[1];
  uint thread_index_in_simdgroup[1];
  uint simdgroup_index_in_threadgroup[1];
  uint simdgroups_per_threadgroup[1];
  uint threads_per_simdgroup[1];

  // False for a thread that Metal would not have.
  __device__ __forceinline__ bool begin(const Launch& launch) {
    const uint group[3] = {blockIdx.x, blockIdx.y, blockIdx.z};
    const uint full[3] = {blockDim.x, blockDim.y, blockDim.z};
    const uint groups[3] = {gridDim.x, gridDim.y, gridDim.z};
    const uint index = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    uint inside[3] = {threadIdx.x, threadIdx.y, threadIdx.z};
    uint count = 1;
    bool partial = false;
    for (int axis = 0; axis < 3; ++axis) {
      const uint left = launch.threads[axis] - group[axis] * full[axis];
      partial |= left < full[axis];
      threads_per_threadgroup[axis] = left < full[axis] ? left : full[axis];
      count *= threads_per_threadgroup[axis];
    }
    if (partial) {
      if (index >= count) return false;
      inside[0] = index % threads_per_threadgroup[0];
      inside[1] = index / threads_per_threadgroup[0] % threads_per_threadgroup[1];
      inside[2] = index / threads_per_threadgroup[0] / threads_per_threadgroup[1];
    }
    for (int axis = 0; axis < 3; ++axis) {
      thread_position_in_grid[axis] = group[axis] * full[axis] + inside[axis];
      threadgroup_position_in_grid[axis] = group[axis];
      thread_position_in_threadgroup[axis] = inside[axis];
      threadgroups_per_grid[axis] = groups[axis];
      threads_per_grid[axis] = launch.threads[axis];
    }
    thread_index_in_threadgroup[0] = index;
    thread_index_in_simdgroup[0] = index % 32;
    simdgroup_index_in_threadgroup[0] = index / 32;
    simdgroups_per_threadgroup[0] = (count + 31) / 32;
    threads_per_simdgroup[0] = 32;
    return true;
  }
};

template <typename T>
struct Builtin {
  METAL_INLINE static T from(const uint* v) { return (T)v[0]; }
};
template <typename T>
struct Builtin<vec<T, 2>> {
  METAL_INLINE static vec<T, 2> from(const uint* v) { return vec<T, 2>((T)v[0], (T)v[1]); }
};
template <typename T>
struct Builtin<vec<T, 3>> {
  METAL_INLINE static vec<T, 3> from(const uint* v) { return vec<T, 3>((T)v[0], (T)v[1], (T)v[2]); }
};

template <typename T>
struct IsConst {
  static constexpr bool value = false;
};
template <typename T>
struct IsConst<const T> {
  static constexpr bool value = true;
};

// Saying that device buffers lie in global memory spares their loads the generic addressing.
METAL_INLINE void* device_address(const Launch& launch, int buffer) {
  void* address = (void*)launch.buffers[buffer];
  __builtin_assume(__isGlobal(address));
  return address;
}

template <typename P>
struct Buffer;
template <typename T>
struct Buffer<T*> {
  static constexpr Parameter parameter = {Element<T>::name, !IsConst<T>::value, false, sizeof(T)};
  METAL_INLINE static T* from(const void* address) { return (T*)address; }
};
template <typename T>
struct Buffer<T&> {
  static constexpr Parameter parameter = {Element<T>::name, !IsConst<T>::value, true, sizeof(T)};
  METAL_INLINE static T& from(const void* address) { return *(T*)address; }
};

template <int n, typename P, typename... Rest>
struct At : At<n - 1, Rest...> {};
template <typename P, typename... Rest>
struct At<0, P, Rest...> {
  using type = P;
};
template <typename Function>
struct Kernel;
template <typename... P>
struct Kernel<void (*)(P...)> {
  template <int n>
  using BufferAt = Buffer<typename At<n, P...>::type>;
  template <int n>
  using BuiltinAt = Builtin<typename At<n, P...>::type>;
};

}  // namespace host
}  // namespace metal
