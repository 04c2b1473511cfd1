"""Times of calls: what is within them, turns, and what is slow."""

import pytest
import torch

from omniops.benchmarking import timing

CPU = torch.device("cpu")


def test_the_host_does_not_wait_for_the_device_within_its_time(monkeypatch):
    now = 0.0
    waiting = 0.0
    calls = []

    def call():
        nonlocal now, waiting
        assert waiting < 300  # what the device's queue takes
        calls.append(now)
        now += 0.001
        waiting += 10

    def synchronize(device):
        nonlocal now, waiting
        now += waiting
        waiting = 0.0

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    monkeypatch.setattr(timing, "synchronize", synchronize)
    times = timing.milliseconds({("x", timing.HOST): call, ("y", timing.HOST): call}, CPU, seconds=0)
    assert times["x", timing.HOST] == pytest.approx([1.0] * 3)
    assert times["y", timing.HOST] == pytest.approx([1.0] * 3)
    assert len(calls) == 6 * timing._CALLS_IN_A_ROW


def test_compiling_at_the_first_call_makes_nothing_slow(monkeypatch):
    now = 0.0
    costs = iter([30.0, *[0.001] * 100])

    def call():
        nonlocal now
        now += next(costs)

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    assert not timing.warm_up(call, CPU, seconds=0)
    # And the time of that call is not taken from the rest's.
    costs = iter([30.0, *[0.001] * 100])
    assert not timing.warm_up(call, CPU, seconds=0.0501)
    assert len(list(costs)) == 100 - 51


def test_contenders_take_turns_and_slow_ones_get_fewer():
    order = []
    clock = {"now": 0.0}

    def call(name, cost):
        def run():
            order.append(name)
            clock["now"] += cost

        return run

    calls = {("fast", timing.CALL): call("fast", 0.001), ("slow", timing.CALL): call("slow", 1.5)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "perf_counter", lambda: clock["now"])
        times = timing.milliseconds(calls, CPU, seconds=0.0201)
        once = timing.milliseconds(calls, CPU, seconds=0.0201, slow={"slow"})
        assert timing.warm_up(calls["slow", timing.CALL], CPU, seconds=0)
        assert not timing.warm_up(calls["fast", timing.CALL], CPU, seconds=0.01)
    fast, slow = times["fast", timing.CALL], times["slow", timing.CALL]
    assert (len(fast), len(slow)) == (21, 3)
    assert len(once["slow", timing.CALL]) == 1
    assert slow == pytest.approx([1500] * 3)
    assert order[:6] == ["fast", "slow"] * 3
