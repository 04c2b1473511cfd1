"""Checkpoints of the detectors: OpenMMLab's and our own, what does not fit, and where they are from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops import detection, weights


@pytest.fixture(scope="module")
def openmmlab() -> dict[str, Tensor]:
    """A Mask R-CNN's state dict with MMDetection's names and shapes, for three classes."""
    torch.manual_seed(0)
    state = {}
    for name, value in detection.mask_rcnn_resnet50_fpn_carafe(num_classes=4).state_dict().items():
        for ours, theirs in {
            "backbone.body.": "backbone.",
            "backbone.fpn.": "neck.",
            "rpn.head.conv.0.0.": "rpn_head.rpn_conv.",
            "rpn.head.cls_logits.": "rpn_head.rpn_cls.",
            "rpn.head.bbox_pred.": "rpn_head.rpn_reg.",
            "roi_heads.box_head.fc6.": "roi_head.bbox_head.shared_fcs.0.",
            "roi_heads.box_head.fc7.": "roi_head.bbox_head.shared_fcs.1.",
            "roi_heads.box_predictor.cls_score.": "roi_head.bbox_head.fc_cls.",
            "roi_heads.box_predictor.bbox_pred.": "roi_head.bbox_head.fc_reg.",
            **{f"roi_heads.mask_head.{n}.0.": f"roi_head.mask_head.convs.{n}.conv." for n in range(4)},
            "roi_heads.mask_predictor.upsample.": "roi_head.mask_head.upsample.",
            "roi_heads.mask_predictor.mask_fcn_logits.": "roi_head.mask_head.conv_logits.",
        }.items():
            if name.startswith(ours):
                dropped = {"roi_head.bbox_head.fc_reg.": 4, "roi_head.mask_head.conv_logits.": 1}.get(theirs, 0)
                state[theirs + name.removeprefix(ours)] = value[dropped:] if value.dim() else value
                break
        else:
            raise AssertionError(name)
    return state


def _faster(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "mask_head" not in name}


def test_openmmlabs_names_and_the_background(openmmlab, tmp_path):
    path = tmp_path / "mask_rcnn.pth"
    torch.save({"meta": {"CLASSES": ("a", "b", "c"), "epoch": 12}, "state_dict": openmmlab}, path)
    state = detection.mask_rcnn_resnet50_fpn_carafe(path, num_classes=4).state_dict()
    assert torch.equal(state["backbone.body.layer3.5.conv2.weight"], openmmlab["backbone.layer3.5.conv2.weight"])
    scores, theirs = state["roi_heads.box_predictor.cls_score.weight"], openmmlab["roi_head.bbox_head.fc_cls.weight"]
    assert torch.equal(scores[0], theirs[3])
    assert torch.equal(scores[1:], theirs[:3])
    boxes = state["roi_heads.box_predictor.bbox_pred.bias"]
    assert torch.equal(boxes, torch.cat([torch.zeros(4), openmmlab["roi_head.bbox_head.fc_reg.bias"]]))
    masks = state["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    assert torch.equal(masks[1:], openmmlab["roi_head.mask_head.conv_logits.weight"])


def test_files_of_old_versions_without_counters(openmmlab, tmp_path):
    path = tmp_path / "old.pth"
    state = {name: value for name, value in _faster(openmmlab).items() if "num_batches_tracked" not in name}
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    detection.faster_rcnn_resnet50_fpn_carafe(path, num_classes=4)


def test_what_a_training_writes_beside_the_weights(openmmlab, tmp_path):
    """mmengine's record of the losses, and NumPy's numbers."""
    history = pytest.importorskip("mmengine.logging", reason="writes the record").HistoryBuffer([0.5, 0.25], [1, 1])
    record = {"log_scalars": {"train/loss": history}, "best": np.float64(0.386), "iter": np.int64(7)}
    path = tmp_path / "epoch_12.pth"
    torch.save({"meta": {"seed": np.int32(1)}, "state_dict": _faster(openmmlab), "message_hub": record}, path)
    detection.faster_rcnn_resnet50_fpn_carafe(path, num_classes=4)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_our_own_state_dicts(tmp_path, ending):
    model = detection.faster_rcnn_resnet50_fpn_carafe(num_classes=3)
    path = tmp_path / f"own{ending}"
    if ending == ".pth":
        torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)  # of DDP
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    loaded = detection.faster_rcnn_resnet50_fpn_carafe(str(path), num_classes=3)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_architecture_names_what_is_missing_and_unexpected(openmmlab, tmp_path):
    path = tmp_path / "fpn.pth"
    state = {name: value for name, value in openmmlab.items() if "upsample" not in name}
    state |= {f"roi_head.mask_head.extra.{number}": torch.zeros(1) for number in range(6)}
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        detection.mask_rcnn_resnet50_fpn_carafe(path, num_classes=4)
    message = str(caught.value)
    assert "20 missing (backbone.fpn.upsample_modules.0.channel_compressor.weight, " in message
    assert "6 unexpected (roi_head.mask_head.extra.0, roi_head.mask_head.extra.1, " in message
    assert "roi_head.mask_head.extra.3, ...)" in message


@pytest.mark.slow
def test_other_classes_name_the_heads(openmmlab, tmp_path):
    path = tmp_path / "three.pth"
    torch.save({"state_dict": openmmlab}, path)
    build = detection.mask_rcnn_resnet50_fpn_carafe
    with pytest.raises(
        ValueError, match=r"6 of another shape \(roi_heads.box_predictor.cls_score.weight \(4, 1024\) for"
    ) as caught:
        build(path, num_classes=6)
    fresh = ["roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.cls_score",
             "roi_heads.mask_predictor.mask_fcn_logits"]  # fmt: skip
    assert f"fresh={fresh}" in str(caught.value)
    model = build(path, num_classes=6, fresh=("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits"))
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (6, 1024)
    upsample = openmmlab["roi_head.mask_head.upsample.content_encoder.weight"]
    assert torch.equal(model.roi_heads.mask_predictor.upsample.content_encoder.weight, upsample)
    with pytest.raises(ValueError, match="fresh must name modules of the model, got 'box_predictor'"):
        build(path, num_classes=6, fresh=["box_predictor"])
    with pytest.raises(TypeError, match=r"fresh must be a sequence of names, got the string 'roi_heads': pass \['roi_"):
        build(path, num_classes=6, fresh="roi_heads")


class _Pointers:
    """An array of objects whose addresses the file chooses."""

    def __reduce__(self) -> object:
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")


class _Shape:
    def __reduce__(self) -> object:
        return np.ndarray, (_Pointers(), np.dtype("u1"))


@pytest.mark.parametrize("hostile", [_Pointers, _Shape])
def test_arrays_of_numpy_are_not_made(openmmlab, tmp_path, hostile):
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": _faster(openmmlab), "meta": hostile()}, path)
    detection.faster_rcnn_resnet50_fpn_carafe(path, num_classes=4)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*b.pth"):
        detection.faster_rcnn_resnet50_fpn_carafe(tmp_path / "b.pth")


def test_the_published_weights_are_chosen_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr("omniops.detection.carafe_rcnn.load_checkpoint", lambda _, source, **__: asked.append(source))
    detection.faster_rcnn_resnet50_fpn_carafe("coco")
    detection.mask_rcnn_resnet50_fpn_carafe("coco")
    assert asked == list(detection.COCO_WEIGHTS.values())


def test_a_url_is_fetched(monkeypatch, tmp_path):
    model, path, asked = nn.Linear(1, 1), tmp_path / "model.pth", []
    torch.save({"state_dict": {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}}, path)
    monkeypatch.setattr(weights, "fetch", lambda *arguments: asked.append(arguments) or path)
    detection.load_checkpoint(model, "https://example.invalid/model.pth", progress=False)
    assert asked == [("https://example.invalid/model.pth", False)]
    assert model.weight.item() == 1
