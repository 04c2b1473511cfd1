"""omniops bench: figures, goals and files."""

from __future__ import annotations

import json
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from omniops.benchmarking import timing
from omniops.benchmarking.contenders import DIRECTIONS, FLOOR, FORWARD, OURS
from omniops.benchmarking.goals import Goal
from omniops.benchmarking.operators import read_report
from omniops.cli.bench import command as bench
from omniops.cli.cases import CASES
from omniops.cli.cases import carafe as case
from omniops.device import title

CPU = torch.device("cpu")
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
    measure = bench.measure

    def interrupted(*arguments, **options):
        for number, results in enumerate(measure(*arguments, **options)):
            if number == finished:
                raise KeyboardInterrupt
            yield results

    monkeypatch.setattr(bench, "measure", interrupted)
    path = tmp_path / "c.json"
    result = omniops("bench", "carafe", *QUICK, "--json", str(path))
    assert result.status == 130
    assert path.exists() == kept
    if kept:
        assert result.err == "omniops: error: interrupted: what was measured until then was kept\n"
        report = json.loads(path.read_text())
        assert report["interrupted"]
        assert len({(result["dtype"], result["direction"]) for result in report["results"]}) == finished
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


def test_the_script_is_the_command_with_mmcvs_times(monkeypatch, capsys):
    monkeypatch.setattr(case, "GOALS", EASY_AND_HARD)
    script = Path(__file__).parents[3] / "benchmarks" / "carafe.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "unfold + einsum" in out
    assert "in no time" in out
    earlier, device, origin = read_report(script.with_name("mmcv_h200.json"))
    assert device == "NVIDIA H200"
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
    names = ", ".join(case.NAME for case in CASES)
    assert fails("bench", "fly", status=2).endswith(f"unknown operator 'fly': there are {names}")
    assert "cannot read" in fails("bench", *QUICK, "--beside", str(tmp_path / "none.json"), status=2)
    (tmp_path / "odd.json").write_text("[1]")
    assert "not a file that omniops bench" in fails("bench", *QUICK, "--beside", str(tmp_path / "odd.json"), status=2)


def test_a_contender_that_cannot_run_is_reported(omniops, monkeypatch):
    def refuse(features, masks):
        raise NotImplementedError("not for this dtype\nat all")

    monkeypatch.setattr(case, "_unfold_einsum", refuse)
    result = omniops("bench", *QUICK)
    assert result.status == 0
    assert "cannot run" in result.out
