// <metal_atomic>, with the only memory order that Metal has before 3.2. One OS thread runs all fibers. It may switch
// in the check that each operation begins with and not after it, so plain reads and writes are atomic; the memory checker
// is told that they are meant to be.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T value;
};

namespace emulator {
template <typename T>
constexpr bool is_atomic_integer = is_same_v<T, int> || is_same_v<T, uint>;
// T, but not for the compiler to deduce.
template <typename T>
struct Same {
  using type = T;
};
}  // namespace emulator

// The memory checker is told here what an atomic does, so its own accesses go round it, through plain pointers. ``before``
// is what is there, for a load perhaps an older value.
#define METAL_ATOMIC(space, kind) \
  T before;                       \
  emulator_atomic((ulong)object, &before, sizeof(T), space | kind, line)
#define METAL_GIVEN(T) typename emulator::Same<T>::type
#define METAL_ATOMIC_READ (5 << 2)
#define METAL_ATOMIC_WRITE (6 << 2)
#define METAL_ATOMIC_BOTH (7 << 2)

#define METAL_ATOMICS(SPACE, space, FLOATS)                                                                    \
  template <typename T>                                                                                        \
  METAL_INLINE void atomic_store_explicit(volatile SPACE atomic<T>* object, METAL_GIVEN(T) desired, memory_order,           \
                                          uint line = __builtin_LINE()) {                                      \
    METAL_ATOMIC(space, METAL_ATOMIC_WRITE);                                                                   \
    *(T*)(ulong)object = desired;                                                                              \
  }                                                                                                            \
  template <typename T>                                                                                        \
  METAL_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order,                    \
                                      uint line = __builtin_LINE()) {                                          \
    METAL_ATOMIC(space, METAL_ATOMIC_READ);                                                                    \
    return before;                                                                                             \
  }                                                                                                            \
  template <typename T>                                                                                        \
  METAL_INLINE T atomic_exchange_explicit(volatile SPACE atomic<T>* object, METAL_GIVEN(T) desired, memory_order,           \
                                          uint line = __builtin_LINE()) {                                      \
    METAL_ATOMIC(space, METAL_ATOMIC_BOTH);                                                                    \
    *(T*)(ulong)object = desired;                                                                              \
    return before;                                                                                             \
  }                                                                                                            \
  template <typename T>                                                                                        \
  METAL_INLINE bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* object, T* expected,       \
                                                          METAL_GIVEN(T) desired, memory_order, memory_order,               \
                                                          uint line = __builtin_LINE()) {                      \
    METAL_ATOMIC(space, METAL_ATOMIC_BOTH);                                                                    \
    const bool exchanges = __builtin_memcmp(&before, expected, sizeof(T)) == 0 && !emulator_fails();           \
    if (exchanges)                                                                                             \
      *(T*)(ulong)object = desired;                                                                            \
    else                                                                                                       \
      *expected = before;                                                                                      \
    return exchanges;                                                                                          \
  }                                                                                                            \
  METAL_FETCH(SPACE, space, fetch_add, before + operand, FLOATS)                                               \
  METAL_FETCH(SPACE, space, fetch_sub, before - operand, FLOATS)                                               \
  METAL_FETCH(SPACE, space, fetch_min, operand < before ? operand : before, false)                             \
  METAL_FETCH(SPACE, space, fetch_max, operand > before ? operand : before, false)                             \
  METAL_FETCH(SPACE, space, fetch_and, before & operand, false)                                                \
  METAL_FETCH(SPACE, space, fetch_or, before | operand, false)                                                 \
  METAL_FETCH(SPACE, space, fetch_xor, before ^ operand, false)

#define METAL_FETCH(SPACE, space, name, result, FLOATS)                                                        \
  template <typename T>                                                                                        \
  __attribute__((no_sanitize("undefined")))                                                                    \
  METAL_INLINE T atomic_##name##_explicit(volatile SPACE atomic<T>* object,                                    \
                                          METAL_GIVEN(T) operand, memory_order,              \
                                          uint line = __builtin_LINE()) {                                      \
    static_assert(emulator::is_atomic_integer<T> || (FLOATS && is_same_v<T, float>),                           \
                  "atomic_" #name "_explicit has no such type in this address space");                         \
    METAL_ATOMIC(space, METAL_ATOMIC_BOTH);                                                                    \
    *(T*)(ulong)object = (T)(result);                                                           \
    return before;                                                                                             \
  }

METAL_ATOMICS(device, 1, true)
METAL_ATOMICS(threadgroup, 3, false)
#undef METAL_ATOMICS
#undef METAL_FETCH
#undef METAL_ATOMIC
#undef METAL_GIVEN
#undef METAL_ATOMIC_READ
#undef METAL_ATOMIC_WRITE
#undef METAL_ATOMIC_BOTH

}  // namespace metal

using metal::memory_order_relaxed;
typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<float> atomic_float;
typedef metal::atomic<bool> atomic_bool;
