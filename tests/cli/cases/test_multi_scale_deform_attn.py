"""What the commands do with multi_scale_deform_attn: levels and methods in selftest; peers and goals in bench."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from omniops.benchmarking.contenders import BOTH, FORWARD, OURS
from omniops.cli.cases import multi_scale_deform_attn as case
from omniops.cli.selftest.operators import relative_errors

CPU = torch.device("cpu")
QUICK = ("--quick", "--seconds", "0", "--device", "cpu")
INPUTS = ("value", "sampling_locations", "attention_weights")
TINY = (2, 6, 5, 6)


def test_selftest_checks_the_result_and_each_gradient():
    checks = list(case.checks())
    assert {tuple(check.inputs) for check in checks} == {INPUTS}
    assert any("discrete" in check.label for check in checks)
    for check in checks:
        found = relative_errors(check, torch.float32, CPU)
        assert list(found) == ["result", *(f"gradient of {name}" for name in INPUTS)]
        assert max(found.values()) < 1e-5


def test_no_sample_is_where_the_last_digit_decides():
    """At an integer position, or half between two, in the dtypes that locations are rounded to."""
    for check in case.checks():
        sizes = [tuple(map(int, word.split("x"))) for word in check.label.split() if word[0].isdigit() and "x" in word]
        locations = check.inputs["sampling_locations"]
        if locations.dim() == 5:
            continue
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            for level, (height, width) in enumerate(sizes):
                positions = locations[:, :, :, level].to(dtype).double() * torch.tensor([width, height]) * 2
                assert (positions - positions.round()).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("wrong", "found_in"),
    [
        (lambda value, x, w: (value, x.flip(-1), w), "result"),  # y then x
        (lambda value, x, w: (value, x.detach() + 0 * x, w), "gradient of sampling_locations"),
        (lambda value, x, w: (value, x, w.flip(3)), "result"),  # of another level
    ],
    ids=["y then x", "no gradient of locations", "weights of another level"],
)
def test_selftest_finds_what_is_wrong(wrong, found_in):
    check = next(case.checks())
    planted = dataclasses.replace(check, operator=lambda *inputs: check.operator(*wrong(*inputs)))
    assert relative_errors(planted, torch.float32, CPU)[found_in] > 0.1


def test_bench(omniops, tmp_path):
    path, picture = tmp_path / "m.json", tmp_path / "m.png"
    result = omniops("bench", case.NAME, *QUICK, "--json", str(path), "--plot", str(picture))
    assert result.status == 0
    rows = json.loads(path.read_text())["results"]
    assert {OURS, "reference kernels", "grid_sample", "byte floor"} <= {row["contender"] for row in rows}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row["direction"] for row in rows} == {FORWARD, BOTH}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_script_is_the_command(monkeypatch, capsys):
    script = Path(__file__).parents[3] / "benchmarks" / "multi_scale_deform_attn.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "grid_sample" in capsys.readouterr().out


def test_every_contender_computes_the_same(monkeypatch):
    def msda(value, shapes, starts, locations, weights):
        assert starts.tolist() == [0, 30, 39, 43]
        return case.grid_sample_composition(value, [tuple(size) for size in shapes.tolist()], locations, weights)

    monkeypatch.setattr(case, "import_module", lambda name: {"deformops.registry": SimpleNamespace(msda=msda)}[name])
    cuda = SimpleNamespace(type="cuda")
    inputs = case._inputs(TINY, torch.float64, CPU)
    monkeypatch.setattr(case, "_inputs", lambda *_: inputs)
    monkeypatch.setattr(case.torch, "tensor", lambda values, device: torch.as_tensor(values))
    made = {contender.name: contender for contender in case.contenders(TINY, torch.float64, cuda)}
    assert list(made) == [OURS, "reference kernels", "deformops", "grid_sample"]
    result, *gradients = made[OURS].forward(), *made[OURS].forward_backward()
    assert [tuple(tensor.shape) for tensor in (result, *gradients)] == [(2, 6, 256), *(tuple(x.shape) for x in inputs)]
    for name in list(made)[1:]:
        torch.testing.assert_close(made[name].forward(), result)


def test_points_of_an_encoder_lie_around_the_pixel_of_their_query():
    torch.manual_seed(0)
    shape = (1, 40 * 30 + 20 * 15 + 10 * 8 + 5 * 4, 40, 30, 2)
    locations = case._inputs(shape, torch.float64, CPU).sampling_locations
    centres = case._centres(case._levels(shape), CPU)
    assert centres[0].tolist() == pytest.approx([0.5 / 30, 0.5 / 40])
    assert centres[31].tolist() == pytest.approx([1.5 / 30, 1.5 / 40])
    moves = (locations[0, :, :, 0] - centres[:, None, None]) * torch.tensor([30, 40])
    assert moves.mean().abs() < 0.1
    assert moves.std() == pytest.approx(2, rel=0.1)
    anywhere = case._inputs(shape[:4], torch.float64, CPU).sampling_locations
    assert 0 <= anywhere.min() < 0.01 < 0.99 < anywhere.max() <= 1
