"""Relaxed atomics: which values a load may give, and the mistakes that show where it gives an older one."""

from typing import Any

import emulator
import pytest
import torch
from test_emulator import compiled
from torch import Tensor

LAUNCHES = 100


def counted(library: Any, kernel: str, threads: int, group_size: int = 64) -> list[Tensor]:
    """What ``kernel(counters, out)`` writes to out, thread by thread, in so many launches; counters begin with 0."""
    results = []
    for _ in range(LAUNCHES):
        counters, out = torch.zeros(4, dtype=torch.int32), torch.full((threads,), -1, dtype=torch.int32)
        getattr(library, kernel)(counters, out, threads=threads, group_size=group_size)
        results.append(out)
    return results


def kernel(body: str, group_memory: str = "") -> Any:
    return compiled(f"""
    inline int load(device atomic_int* x) {{ return atomic_load_explicit(x, memory_order_relaxed); }}
    inline void store(device atomic_int* x, int value) {{ atomic_store_explicit(x, value, memory_order_relaxed); }}
    inline int add(device atomic_int* x, int value) {{
      return atomic_fetch_add_explicit(x, value, memory_order_relaxed);
    }}
    kernel void f(device atomic_int* x, device int* out, uint i [[thread_position_in_grid]],
                  uint t [[thread_position_in_threadgroup]]) {{ {group_memory} {body} }}""")


MESSAGE = "if (i == 0) { store(x, 7); store(x + 1, 1); } out[i] = i == 0 || load(x + 1) == 0 ? 7 : load(x);"


@pytest.mark.parametrize("group_size", [16, 1], ids=["in a group", "of another group"])
def test_a_message_behind_a_relaxed_flag_may_not_be_there(group_size: int) -> None:
    library = kernel(MESSAGE)
    assert any(bool((out != 7).any()) for out in counted(library, "f", 16, group_size))
    with emulator.newest_values():
        assert all(bool((out == 7).all()) for out in counted(library, "f", 16, group_size))


def test_loads_of_one_thread_never_go_back_in_time() -> None:
    library = kernel("""
      int before = 0, wrong = 0;
      for (int k = 0; k < 6; ++k) {
        if (t % 4 == 0) add(x, 1);
        const int now = load(x);
        wrong += now < before ? 1 : 0;
        before = now;
      }
      out[i] = wrong;""")
    for group_size in (32, 1):
        assert all(bool((out == 0).all()) for out in counted(library, "f", 64, group_size))


def test_a_thread_sees_what_it_wrote_itself() -> None:
    library = kernel("""
      const int before = add(x, 1);
      const int now = load(x);
      store(x + 1, int(i) + 1);
      out[i] = now > before && load(x + 1) != 0 ? 1 : 0;
      atomic_fetch_max_explicit(x + 2, int(i), memory_order_relaxed);
      out[i] = load(x + 2) >= int(i) ? out[i] : 0;""")
    assert all(bool((out == 1).all()) for out in counted(library, "f", 64, 1))


def test_what_happened_before_a_barrier_is_seen_after_it() -> None:
    library = kernel("""
      if (t == 0) { for (int k = 1; k <= 5; ++k) store(x, k); }
      threadgroup_barrier(mem_flags::mem_device);
      out[i] = load(x);""")
    assert all(bool((out == 5).all()) for out in counted(library, "f", 40))


def test_what_a_thread_was_given_before_a_barrier_others_are_given_after_it() -> None:
    # The second group writes, the first one reads.
    library = kernel("""
      if (i >= 40) {
        if (t == 0) { for (int k = 1; k <= 5; ++k) store(x, k); }
        out[i] = 1;
        return;
      }
      if (t == 0) seen = load(x);
      threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
      out[i] = load(x) >= seen ? 1 : 0;""", "threadgroup int seen;")  # fmt: skip
    assert all(bool((out == 1).all()) for out in counted(library, "f", 80, 40))


def test_a_barrier_for_threadgroup_memory_orders_no_device_memory() -> None:
    library = kernel("""
      if (t == 0) store(x, 5);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[i] = load(x);""")
    assert any(bool((out == 0).any()) for out in counted(library, "f", 40))


def test_read_modify_writes_take_the_newest_value() -> None:
    library = kernel("(void)load(x); out[i] = add(x, 1);")
    for out in counted(library, "f", 64, 8):
        assert out.sort().values.tolist() == list(range(64))


def test_a_launch_sees_what_earlier_launches_wrote() -> None:
    library = kernel("if (i == 0) { store(x, load(x) + 1); } out[i] = 0;")
    counters, out = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for _ in range(LAUNCHES):
        library.f(counters, out, threads=64, group_size=8)
    assert counters.item() == LAUNCHES


def test_threadgroup_atomics_are_relaxed_too() -> None:
    library = kernel("""
      if (t == 0) { atomic_store_explicit(&a, 0, memory_order_relaxed); }
      if (t == 0) { atomic_store_explicit(&b, 0, memory_order_relaxed); }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t == 0) {
        atomic_store_explicit(&a, 7, memory_order_relaxed);
        atomic_store_explicit(&b, 1, memory_order_relaxed);
      }
      out[i] = t == 0 || atomic_load_explicit(&b, memory_order_relaxed) == 0
          ? 7 : atomic_load_explicit(&a, memory_order_relaxed);""", "threadgroup atomic_int a, b;")  # fmt: skip
    assert any(bool((out != 7).any()) for out in counted(library, "f", 40))


ONE_TRY = """
    int expected = load(x + 1);
    out[i] = atomic_compare_exchange_weak_explicit(x + 1, &expected, expected + 1, memory_order_relaxed,
                                                   memory_order_relaxed) ? 1 : 0;"""


def test_a_weak_compare_exchange_fails_now_and_then() -> None:
    library = kernel(ONE_TRY)
    assert any(bool((out == 0).any()) for out in counted(library, "f", 1))
    with emulator.newest_values():
        assert all(bool((out == 1).all()) for out in counted(library, "f", 1))


UNION_FIND = """
inline uint parent_of(device const atomic_uint* parents, uint node) {
  return atomic_load_explicit(parents + node, memory_order_relaxed);
}
inline uint root_of(device const atomic_uint* parents, uint node) {
  for (uint parent = parent_of(parents, node); parent != node; parent = parent_of(parents, node)) node = parent;
  return node;
}
inline void unite(device atomic_uint* parents, uint a, uint b) {
  for (;;) {
    a = root_of(parents, a);
    b = root_of(parents, b);
    if (a == b) return;
    const uint later = max(a, b);
    b = min(a, b);
    a = atomic_fetch_min_explicit(parents + later, b, memory_order_relaxed);
    if (a == later) return;
  }
}
// A chain. The thread that is the last to have united its two nodes reads the roots of all.
kernel void at_once(device atomic_uint* parents, device atomic_uint* done, device uint* roots, constant long& n,
                    uint i [[thread_position_in_grid]]) {
  unite(parents, i, i + 1u);
  if (atomic_fetch_add_explicit(done, 1u, memory_order_relaxed) + 2u < uint(n)) return;
  for (uint node = 0u; node < uint(n); ++node) roots[node] = root_of(parents, node);
}
kernel void union_only(device atomic_uint* parents, uint i [[thread_position_in_grid]]) { unite(parents, i, i + 1u); }
kernel void find_only(device atomic_uint* parents, device uint* roots, uint i [[thread_position_in_grid]]) {
  roots[i] = root_of(parents, i);
}
"""


def roots_of_a_chain(library: Any, at_once: bool) -> Tensor:
    n = 50
    parents, roots = torch.arange(n, dtype=torch.int32), torch.full((n,), -1, dtype=torch.int32)
    if at_once:
        library.at_once(parents, torch.zeros(1, dtype=torch.int32), roots, n, threads=n - 1, group_size=16)
    else:
        library.union_only(parents, threads=n - 1, group_size=16)
        library.find_only(parents, roots, threads=n, group_size=16)
    return roots


def test_a_union_find_that_takes_a_relaxed_load_for_the_newest_value() -> None:
    """Planted: all threads have counted themselves, and still the last one may read parents from before."""
    library = compiled(UNION_FIND)
    assert any(bool(roots_of_a_chain(library, at_once=True).any()) for _ in range(LAUNCHES))
    with emulator.newest_values():
        assert not any(bool(roots_of_a_chain(library, at_once=True).any()) for _ in range(LAUNCHES))
    assert not any(bool(roots_of_a_chain(library, at_once=False).any()) for _ in range(LAUNCHES))
