"""The models of ``omniops selftest`` on the pretended MPS device: right by the rules, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import mps_device as pretended
import pytest
import torch
from mps_device import mps_device

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops.cli.selftest import stages as selftest_stages
from omniops.cli.selftest.models import RESULT_TOLERANCES, models
from omniops.cli.selftest.outcomes import check_model

CPU = torch.device("cpu")
MODELS = {model.name: model for model in models(64)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fpn-carafe", "mask-rcnn"])
def test_results_are_the_cpus(name):
    model, dtype = MODELS[name], torch.float32
    expected = model.run(model.build(CPU, dtype), dtype)
    with mps_device(values=True) as device:
        found = model.run(model.build(device, dtype), dtype)
    assert found.keys() == expected.keys()
    for result, value in found.items():
        assert selftest_stages.relative_error([value], [expected[result]]) < RESULT_TOLERANCES[dtype], result


@pytest.mark.slow
def test_a_picture_without_detections():
    model, dtype = MODELS["mask-rcnn"], torch.float32
    with mps_device(values=True) as device:
        network: Any = model.build(device, dtype)
        network.roi_heads.score_thresh = 2.0
        found = model.run(network, dtype)
    assert found["image 0, boxes"].shape == (0, 4)
    assert found["image 0, masks"].shape == (0, 1, 80, 100)


def test_selftest_names_the_operator_that_is_wrong(monkeypatch):
    run = pretended._Operators._run

    def without_bias(self: Any, func: Any, args: Any, kwargs: Any, on_mps: Any) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].shape[2:] == (1, 1):
            args = (*args[:2], None, *args[3:])
        return run(self, func, args, kwargs, on_mps)

    with mps_device(values=True) as device:
        assert check_model(MODELS["fpn-carafe"], device, torch.float32).is_right
        monkeypatch.setattr(pretended._Operators, "_run", without_bias)
        outcome = check_model(MODELS["fpn-carafe"], device, torch.float32)
    assert not outcome.is_right
    assert "FPNCarafe on mps:0, float32: the first stage that differs is lateral_convs.0" in outcome.sentence
    assert "conv2d" in outcome.sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_copies_run_no_operator_on_the_device(monkeypatch, dtype):
    """To look at a buffer in another shape may change what PyTorch makes of later views of it."""
    memory = torch.arange(60).reshape(5, 12).remainder(7).to(dtype)
    with mps_device(values=True) as device:
        view = memory.to(device)[1:, 1::3].T
        monkeypatch.setattr(pretended._Operators, "_run", lambda *_: pytest.fail("an operator"))
        copy = selftest_stages._CheckingMode(selftest_stages._RunningModules(torch.nn.Identity()))._copy(view)
        monkeypatch.undo()
    assert (copy.device, copy.stride(), copy.storage_offset()) == (CPU, view.stride(), view.storage_offset())
    assert torch.equal(copy, memory[1:, 1::3].T)
    assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
