"""What the commands do with an operator of integers: exact results, no gradients, dtypes of its own."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from omniops.backends import cpu
from omniops.benchmarking.contenders import FLOOR, FORWARD, OURS
from omniops.cli import cases
from omniops.cli.cases import connected_components as case
from omniops.cli.selftest import command, run
from omniops.cli.selftest.operators import relative_errors
from omniops.environment import serving
from omniops.ops.connected_components import connected_components

CPU = torch.device("cpu")
QUICK = ("--quick", "--seconds", "0", "--device", "cpu")


def test_doctor_shows_its_own_dtypes(omniops):
    lines = [line for line in omniops("doctor").out.splitlines() if line.split()[:1] == [case.NAME]]
    assert len(lines) == 4
    assert all("bool, uint8, int8, int16, int32, int64, uint16, uint32, uint64" in line for line in lines)
    assert cases.dtypes("carafe", cpu) == cpu.DTYPES
    assert serving(case.NAME, "cpu").TITLE in lines[0]


def test_selftest_wants_exact_results_and_no_gradients():
    check = next(case.checks())
    for dtype in case.DTYPES:
        assert relative_errors(check, dtype, CPU) == {"labels": 0.0, "counts": 0.0}


def test_selftest_leaves_out_and_names_what_pytorch_lacks(omniops, monkeypatch):
    assert not run._is_missing(CPU, torch.uint16)
    # No build of PyTorch serves such a device.
    absent = torch.device("fpga")
    assert run._is_missing(absent, torch.uint16)
    assert not run._is_missing(absent, torch.int64)
    monkeypatch.setattr(command, "CASES", (case,))
    monkeypatch.setattr(run, "_is_missing", lambda device, dtype: dtype == torch.uint32)
    result = omniops("selftest", "--device", "cpu", "--only", case.NAME)
    assert result.status == 0
    assert "Not checked: PyTorch has no uint32 on cpu." in result.out
    assert result.out.count("uint32") == 1
    assert "uint64" in result.out


def _one_label_off(mask):
    labels, counts = connected_components(mask)
    labels = labels.clone()
    labels[..., -1, -1] += 1
    return labels, counts


def _counts_of_another_dtype(mask):
    labels, counts = connected_components(mask)
    return labels, counts.long()


@pytest.mark.parametrize("wrong", [_one_label_off, _counts_of_another_dtype])
def test_selftest_finds_what_is_planted(omniops, monkeypatch, wrong):
    check = dataclasses.replace(next(case.checks()), operator=wrong)
    monkeypatch.setattr(case, "checks", lambda: [check])
    result = omniops("selftest", "--device", "cpu", "--only", case.NAME)
    assert result.status == 1
    assert "exact" in result.out
    assert "WRONG" in result.out


def test_the_spiral_is_one_line():
    mask = case.spiral(129, 129)[None, None]
    labels, counts = connected_components(mask, 4)
    assert labels.unique().tolist() == [0, 1]
    assert counts.max() == mask.sum() > 129**2 * 0.49
    assert (counts == counts.max()).sum() == mask.sum()


def test_bench_times_one_direction_in_one_dtype(omniops, tmp_path):
    path, picture = tmp_path / "c.json", tmp_path / "c.png"
    result = omniops("bench", case.NAME, *QUICK, "--json", str(path), "--plot", str(picture))
    assert result.status == 0
    assert "backward" not in result.out
    rows = json.loads(path.read_text())["results"]
    assert {row["direction"] for row in rows} == {FORWARD}
    assert {row["dtype"] for row in rows} == {"uint8"}
    assert {OURS, "reference kernels", "SciPy", FLOOR} <= {row["contender"] for row in rows}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_script_is_the_command(monkeypatch, capsys):
    script = Path(__file__).parents[3] / "benchmarks" / "connected_components.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "SciPy" in capsys.readouterr().out


def test_every_contender_counts_the_same_components():
    made = {contender.name: contender.forward() for contender in case.contenders((3, 1, 60, 70), torch.uint8, CPU)}
    labels, _ = made[OURS]
    expected = [len(image.unique()) - 1 for image in labels]
    assert [len(image.unique()) - 1 for image in made["reference kernels"][0]] == expected
    assert [count for _, count in made["SciPy"]] == expected
    if "OpenCV" in made:
        assert [count - 1 for count, _ in made["OpenCV"]] == expected
