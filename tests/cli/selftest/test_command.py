"""omniops selftest: it passes where the kernels are right, and fails where one is planted that is not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from importlib.metadata import version

import pytest
import torch

from omniops.cli.cases import carafe as case
from omniops.cli.selftest import run
from omniops.cli.selftest.operators import TOLERANCES, relative_errors
from omniops.cli.selftest.outcomes import Outcome
from omniops.cli.selftest.report import WorstError
from omniops.device import title
from omniops.environment import machine

CPU = torch.device("cpu")


@pytest.fixture
def plant(monkeypatch):
    """Replace what the first two checks call, the only ones then."""

    def replace(wrong):
        original = case.checks

        def checks():
            for check in itertools.islice(original(), 2):
                yield dataclasses.replace(check, operator=wrong(check.operator))

        monkeypatch.setattr(case, "checks", checks)

    return replace


@pytest.mark.slow
def test_this_machine_passes(omniops):
    result = omniops("selftest", "--device", "cpu", "--only", "operators")
    assert result.status == 0
    assert all(f"{dtype}".removeprefix("torch.") in result.out for dtype in TOLERANCES)
    assert "gradient of features" in result.out
    assert "WRONG" not in result.out


def _slightly_off(operator):
    return lambda features, masks: operator(features, masks) * (1 + 1e-4)


def _nan_at_a_corner(operator):
    def wrong(features, masks):
        corner = torch.ones_like(operator(features, masks))
        corner[..., -1, -1] = float("nan")
        return operator(features, masks) * corner

    return wrong


def _raises(operator):
    def wrong(features, masks):
        raise RuntimeError("no such kernel\nwith details")

    return wrong


@pytest.mark.parametrize("wrong", [_slightly_off, _nan_at_a_corner, _raises])
def test_a_planted_wrong_kernel_fails(omniops, plant, wrong):
    plant(wrong)
    result = omniops("selftest", "--device", "cpu", "--only", "carafe")
    assert result.status == 1
    assert "WRONG" in result.out
    assert "results are wrong" in result.err
    assert ("RuntimeError: no such kernel" in result.out) == (wrong is _raises)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result):
        return result.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.roll(1, -1)


def test_a_right_result_with_a_wrong_gradient_fails():
    check = next(case.checks())
    operator = check.operator
    wrong = dataclasses.replace(check, operator=lambda *inputs: _WrongGradient.apply(operator(*inputs)))
    found = relative_errors(wrong, torch.float32, CPU)
    assert found["result"] < TOLERANCES[torch.float32]
    assert found["gradient of features"] > 0.1
    assert found["gradient of masks"] > 0.1


def test_a_result_of_another_shape_or_dtype_is_wrong():
    check = next(case.checks())
    operator = check.operator
    wider = dataclasses.replace(check, operator=lambda *inputs: operator(*inputs).double())
    assert relative_errors(wider, torch.float32, CPU)["result"] == float("inf")


def test_the_checks_cover_what_goes_wrong():
    shapes = [check.inputs["features"].shape for check in case.checks()]
    labels = " ".join(check.label for check in case.checks())
    assert any(h % 2 and w % 2 for _, _, h, w in shapes)
    assert all(word in labels for word in ("channels_last", "transposed", "down", "G4", "up 3", "k1 ", "k9"))
    channels_last = [c for c in case.checks() if c.label.endswith("channels_last")]
    assert all(c.inputs["features"].is_contiguous(memory_format=torch.channels_last) for c in channels_last)


def test_each_layout_reaches_the_operator():
    for check in case.checks():
        for dtype in TOLERANCES:
            strides = []

            def spy(features, masks, operator=check.operator, strides=strides):
                strides.extend((features.stride(), masks.stride()))
                return operator(features, masks)

            relative_errors(dataclasses.replace(check, operator=spy), dtype, CPU)
            assert strides == [tensor.stride() for tensor in check.inputs.values()], check.label


def test_it_says_what_was_tested(omniops, monkeypatch):
    monkeypatch.setattr(case, "checks", lambda: iter(()))
    first = omniops("selftest", "--device", "cpu", "--only", "carafe").out.splitlines()[0]
    assert first.startswith(f"omniops {version('omniops')}, torch {version('torch')}; {machine()['machine']}; cpu: ")
    assert first.endswith(title(CPU))


def test_only_what_is_asked_for_is_checked(omniops, monkeypatch):
    check = next(case.checks())
    monkeypatch.setattr(case, "checks", lambda: iter([check]))
    result = omniops("selftest", "--device", "cpu", "--only", "carafe", "--only", "fpn-carafe")
    assert result.status == 0
    names = {line.split()[0] for line in result.out.splitlines() if " cpu " in line and "float" in line}
    assert names == {"carafe", "fpn-carafe"}


def test_an_unknown_name_is_wrong_use(fails):
    line = fails("selftest", "--only", "sam2", status=2)
    assert "--only sam2: there are operators, models, carafe, " in line
    assert line.endswith("sam2-image, sam2-video")


def test_a_size_that_sam2_cannot_have_is_wrong_use(fails):
    assert fails("selftest", "--image-size", "100", status=2).endswith("must be a multiple of 32, got 100")


def test_the_file_that_cannot_be_written_is_named_before_the_work(fails, tmp_path):
    assert fails("selftest", "--json", str(tmp_path), status=2).endswith("it is a folder")


def test_the_file_holds_everything_also_where_something_is_wrong(omniops, plant, tmp_path):
    plant(_raises)
    path = tmp_path / "selftest.json"
    result = omniops("selftest", "--device", "cpu", "--only", "carafe", "--only", "fpn-carafe", "--json", str(path))
    assert result.status == 1
    written = json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON
    assert written["running"] == ""
    assert 0 < written["failed"] < written["total"]
    assert all(sentence in result.out for sentence in written["sentences"])
    assert any("no such kernel" in sentence for sentence in written["sentences"])
    assert {row["operator"] for row in written["operators"]} == {"carafe"}
    assert {row["error"] for row in written["operators"]} == {"inf"}
    assert written["tested"] == {"cpu": title(CPU)}
    assert written["doctor"]["versions"]["torch"] == version("torch")
    assert written["doctor"]["system"]["torch"].startswith("PyTorch built with")
    (model, *_) = written["models"]
    assert (model["model"], model["device"], model["dtype"], model["right"]) == ("fpn-carafe", "cpu", "float32", True)
    assert {stage["operator"] for stage in model["stages"]} >= {"conv2d", "carafe", "softmax"}
    assert all(stage["error"] <= stage["tolerance"] <= 1e-4 for stage in model["stages"])
    assert [row["result"] for row in model["results"]] == [f"level {level}" for level in range(4)]


def test_what_was_found_and_what_runs_is_written_before_each_model_begins(omniops, monkeypatch, tmp_path):
    path = tmp_path / "selftest.json"
    reports = []

    def check_model(model, device, dtype):
        reports.append(json.loads(path.read_text()))
        assert reports[-1]["running"] == f"{model.name} on {device}, {dtype}".replace("torch.", "")
        return Outcome(model.name, model.title, str(device), str(dtype), results={"level 0": 0.0})

    monkeypatch.setattr(run, "check_model", check_model)
    assert omniops("selftest", "--device", "cpu", "--only", "models", "--json", str(path)).status == 0
    assert [len(report["models"]) for report in reports] == list(range(len(reports)))
    last = json.loads(path.read_text())
    assert (last["running"], len(last["models"])) == ("", len(reports))


def test_the_worst_error_stays():
    worst = WorstError()
    for error, label in ((0.0, "none"), (2.0, "large"), (1.0, "small")):
        worst.add(error, label)
    assert worst == WorstError(2.0, "large")
    worst.add(float("nan"), "nan")
    worst.add(3.0, "later")
    assert worst == WorstError(float("inf"), "nan")
