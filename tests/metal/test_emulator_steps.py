"""The steps of a thread: loops that do not end, and lists that take too long."""

import math
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import DeformConv2d, arguments
from test_emulator import compiled

from omniops.backends.mps import deform_conv2d as metal


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


SORT = """
kernel void sort(device int* head, device int* next, uint i [[thread_position_in_grid]]) {
  int sorted = -1;
  for (int item = head[i]; item >= 0;) {
    const int following = next[item];
    int before = -1, after = sorted;
    while (after >= 0 && after < item) {
      before = after;
      after = next[after];
    }
    next[item] = after;
    if (before < 0) sorted = item; else next[before] = item;
    item = following;
  }
  head[i] = sorted;
}
"""


def test_a_sort_in_n_squared_steps() -> None:
    """Planted: its results are right."""

    def launch(n: int) -> None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        head, next = order[:1].clone(), torch.full((n,), -1, dtype=torch.int32)
        next[order[:-1].long()] = order[1:]
        compiled(SORT).sort(head, next)
        assert head.item() == 0
        assert next.tolist() == [*range(1, n), -1]

    with emulator.launches() as launched:
        launch(500)
        launch(1000)
    assert launched[1].worst_steps > 3 * launched[0].worst_steps
    budget = int(20 * 1000 * math.log2(1000))
    message = f"kernel sort, .* takes more than {budget} steps"
    with emulator.step_budget(budget), pytest.raises(KernelError, match=message):
        launch(1000)


def in_one_cell(case: DeformConv2d) -> list[Any]:
    """What deform_conv2d_backward takes, every sample in the middle of the image."""
    args = arguments("deform_conv2d_backward", case, torch.float32)
    offset, taps = args[2], math.prod(case.kernel_size)
    y, x = torch.meshgrid(torch.arange(offset.shape[2]), torch.arange(offset.shape[3]), indexing="ij")
    for tap in range(taps):
        offset[:, 2 * tap] = case.h / 2 + 0.25 - (y + tap // case.kernel_size[1] - case.padding[0])
        offset[:, 2 * tap + 1] = case.w / 2 + 0.25 - (x + tap % case.kernel_size[1] - case.padding[1])
    return args


@pytest.mark.usefixtures("emulated")
def test_where_all_samples_meet_no_thread_of_deform_conv2d_takes_n_squared_steps() -> None:
    for height, width in ((8, 8), (16, 8)):
        samples = 9 * height * width
        with emulator.step_budget(int(25 * samples * math.log2(samples))):
            args = in_one_cell(DeformConv2d(1, 4, height, width, 4))
            for _ in range(4):  # in other orders of the threads
                emulator.launched(metal.deform_conv2d_backward, *args)
