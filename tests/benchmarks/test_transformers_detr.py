"""benchmarks/transformers_detr.py: what it times, its table and its file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from operator_calls import OperatorCalls

from omniops.cli.errors import CommandError
from omniops.dropin import LIBRARIES

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed, with which the losses match boxes")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "transformers_detr.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("transformers_detr", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "transformers_detr", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK_SIZES", ((64, 80),))
    return module


@pytest.mark.slow
def test_the_table_and_the_file(script, capsys, tmp_path):
    path = tmp_path / "f.json"
    with OperatorCalls() as calls:
        script.main(device="cpu", quick=True, json_file=path)
    # Of two models each, two rounds: inference and training.
    deformable, rt = 1 + 2, 2
    assert calls.counts == {
        "multi_scale_deform_attn": 2 * 2 * (deformable + rt),
        "multi_scale_deform_attn_backward": 2 * (deformable + rt),
    }
    assert not LIBRARIES["transformers"].enabled()
    out = capsys.readouterr().out
    assert "64 x 80" in out
    assert "64 x 96" in out
    report = json.loads(path.read_text())
    assert report["quick"]
    assert {"omniops", "torch", "transformers", "scipy"} <= set(report["versions"])
    rows = report["results"]
    assert [(row["model"], row["size"], row["what"], row["batch"]) for row in rows] == [
        (model, size, what, batch)
        for model, size in (("Deformable DETR", [64, 80]), ("RT-DETR", [64, 96]))
        for what, batch in (("inference", 1), ("training step", 2))
    ]
    for row in rows:
        assert row["difference"] < 1e-4
        assert [len(times) for times in row["seconds"].values()] == [2, 2]
        theirs, ours = (row["times"][way]["median"] for way in script.WAYS)
        assert row["ratio"] == pytest.approx(theirs / ours)
    with pytest.raises(CommandError, match="--overwrite"):
        script.main(device="cpu", quick=True, json_file=path)


def test_the_models_are_of_resnet_50(script):
    for model in script.MODELS:
        with torch.device("meta"):
            network = script.build(model, quick=False)
        assert tuple(network.config.backbone_config.depths) == (3, 4, 6, 3)
        assert network.config.decoder_layers == 6
        assert 38e6 < sum(parameter.numel() for parameter in network.parameters()) < 45e6


def test_sides_that_rt_detr_takes(script):
    assert script.sides("RT-DETR", (800, 1066)) == (800, 1088)
    assert script.sides("RT-DETR", (640, 640)) == (640, 640)
    assert script.sides("Deformable DETR", (800, 1066)) == (800, 1066)


def test_in_half_precision(script, capsys):
    script.main(device="cpu", model="RT-DETR", dtype="bfloat16", quick=True)
    assert "bfloat16" in capsys.readouterr().out


def test_what_it_does_not_know(script, monkeypatch):
    with pytest.raises(CommandError, match="there are Deformable DETR, RT-DETR"):
        script.main(model="DINO")
    with pytest.raises(CommandError, match="there are float32, float16, bfloat16"):
        script.main(dtype="float8")
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="pip install transformers scipy"):
        script.main()
