"""Goals: which time is judged by which."""

import dataclasses

import pytest
import torch

from omniops.benchmarking import timing
from omniops.benchmarking.contenders import BOTH, FORWARD, OURS
from omniops.benchmarking.goals import TimeGoal, verdicts
from omniops.benchmarking.operators import Result
from omniops.cli.cases import carafe as case

CPU = torch.device("cpu")
SHAPE = (1, 256, 100, 152)


def test_goals_are_judged_by_the_ratio_in_the_same_setting():
    def result(contender, direction, median, dtype="float32", shape=SHAPE):
        return Result("carafe", shape, dtype, direction, contender, "call", median)

    results = [
        result(OURS, FORWARD, 4.0),
        result(OURS, BOTH, 31.0),
        result("bilinear", FORWARD, 5.0),
        result("bilinear", BOTH, 10.0),
        result(OURS, FORWARD, 1.0, dtype="float16"),
        result(OURS, FORWARD, 1.0, shape=(1, 1, 1, 1)),
        result("bilinear", FORWARD, 1.0, shape=(1, 1, 1, 1)),
    ]
    found = {(v.goal, v.dtype): (v.measured, v.met) for v in verdicts([case], results, CPU)}
    assert found == {
        ("forward no slower than bilinear", "float32"): (0.8, True),
        ("both ways at most 3x bilinear both ways", "float32"): (3.1, False),
        ("both ways at most 3x bilinear forward", "float32"): (6.2, False),
    }


def test_a_time_of_this_run_comes_before_one_from_elsewhere():
    shape = (2, 256, 100, 152)
    ours = Result("carafe", shape, "float32", BOTH, OURS, "graph", 0.2)
    earlier = Result("carafe", shape, "float32", BOTH, "mmcv, measured earlier", "", 4.19, measured=False)
    current = Result("carafe", shape, "float32", BOTH, "mmcv", "graph", 0.4)
    (only,) = verdicts([case], [ours, earlier], torch.device("cuda"))
    assert (only.against, only.met) == ("mmcv, measured earlier*", True)
    (only,) = verdicts([case], [ours, earlier, current], torch.device("cuda"))
    assert (only.against, only.met) == ("mmcv", False)


def test_a_goal_holds_in_the_mode_that_it_names():
    shape = (2, 256, 100, 152)
    results = [
        Result("carafe", shape, "float32", BOTH, OURS, "graph", 0.3),
        Result("carafe", shape, "float32", BOTH, OURS, "call", 0.4),
        Result("carafe", shape, "float32", BOTH, "mmcv, measured earlier", "", 4.19, measured=False),
    ]
    found = {v.goal: (v.mode, v.met) for v in verdicts([case], results, torch.device("cuda"))}
    assert found == {
        "both ways at least 15x mmcv": ("graph", False),
        "a call both ways at least 10x mmcv": ("call", True),
    }


def test_a_goal_in_microseconds_is_compared_with_nobody(monkeypatch):
    shape = case.host_shape("cuda")
    monkeypatch.setattr(case, "GOALS", (TimeGoal("the host's", "cuda", FORWARD, 30, (shape,), timing.HOST),))
    results = [
        Result("carafe", shape, "float32", FORWARD, contender, mode, 0.0299 if contender == OURS else 1)
        for contender in (OURS, "bilinear")
        for mode in timing.METHOD
    ]
    (only,) = verdicts([case], results, torch.device("cuda"))
    assert (only.mode, only.against, only.at_most, only.met) == (timing.HOST, "", 30, True)
    assert only.measured == pytest.approx(29.9)
    slower = [dataclasses.replace(result, median_ms=0.0301) for result in results]
    (only,) = verdicts([case], slower, torch.device("cuda"))
    assert not only.met
