"""The steps of a thread: loops that do not end, and lists that take too long."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import DeformConv2d, arguments
from test_emulator import compiled

from omniops.backends.mps import deform_conv2d as metal
from omniops.backends.mps._library import library


def test_the_thread_that_takes_the_most_steps_is_known() -> None:
    counting = compiled("""
    inline int twice(int n) { return n + n; }
    kernel void count(device int* out, uint2 i [[thread_position_in_grid]]) {
      int sum = 0;
      for (uint k = 0; k < 100u * i.y + i.x; ++k) sum += twice(1);
      out[10 * i.y + i.x] = sum;
    }
    kernel void plain(device int* out, uint i [[thread_position_in_grid]]) { out[i] = int(i); }""")
    out = torch.zeros(70, dtype=torch.int32)
    with emulator.launches() as launched:
        counting.count(out, threads=(10, 7), group_size=(4, 4))
        counting.plain(out, threads=70)
    count, plain = launched
    assert (count.kernel, count.worst_thread) == ("count", (9, 6, 0))
    # The condition, the body and the increment of a loop are blocks, and what follows a check for overflow.
    assert 3 * 609 <= count.worst_steps <= 6 * 609
    assert (plain.kernel, plain.worst_steps) == ("plain", 1)
    counting.plain(out, threads=70)
    assert len(launched) == 2


def test_metals_own_functions_take_no_steps() -> None:
    library = compiled("""
    kernel void f(device float* out, uint i [[thread_position_in_grid]]) {
      out[i] = simd_sum(clamp(float(i), 1.0f, 9.0f));
    }""")
    with emulator.launches() as launched:
        library.f(torch.zeros(64), threads=64, group_size=32)
    assert [launch.worst_steps for launch in launched] == [1]


@pytest.mark.parametrize(
    "body",
    [
        "for (uint k = 9u; k >= 0u; --k) out[i] = int(k);",
        "while (true) {}",
        "do { out[i] += 1; out[i] -= 1; } while (out[i] == 0);",
        "for (int k = 0; k < 10; k += int(i) - 7) out[i] = k;",  # thread 7 stays where it is
    ],
)
def test_a_loop_that_never_ends(body: str) -> None:
    """Planted: a GPU's watchdog ends such a launch, and PyTorch takes what is in memory for the result."""
    library = compiled(f"kernel void f(device int* out, uint i [[thread_position_in_grid]]) {{ {body} }}")
    out = torch.zeros(9, dtype=torch.int32)
    message = r"kernel f, line 3: thread \(\d, 0, 0\) of the grid takes more than {} steps, the budget of a thread"
    with (
        emulator.step_budget(1000),
        emulator.launches() as launched,
        pytest.raises(KernelError, match=message.format(1000)),
    ):
        library.f(out, threads=9)
    assert launched[0].worst_steps == 1001
    with pytest.raises(KernelError, match=message.format(2**22)):
        library.f(out, threads=9)


SLOW_SORT = """
kernel void slow_sort(device int* heads, device int* links, uint cell [[thread_position_in_grid]]) {
  device int* next = links + 3;
  int sorted = -1;
  for (int sample = heads[cell]; sample >= 0;) {
    const int following = next[4 * sample];
    int before = -1, after = sorted;
    while (after >= 0 && after < sample) {
      before = after;
      after = next[4 * after];
    }
    next[4 * sample] = after;
    if (before < 0) sorted = sample; else next[4 * before] = sample;
    sample = following;
  }
  heads[cell] = sorted;
}
"""


class _SlowSort:
    """The library, but with a sort that compares each sample of a list with each other one."""

    def __init__(self, shipped: Any) -> None:
        self.shipped = shipped
        self.slow = compiled(SLOW_SORT)

    def __getattr__(self, name: str) -> Any:
        return self.slow.slow_sort if name == "deform_conv2d_sort" else getattr(self.shipped, name)


def in_one_cell(case: DeformConv2d) -> list[Any]:
    """What deform_conv2d_backward_data takes, every sample in the middle of the image."""
    given = arguments("deform_conv2d_backward_data", case, torch.float32)
    offset, taps = given[2], math.prod(case.kernel_size)
    y, x = torch.meshgrid(torch.arange(offset.shape[2]), torch.arange(offset.shape[3]), indexing="ij")
    for tap in range(taps):
        offset[:, 2 * tap] = case.h / 2 + 0.25 - (y + tap // case.kernel_size[1] - case.padding[0])
        offset[:, 2 * tap + 1] = case.w / 2 + 0.25 - (x + tap % case.kernel_size[1] - case.padding[1])
    return given


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
    monkeypatch.setattr(emulator, "_seeds", itertools.count())
    library.cache_clear()
    yield
    library.cache_clear()


def sort_long_lists() -> None:
    """Four times, as the order of a list is that in which the threads ran: one may be sorted as it is."""
    given = in_one_cell(DeformConv2d(1, 4, 8, 16, 4))
    for _ in range(4):
        emulator.launched(metal.deform_conv2d_backward_data, *given)


SAMPLES = 9 * 8 * 16
BUDGET = int(25 * SAMPLES * math.log2(SAMPLES))


@pytest.mark.usefixtures("emulated")
def test_the_list_of_a_cell_is_sorted_in_n_log_n_steps() -> None:
    with emulator.step_budget(BUDGET), emulator.launches() as launched:
        sort_long_lists()
    assert max(launch.worst_steps for launch in launched if launch.kernel == "deform_conv2d_sort") > SAMPLES


@pytest.mark.usefixtures("emulated")
def test_a_sort_in_n_squared_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: its results are right."""
    monkeypatch.setattr(metal, "library", lambda *name: _SlowSort(library(*name)))
    sort_long_lists()
    with (
        emulator.step_budget(BUDGET),
        pytest.raises(KernelError, match=f"slow_sort, .* takes more than {BUDGET} steps"),
    ):
        sort_long_lists()
