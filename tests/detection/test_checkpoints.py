"""Checkpoints: OpenMMLab's and our own, what does not fit, what is refused, and what cannot be fetched."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import re
import shutil
import socket
import threading
import time

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


class _Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


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


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": _Hostile()}, "hostile.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"hostile.pth is refused: it holds \w+.system, which only running code"):
        detection.faster_rcnn_resnet50_fpn_carafe("hostile.pth")
    assert not os.path.exists("executed")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_and_nobody_told_to_run_it(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(_Hostile(), protocol))
    with pytest.raises(ValueError, match=r"hostile\.pkl is (refused|no checkpoint)") as caught:
        detection.faster_rcnn_resnet50_fpn_carafe(path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>Not Found</html>", pickle.dumps([1, 2]), pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(60)],
    ids=["empty", "html", "list", "numbers", "damaged"],
)
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth is no checkpoint"):
        detection.faster_rcnn_resnet50_fpn_carafe(path)


def test_damaged_safetensors_and_names_that_are_none(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    with pytest.raises((ValueError, ImportError), match=r"a\.safetensors is no checkpoint|safetensors"):
        detection.faster_rcnn_resnet50_fpn_carafe(path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({1: torch.zeros(1)}, r"1 \(Tensor\)"),
        ({"state_dict": {"a": 1}}, r"'a' \(int\)"),
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, r"'model' \(dict\), 'epoch' \(int\)"),
        ({"a": torch.zeros(1), **dict.fromkeys("vwxyz", 1)}, r"('\w' \(int\), ){4}\.\.\."),
        ([torch.zeros(1)], "one list"),
    ],
)
def test_no_state_dict_names_what_is_there_instead(tmp_path, content, held):
    torch.save(content, tmp_path / "a.pth")
    expected = r"\. Expected are tensors by the names of the model's parameters, alone or in a dict as 'state_dict'"
    with pytest.raises(ValueError, match=rf"a\.pth is no checkpoint: it holds no state dict but {held}{expected}"):
        detection.load_checkpoint(nn.Linear(1, 1), tmp_path / "a.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*b.pth"):
        detection.faster_rcnn_resnet50_fpn_carafe(tmp_path / "b.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """A web server of a folder: the folder and its address, and how often it was asked."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments: object) -> None:
            asked.append(arguments)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}", asked
        web.shutdown()


def test_a_url_is_fetched_once_and_its_checksum_checked(cache, server):
    folder, address, asked = server
    model = detection.faster_rcnn_resnet50_fpn_carafe(num_classes=3)
    torch.save(model.state_dict(), folder / "model.pth")
    digits = hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()[:8]
    good = f"model-{digits}.pth"
    (folder / "model.pth").rename(folder / good)
    detection.faster_rcnn_resnet50_fpn_carafe(f"{address}/{good}", num_classes=3, progress=False)
    assert (cache / good).is_file()
    before = len(asked)
    loaded = detection.faster_rcnn_resnet50_fpn_carafe(f"{address}/{good}", num_classes=3, progress=False)
    assert len(asked) == before
    assert torch.equal(loaded.rpn.head.bbox_pred.weight, model.rpn.head.bbox_pred.weight)

    (folder / good).rename(folder / "model-01234567.pth")
    with pytest.raises(ValueError, match=r"another checksum .*expected .01234567"):
        detection.faster_rcnn_resnet50_fpn_carafe(f"{address}/model-01234567.pth", num_classes=3, progress=False)
    assert [path.name for path in cache.iterdir()] == [good]


def test_files_of_one_name_do_not_serve_each_other(cache, server):
    folder, address, asked = server
    for place in ("a", "b"):
        (folder / place).mkdir()
        torch.save(nn.Linear(1, 1).state_dict(), folder / place / "model.pth")
    model = nn.Linear(1, 1)
    for place in ("a", "b", "a", "b"):
        detection.load_checkpoint(model, f"{address}/{place}/model.pth", progress=False)
        assert torch.equal(model.weight, torch.load(folder / place / "model.pth")["weight"])
    assert len(asked) == 2
    assert all(path.name.endswith("-model.pth") for path in cache.iterdir())
    with pytest.raises(ConnectionError, match="File not found") as caught:
        detection.load_checkpoint(nn.Linear(1, 1), f"{address}/c/model.pth", progress=False)
    # Put where the error says, it is used.
    (path,) = re.findall(r"put it at (.*model\.pth), or", str(caught.value))
    shutil.copy(folder / "a" / "model.pth", path)
    detection.load_checkpoint(model, f"{address}/c/model.pth", progress=False)
    assert torch.equal(model.weight, torch.load(folder / "a" / "model.pth")["weight"])


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/", "http://127.0.0.1:9/models/", "http://127.0.0.1:9", "http://127.0.0.1:9/m/?a=b/c.pth"],
)
def test_a_url_of_a_folder(cache, url):
    with pytest.raises(ValueError, match=f"{re.escape(url)} names no file: the URL of a checkpoint ends with"):
        detection.load_checkpoint(nn.Linear(1, 1), url)


def test_the_published_weights_are_chosen_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr("omniops.detection.carafe_rcnn.load_checkpoint", lambda _, source, **__: asked.append(source))
    detection.faster_rcnn_resnet50_fpn_carafe("coco")
    detection.mask_rcnn_resnet50_fpn_carafe("coco")
    assert asked == list(detection.COCO_WEIGHTS.values())


def _serve_half(listener: socket.socket, then: float) -> None:
    """Answer each request with half of what is promised, and close after so many seconds."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the listener is closed
            return
        with connection:
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(50))
            time.sleep(then)


@pytest.mark.parametrize("why", ["refused", "not found", "silent", "no name service", "stalled", "cut short"])
def test_what_cannot_be_fetched_says_so_in_time(cache, server, monkeypatch, why):
    _, address, _ = server
    monkeypatch.setattr(weights, "_PATIENCE", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if why in ("silent", "stalled", "cut short"):
            listener.listen()
        if why in ("stalled", "cut short"):
            seconds = 12 if why == "stalled" else 0
            threading.Thread(target=_serve_half, args=(listener, seconds), daemon=True).start()
        if why == "no name service":
            monkeypatch.setattr(weights, "urlopen", lambda *_, **__: time.sleep(4))
        if why != "not found":
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.perf_counter()
        with pytest.raises(ConnectionError) as caught:
            detection.faster_rcnn_resnet50_fpn_carafe(f"{address}/weights-01234567.pth")
    assert time.perf_counter() - start < 10
    message = str(caught.value)
    assert f"cannot fetch {address}/weights-01234567.pth: " in message
    assert f"put it at {cache / 'weights-01234567.pth'}, or pass the path of the file" in message
    assert not cache.exists() or not list(cache.iterdir())
