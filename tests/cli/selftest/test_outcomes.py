"""What selftest makes of what goes wrong beside the kernels: the CPU's own run, the file, an end of the process."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import subprocess
import sys

import pytest
import torch

from omniops.cli.cases import carafe as case
from omniops.cli.selftest import models as selftest_models
from omniops.cli.selftest import run
from omniops.cli.selftest.models import models
from omniops.cli.selftest.outcomes import check_model
from omniops.cli.selftest.stages import STAGE_TOLERANCES

CPU = torch.device("cpu")


def _refuse(*_):
    raise NotImplementedError("no kernel here\nwith details")


@pytest.fixture
def no_reference(monkeypatch):
    monkeypatch.setattr(selftest_models.FPNCARAFE, "reference", _refuse)


def test_what_the_cpus_own_run_of_a_model_raises_is_not_the_devices(no_reference):
    outcome = check_model(models(64)[0], CPU, torch.float32)
    assert (outcome.is_right, outcome.is_wrong, outcome.sentence, outcome.exception) == (False, False, "", "")
    expected = "the CPU's own run, which it is compared with, raised NotImplementedError: no kernel here"
    assert outcome.not_checked == outcome.as_json()["not_checked"] == expected
    assert "Traceback" in outcome.traceback
    assert outcome.operators.stages


def test_a_stage_is_wrong_also_where_the_cpus_own_run_raises(no_reference, monkeypatch):
    monkeypatch.setitem(STAGE_TOLERANCES, torch.float32, 0.0)
    outcome = check_model(models(64)[0], CPU, torch.float32)
    assert outcome.is_wrong
    assert outcome.not_checked
    assert "the first stage that differs is " in outcome.sentence


def test_a_model_that_is_compared_with_nothing_counts_as_not_checked(omniops, no_reference, monkeypatch):
    check = next(case.checks())
    monkeypatch.setattr(case, "checks", lambda: iter([check]))
    alone = omniops("selftest", "--device", "cpu", "--only", "carafe").out
    result = omniops("selftest", "--device", "cpu", "--only", "carafe", "--only", "fpn-carafe")
    assert result.status == 0
    (count,) = (line.split()[1] for line in alone.splitlines() if line.startswith("All "))
    assert int(count) > 0
    assert f"All {count} results are right" in result.out
    assert "each stage" in result.out
    assert "WRONG" not in result.out
    said = [line for line in result.out.splitlines() if line.startswith("Not checked: ")]
    assert "Not checked: FPNCarafe on cpu, float32: the CPU's own run, which it is compared with, raised" in said[0]
    assert len(said) == len(models(64)[0].dtypes(CPU))


def test_results_that_the_cpu_does_not_have_are_wrong(monkeypatch):
    run = selftest_models.FPNCARAFE.run
    calls = []

    def with_another(self, model, dtype):
        calls.append(model)
        return run(self, model, dtype) | ({"level 9": torch.ones(2)} if len(calls) == 2 else {})

    monkeypatch.setattr(selftest_models.FPNCARAFE, "run", with_another)
    outcome = check_model(models(64)[0], CPU, torch.float32)
    assert (outcome.is_wrong, outcome.worst_result, outcome.exception) == (True, "level 9", "")


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result):
        return result.clone()

    @staticmethod
    def backward(ctx, grad):
        _refuse()


@pytest.mark.parametrize(
    "wrong", [lambda oracle: _refuse, lambda oracle: lambda *inputs: _NoBackward.apply(oracle(*inputs))]
)
def test_what_the_oracle_of_an_operator_raises_is_not_the_devices(omniops, monkeypatch, wrong):
    checks = [*case.checks()][:2]
    first = dataclasses.replace(checks[0], oracle=wrong(checks[0].oracle))
    monkeypatch.setattr(case, "checks", lambda: iter([first, checks[1]]))
    result = omniops("selftest", "--device", "cpu", "--only", "carafe")
    assert result.status == 0
    assert "results are right" in result.out
    assert f"Not checked: carafe on cpu, float32, {first.label}: the CPU's own run, which it is compared with, " in (
        result.out
    )


def test_what_runs_is_written_before_each_setting_of_an_operator(omniops, monkeypatch, tmp_path):
    path = tmp_path / "selftest.json"
    reports = []

    def relative_errors(check, dtype, device):
        written = json.loads(path.read_text())
        assert written["running"] == f"carafe on {device}, {dtype}".replace("torch.", "")
        reports.append((written["running"], written["total"]))
        return {"result": 0.0}

    monkeypatch.setattr(run, "relative_errors", relative_errors)
    assert omniops("selftest", "--device", "cpu", "--only", "carafe", "--json", str(path)).status == 0
    settings = list(dict.fromkeys(reports))
    assert [total for _, total in settings] == list(range(len(settings)))
    assert len({running for running, _ in settings}) == len(settings) > 1


def test_before_anything_runs_the_file_names_nothing_that_will_not(omniops, monkeypatch, tmp_path):
    path = tmp_path / "selftest.json"
    reports = []
    monkeypatch.setattr(
        selftest_models.FPNCARAFE, "missing", lambda _: reports.append(json.loads(path.read_text())) or ""
    )
    monkeypatch.setattr(selftest_models.FPNCARAFE, "build", _refuse)
    assert omniops("selftest", "--device", "cpu", "--only", "fpn-carafe", "--json", str(path)).status == 1
    assert [report["running"] for report in reports] == ["preparations"]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_file_that_can_no_longer_be_written_costs_nothing_else(omniops, monkeypatch, tmp_path, is_wrong):
    path = tmp_path / "selftest.json"

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    checks = [*case.checks()][:1]
    wrong = [dataclasses.replace(checks[0], operator=_refuse)] if is_wrong else checks
    monkeypatch.setattr(case, "checks", lambda: iter(wrong))
    result = omniops("selftest", "--device", "cpu", "--only", "carafe", "--json", str(path))
    assert result.status == 1
    assert ("WRONG" if is_wrong else "ok") in result.out
    (line,) = (line for line in result.err.splitlines() if "error" in line)
    assert line.endswith(f"cannot write {path}: No space left on device")
    assert ("results are wrong; " in line) == is_wrong


def test_a_file_that_can_be_written_again_is_complete(omniops, monkeypatch, tmp_path):
    path = tmp_path / "selftest.json"
    synchronise, times = os.fsync, []

    def full_once(file):
        if not times:
            times.append(file)
            raise OSError(28, "No space left on device")
        synchronise(file)

    monkeypatch.setattr(os, "fsync", full_once)
    check = next(case.checks())
    monkeypatch.setattr(case, "checks", lambda: iter([check]))
    assert omniops("selftest", "--device", "cpu", "--only", "carafe", "--json", str(path)).status == 0
    assert times
    assert json.loads(path.read_text())["running"] == ""


def test_a_torchvision_made_for_another_torch_is_not_checked_and_said_so(omniops, monkeypatch, tmp_path):
    pytest.importorskip("torchvision", reason="else it is missing")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [*sys.modules]:
        if name.partition(".")[0] == "torchvision" or name.startswith("omniops.detection"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    result = omniops("selftest", "--device", "cpu", "--only", "faster-rcnn", "--only", "fpn-carafe")
    assert result.status == 0
    (said,) = (line for line in result.out.splitlines() if line.startswith("Not checked: "))
    assert said.startswith("Not checked: faster-rcnn: omniops.detection needs a torchvision made for this torch ")
    assert "operator torchvision::nms does not exist" in said


@pytest.mark.slow
def test_where_the_process_dies_pythons_stack_and_the_file_say_where(tmp_path):
    path = tmp_path / "selftest.json"
    program = (
        "import os; from omniops.cli import main; from omniops.cli.selftest import run; "
        "run.check_model = lambda *_: os.abort(); "
        f"main(['selftest', '--device', 'cpu', '--only', 'fpn-carafe', '--json', {str(path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in done.stderr
    assert os.path.join("selftest", "run.py") in done.stderr
    assert json.loads(path.read_text())["running"] == "fpn-carafe on cpu, float32"


def test_who_has_asked_for_stacks_already_keeps_them_where_they_are(omniops, monkeypatch):
    enabled = []
    monkeypatch.setattr(case, "checks", lambda: iter([]))
    monkeypatch.setattr(faulthandler, "enable", enabled.append)
    for is_enabled in (True, False):
        monkeypatch.setattr(faulthandler, "is_enabled", lambda is_enabled=is_enabled: is_enabled)
        omniops("selftest", "--device", "cpu", "--only", "carafe")
        assert enabled == ([] if is_enabled else [sys.__stderr__])


@pytest.fixture
def tf32_flags():
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in flags]
    yield flags
    for backend, value in zip(flags, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("device", "inside"), [("cuda", False), ("cpu", None)])
def test_float32_is_exact_on_cuda_while_a_model_runs(monkeypatch, tf32_flags, before, device, inside):
    for backend in tf32_flags:
        backend.allow_tf32 = before
    allowed = []
    model = models(64)[0]
    monkeypatch.setattr(model, "build", lambda *_: allowed.append([backend.allow_tf32 for backend in tf32_flags]))
    assert check_model(model, torch.device(device), torch.float32).exception  # there is no network
    assert allowed == [[before if inside is None else inside] * 2]
    assert [backend.allow_tf32 for backend in tf32_flags] == [before] * 2


def test_a_run_that_checked_nothing_is_no_success(omniops, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = omniops("selftest", "--device", "cpu", "--only", "faster-rcnn")
    assert result.status == 1
    assert result.err.strip().endswith("nothing was checked")
    assert "Not checked: faster-rcnn" in result.out
