"""omniops bench: figures, goals and files."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from omniops.cli import bench, bench_plot, timing
from omniops.cli.cases import CASES
from omniops.cli.cases import carafe as case
from omniops.cli.cases._types import BOTH, DIRECTIONS, FLOOR, FORWARD, OURS, Goal, TimeGoal, bare_function
from omniops.device import title

CPU = torch.device("cpu")
SHAPE = (1, 256, 100, 152)
BARE = "bare autograd.Function"
QUICK = ("--quick", "--seconds", "0", "--device", "cpu")


def test_quick_writes_the_figures_and_the_plot(omniops, tmp_path):
    result = omniops(
        "bench", "carafe", *QUICK, "--json", str(tmp_path / "new" / "c.json"), "--plot", str(tmp_path / "c.png")
    )
    assert result.status == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "new" / "c.json").read_text())
    assert {"date", "command", "device", "hardware", "versions", "method", "copy_bytes_per_second", "goals"} < set(
        report
    )
    assert report["device"] == title(CPU)
    assert report["versions"]["torch"] == version("torch")  # torch.__version__ may say more
    rows = report["results"]
    assert {row["contender"] for row in rows if row["mode"] != timing.HOST} == {
        OURS, FLOOR, "reference kernels", "unfold + einsum", "bilinear",
    }  # fmt: skip
    on_host = [row for row in rows if row["mode"] == timing.HOST]
    assert {row["contender"] for row in on_host} == {OURS, "unfold + einsum", "bilinear", BARE}
    assert {(tuple(row["shape"]), row["dtype"]) for row in on_host} == {(case.host_shape("cpu"), "float32")}
    assert set(report["method"]) == {timing.CALL, timing.HOST}
    assert f"carafe {case.host_shape('cpu')}: microseconds of the host" in result.out
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row["direction"] for row in rows} == set(DIRECTIONS)
    for row in rows:
        assert row["measured"] == (row["contender"] != FLOOR)
        if row["measured"] and not row["error"]:
            assert 0 < row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"]
            assert row["samples"] >= 3
        assert row["contender"] in result.out


EASY_AND_HARD = tuple(
    Goal(text, "cpu", FORWARD, "bilinear", FORWARD, at_most, ((1, 16, 12, 16),))
    for text, at_most in (("in a year", 1e12), ("in no time", 0))
)


@pytest.mark.parametrize(("finished", "kept"), [(0, False), (2, True)])
def test_an_interrupt_keeps_what_was_measured(omniops, monkeypatch, tmp_path, finished, kept):
    measure = bench._measure

    def interrupted(*arguments):
        for number, results in enumerate(measure(*arguments)):
            if number == finished:
                raise KeyboardInterrupt
            yield results

    monkeypatch.setattr(bench, "_measure", interrupted)
    path = tmp_path / "c.json"
    result = omniops("bench", "carafe", *QUICK, "--json", str(path))
    assert result.status == 130
    assert path.exists() == kept
    if kept:
        assert result.err == "omniops: error: interrupted: what was measured until then was kept\n"
        report = json.loads(path.read_text())
        assert report["interrupted"]
        assert len({(each["dtype"], each["direction"]) for each in report["results"]}) == finished
    else:
        assert result.err == "omniops: error: interrupted\n"


def test_goals_are_judged_only_where_they_are_asked_for(omniops, monkeypatch, tmp_path):
    monkeypatch.setattr(case, "GOALS", EASY_AND_HARD)
    path = tmp_path / "c.json"
    usual = omniops("bench", "carafe", *QUICK, "--json", str(path))
    assert usual.status == 0
    assert not re.search(r"\b(goal|met|missed|in no time)\b", usual.out)
    assert json.loads(path.read_text())["goals"] == []
    asked = omniops("bench", "carafe", *QUICK, "--json", str(path), "--overwrite", "--goals")
    assert len(re.findall(r"in a year .* met\b", asked.out)) == 3
    assert len(re.findall(r"in no time .* missed\b", asked.out)) == 3
    assert len(json.loads(path.read_text())["goals"]) == 6
    assert "--goals" not in omniops("bench", "--help").out


def test_nothing_in_the_plot_lies_over_another(omniops, monkeypatch, tmp_path):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or save(self, path))
    results = [
        bench.Result("carafe", SHAPE, dtype, direction, contender, "call", median, 0.9 * median, 1.2 * median, 5)
        for direction in DIRECTIONS
        for dtype in ("float32", "float16", "bfloat16")
        for contender, median in ((OURS, 0.1), (FLOOR, 0.01), ("bilinear", 9.0))
    ]
    results.append(bench.Result("carafe", SHAPE, "float32", FORWARD, "mmcv, elsewhere", "", 0.5, measured=False))
    results += [
        bench.Result("carafe", case.host_shape("cpu"), "float32", direction, contender, "host", 0.03, 0.02, 0.04, 5)
        for direction in DIRECTIONS
        for contender in (OURS, "bilinear", BARE)
    ]
    bench_plot.draw(results, "a subtitle " * 8, "from elsewhere " * 8, tmp_path / "plot.png")
    (figure,) = figures
    titles = [figure._suptitle, figure._supxlabel]
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    panels = [axis for axis in figure.axes if axis.axison]
    figure.canvas.draw()
    assert [panel.get_xlabel() for panel in panels] == ["ms", "ms", "microseconds", "microseconds"]
    assert "30.0" in [text.get_text() for text in panels[2].texts]
    assert {"10", "100"} <= {label.get_text() for label in panels[2].get_xticklabels()}
    assert len(legends) == 1
    assert [text.get_text() for text in legends[0].get_texts()] == [FLOOR, "float32", "float16", "bfloat16"]
    assert [panel.get_title(loc="left").endswith("the host") for panel in panels] == [False, False, True, True]
    boxes = [artist.get_window_extent() for artist in (*titles, *legends)]
    boxes += [panel.get_tightbbox() for panel in panels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    for panel in panels:
        bottom, top = panel.get_ylim()
        assert all(top < line.get_ydata()[0] < bottom for line in panel.lines if line.get_marker() == "o")
        assert panel.get_xscale() == "log"
        assert not panel.patches  # no bars


def test_the_script_is_the_command_with_mmcvs_times(monkeypatch, capsys):
    monkeypatch.setattr(case, "GOALS", EASY_AND_HARD)
    script = Path(__file__).parents[2] / "benchmarks" / "carafe.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "unfold + einsum" in out
    assert "in no time" in out
    earlier, origin = bench._read(script.with_name("mmcv_h200.json"), "NVIDIA H200")
    assert "not measured in this run" in origin
    assert len(earlier) == 12
    assert {row.contender for row in earlier} == {"mmcv, measured earlier on an H200"}
    assert not any(row.measured for row in earlier)


def test_another_runs_times_stand_beside_marked(omniops, tmp_path):
    other = {"operator": "carafe", "shape": [1, 16, 12, 16], "dtype": "float32", "direction": FORWARD, "mode": "call"}
    rows = [
        {**other, "contender": "mmcv", "median_ms": 123.25},
        {**other, "contender": "x", "shape": [7, 7, 7, 7], "median_ms": 1},
        {**other, "contender": "y", "shape": case.host_shape("cpu"), "mode": "host", "median_ms": 0.123},
    ]
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"device": title(CPU), "origin": "from elsewhere", "results": rows}))
    result = omniops("bench", "carafe", *QUICK, "--beside", str(path), "--json", str(tmp_path / "c.json"))
    assert result.status == 0
    assert "mmcv*" in result.out
    assert re.search(r"y\* +123 ", result.out)
    assert "* from elsewhere" in result.out
    report = json.loads((tmp_path / "c.json").read_text())
    (row,) = [row for row in report["results"] if row["contender"] == "mmcv"]
    assert not row["measured"]
    path.write_text(json.dumps({"device": "another", "results": rows}))
    assert "mmcv*" not in omniops("bench", "carafe", *QUICK, "--beside", str(path)).out


def test_wrong_use(fails, tmp_path):
    names = ", ".join(each.NAME for each in CASES)
    assert fails("bench", "fly", status=2).endswith(f"unknown operator 'fly': there are {names}")
    assert "cannot read" in fails("bench", *QUICK, "--beside", str(tmp_path / "none.json"), status=2)
    (tmp_path / "odd.json").write_text("[1]")
    assert "not a file that omniops bench" in fails("bench", *QUICK, "--beside", str(tmp_path / "odd.json"), status=2)


def test_goals_are_judged_by_the_ratio_in_the_same_setting():
    def result(contender, direction, median, dtype="float32", shape=SHAPE):
        return bench.Result("carafe", shape, dtype, direction, contender, "call", median)

    results = [
        result(OURS, FORWARD, 4.0),
        result(OURS, BOTH, 31.0),
        result("bilinear", FORWARD, 5.0),
        result("bilinear", BOTH, 10.0),
        result(OURS, FORWARD, 1.0, dtype="float16"),
        result(OURS, FORWARD, 1.0, shape=(1, 1, 1, 1)),
        result("bilinear", FORWARD, 1.0, shape=(1, 1, 1, 1)),
    ]
    verdicts = {(v.goal, v.dtype): (v.measured, v.met) for v in bench._verdicts([case], results, CPU)}
    assert verdicts == {
        ("forward no slower than bilinear", "float32"): (0.8, True),
        ("both ways at most 3x bilinear both ways", "float32"): (3.1, False),
        ("both ways at most 3x bilinear forward", "float32"): (6.2, False),
    }


def test_a_time_of_this_run_comes_before_one_from_elsewhere():
    shape = (2, 256, 100, 152)
    ours = bench.Result("carafe", shape, "float32", BOTH, OURS, "graph", 0.2)
    earlier = bench.Result("carafe", shape, "float32", BOTH, "mmcv, measured earlier", "", 4.19, measured=False)
    here = bench.Result("carafe", shape, "float32", BOTH, "mmcv", "graph", 0.4)
    (only,) = bench._verdicts([case], [ours, earlier], torch.device("cuda"))
    assert (only.against, only.met) == ("mmcv, measured earlier*", True)
    (only,) = bench._verdicts([case], [ours, earlier, here], torch.device("cuda"))
    assert (only.against, only.met) == ("mmcv", False)


def test_a_goal_holds_in_the_mode_that_it_names():
    shape = (2, 256, 100, 152)
    results = [
        bench.Result("carafe", shape, "float32", BOTH, OURS, "graph", 0.3),
        bench.Result("carafe", shape, "float32", BOTH, OURS, "call", 0.4),
        bench.Result("carafe", shape, "float32", BOTH, "mmcv, measured earlier", "", 4.19, measured=False),
    ]
    verdicts = {v.goal: (v.mode, v.met) for v in bench._verdicts([case], results, torch.device("cuda"))}
    assert verdicts == {
        "both ways at least 15x mmcv": ("graph", False),
        "a call both ways at least 10x mmcv": ("call", True),
    }


def test_a_goal_in_microseconds_is_compared_with_nobody(monkeypatch):
    shape = case.host_shape("cuda")
    monkeypatch.setattr(case, "GOALS", (TimeGoal("the host's", "cuda", FORWARD, 30, (shape,), timing.HOST),))
    results = [
        bench.Result("carafe", shape, "float32", FORWARD, contender, mode, 0.0299 if contender == OURS else 1)
        for contender in (OURS, "bilinear")
        for mode in timing.METHOD
    ]
    (only,) = bench._verdicts([case], results, torch.device("cuda"))
    assert (only.mode, only.against, only.at_most, only.met) == (timing.HOST, "", 30, True)
    assert only.measured == pytest.approx(29.9)
    slower = [dataclasses.replace(each, median_ms=0.0301) for each in results]
    (only,) = bench._verdicts([case], slower, torch.device("cuda"))
    assert not only.met


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


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.NAME)
def test_the_host_is_timed_without_the_reference_kernels(each):
    shape = each.host_shape("cpu")
    made = list(each.contenders(shape, bench.timed_dtypes(each, bench.serving(each.NAME, "cpu"))[0], CPU))
    assert [contender.name for contender in made if not contender.on_host] == ["reference kernels"]
    assert shape not in each.shapes("cpu", quick=True) + each.shapes("cpu", quick=False)


def test_a_forward_that_is_timed_records_no_gradient():
    for contender in (*case.contenders((1, 4, 6, 5), torch.float32, CPU), bare_function(CPU)):
        if contender.on_host:
            assert not contender.forward().requires_grad
            assert all(gradient is not None for gradient in contender.both())


def test_a_contender_that_cannot_run_is_reported(omniops, monkeypatch):
    def refuse(features, masks):
        raise NotImplementedError("not for this dtype\nat all")

    monkeypatch.setattr(case, "_unfold_einsum", refuse)
    result = omniops("bench", *QUICK)
    assert result.status == 0
    assert "cannot run" in result.out


def test_the_byte_floor_counts_each_element_once():
    n, c, h, w = 2, 256, 100, 152
    traffic = case.traffic((n, c, h, w))
    assert traffic[FORWARD] * 4 / 4.25e12 * 1e3 == pytest.approx(0.040, rel=0.02)
    assert traffic[BOTH] > 2 * traffic[FORWARD]


def test_every_contender_computes_the_same():
    torch.manual_seed(0)
    made = {each.name: each for each in case.contenders((1, 16, 12, 16), torch.float64, CPU)}
    exact = made["reference kernels"].forward()
    for name in (OURS, "unfold + einsum"):
        torch.testing.assert_close(made[name].forward(), exact)
        assert [tuple(gradient.shape) for gradient in made[name].both()] == [(1, 16, 12, 16), (1, 25, 24, 32)]


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
