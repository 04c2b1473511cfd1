"""What the commands do with deform_conv2d: groups and masks in selftest; TF32, peers and goals in bench."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from omniops.benchmarking import operators, plot, timing
from omniops.benchmarking.contenders import BOTH, FORWARD, OURS, Contender
from omniops.benchmarking.goals import verdicts
from omniops.cli.cases import deform_conv2d as case
from omniops.cli.selftest.operators import relative_errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = ("--quick", "--seconds", "0", "--device", "cpu")
INPUTS = ("input", "offset", "weight", "bias", "mask")


def test_selftest_checks_every_result_with_and_without_mask_and_bias():
    checks = list(case.checks())
    assert {tuple(check.inputs) for check in checks} == {INPUTS, INPUTS[:4], (*INPUTS[:3], "mask")}
    for check in checks[:4]:
        found = relative_errors(check, torch.float32, CPU)
        assert list(found) == ["result", *(f"gradient of {name}" for name in check.inputs)]
        assert max(found.values()) < 1e-5


def test_selftest_reaches_all_forwards_of_cuda():
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda._deform_forward import is_fused, is_narrow, is_split
    from omniops.backends.cuda._deform_launches import Problem

    def found(serves, dtype):
        problems = [
            Problem(*(check.inputs[name].to(dtype) for name in INPUTS[:3]), None, (1, 1), (1, 1), (1, 1))
            for check in case.checks()
        ]
        return [{(p.groups, p.offset_groups) for p in problems if serves(p, True) == is_so} for is_so in (True, False)]

    fused, others = found(is_fused, torch.float16)
    assert fused >= {(2, 2), (2, 3)}
    assert others
    for serves in (is_narrow, is_split):
        assert all(found(serves, torch.float32))


def test_offsets_are_the_same_in_every_dtype_and_never_whole():
    for check in case.checks():
        offset = check.inputs["offset"]
        assert (offset != offset.round()).all()
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(offset.to(dtype).double(), offset)


def test_selftest_finds_an_ignored_mask():
    check = next(check for check in case.checks() if "mask" in check.inputs)
    wrong = dataclasses.replace(
        check, operator=lambda *inputs: check.operator(*inputs[:4], torch.ones_like(inputs[4]) + 0 * inputs[4])
    )
    found = relative_errors(wrong, torch.float32, CPU)
    assert found["result"] > 0.1
    assert found["gradient of bias"] < 1e-5


def test_bench(omniops, tmp_path):
    path, picture = tmp_path / "d.json", tmp_path / "d.png"
    result = omniops("bench", case.NAME, *QUICK, "--json", str(path), "--plot", str(picture))
    assert result.status == 0
    rows = json.loads(path.read_text())["results"]
    assert {OURS, "reference kernels", "conv2d", "byte floor"} <= {row["contender"] for row in rows}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row["direction"] for row in rows} == {FORWARD, BOTH}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_script_is_the_command(monkeypatch, capsys):
    script = Path(__file__).parents[3] / "benchmarks" / "deform_conv2d.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "conv2d" in capsys.readouterr().out


def test_every_contender_computes_the_same(monkeypatch):
    peer = SimpleNamespace(deform_conv2d=case.deform_conv2d)
    monkeypatch.setattr(case, "import_module", lambda name: {"torchvision.ops": peer}[name])
    made = {contender.name: contender for contender in case.contenders((1, 8, 6, 5, 2), torch.float64, CPU)}
    assert list(made) == [OURS, "reference kernels", "torchvision", "conv2d"]
    assert [contender.name for contender in made.values() if not contender.capturable] == ["torchvision"]
    results = made[OURS].forward(), *made[OURS].forward_backward()
    shapes = [tuple(tensor.shape) for tensor in case._inputs((1, 8, 6, 5, 2), torch.float64, CPU)]
    assert [tuple(tensor.shape) for tensor in results] == [(1, 8, 6, 5), *shapes]
    torch.testing.assert_close(made["reference kernels"].forward(), results[0])
    torch.testing.assert_close(made["torchvision"].forward(), results[0])
    assert made["conv2d"].forward().shape == results[0].shape


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_torchvision_that_cannot_be_imported_is_left_out(monkeypatch, error):
    def fails(name):
        raise error(name)

    monkeypatch.setattr(case, "import_module", fails)
    assert [contender.name for contender in case.contenders((1, 4, 4, 4), torch.float32, CPU)] == [
        OURS, "reference kernels", "conv2d",
    ]  # fmt: skip


def test_tf32_is_a_dtype_of_its_own_on_cuda():
    before = torch.backends.cuda.matmul.allow_tf32
    flags = []
    for setting in operators.settings([case], CUDA, quick=True):
        flags.append((setting.dtype_label, setting.dtype, torch.backends.cuda.matmul.allow_tf32))
        assert setting.case is case
    assert [entry for entry in flags if entry[1] == torch.float32] == [
        ("float32", torch.float32, before),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, before),  # the host's
    ]
    assert torch.backends.cuda.matmul.allow_tf32 == before
    of_calls = [setting for setting in operators.settings([case], CPU, quick=True) if not setting.on_host]
    assert [setting.dtype_label for setting in of_calls] == ["float32", "float16", "bfloat16"]


def test_convolution_without_tf32_runs_so(monkeypatch):
    allowed = []
    call = lambda: allowed.append(torch.backends.cudnn.allow_tf32)  # noqa: E731
    without = case._without_tf32(Contender("conv2d", call, call))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for run in (call, without.forward, without.forward_backward, call):
        run()
    assert allowed == [True, False, False, True]


def test_what_a_graph_would_not_hold_is_timed_by_calls_alone(monkeypatch):
    captured = []
    monkeypatch.setattr(timing, "warm_up", lambda call, device, seconds: False)
    monkeypatch.setattr(timing, "captured", lambda call: captured.append(call) or call)
    monkeypatch.setattr(timing, "milliseconds", lambda calls, *_: {key: [1.0, 2.0] for key in calls})
    made = [Contender(OURS, lambda: 1), Contender("torchvision", lambda: 2, capturable=False)]
    monkeypatch.setattr(case, "contenders", lambda shape, dtype, device: made)
    monkeypatch.setattr(operators, "bare_function", lambda device: Contender("bare", lambda: 3))
    rows = [row for rows in operators.measure([case], CUDA, 0.0, quick=True, bytes_per_second=1e9) for row in rows]
    modes = {(row.contender, row.mode) for row in rows if row.measured}
    assert modes == {
        (OURS, "call"), (OURS, "graph"), (OURS, "host"), ("torchvision", "call"), ("torchvision", "host"),
        ("bare", "host"),
    }  # fmt: skip
    assert {row.shape for row in rows if row.mode == "host"} == {(1, 64, 32, 32)}
    assert set(captured) == {made[0].forward}


def test_the_plot_shows_the_calls_of_what_has_no_graph(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(plot, "_draw_panel", lambda axis, panel, _: shown.extend(panel) or axis.plot([1], label="x"))
    rows = [
        operators.Result(case.NAME, case._LARGE, "tf32", FORWARD, contender, mode, median)
        for contender, mode, median in (
            (OURS, "call", 2.0), (OURS, "graph", 1.0), ("torchvision", "call", 3.0), ("conv2d", "call", None),
        )
    ]  # fmt: skip
    plot.draw(rows, "", "", tmp_path / "d.svg")
    assert [(row.contender, row.median_ms) for row in shown] == [(OURS, 1.0), ("torchvision (a call)", 3.0)]


def test_goals_take_the_dtype_that_they_name():
    def row(contender, dtype, median, mode="graph"):
        return operators.Result(case.NAME, case._LARGE, dtype, FORWARD, contender, mode, median)

    rows = [
        row(OURS, "float32", 0.5),
        row(OURS, "tf32", 0.2),
        row("conv2d", "tf32", 0.1),
        row(OURS, "tf32", 0.75, "call"),
        row("torchvision", "tf32", 1.0, "call"),
        row(OURS, "float16", 0.2),
        row(OURS, "bfloat16", 0.3),
    ]
    found = {(v.goal, v.dtype, v.mode): (pytest.approx(v.measured), v.met) for v in verdicts([case], rows, CUDA)}
    assert found == {
        ("forward at most 1.5x conv2d", "tf32", "graph"): (2, False),
        ("a call forward faster than torchvision", "tf32", "call"): (0.75, True),
        ("a call forward at least 2x torchvision", "tf32", "call"): (0.75, False),
        ("forward in bfloat16 as in float16", "bfloat16", "graph"): (1.5, False),
    }
