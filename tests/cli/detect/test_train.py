"""omniops detect-train: its files and what it prints, resuming, torchrun, what detect makes of it, and every error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

import shapes_dataset
import tiny_detectors

from omniops.cli.detect import train as train_command
from omniops.cli.detect.training_report import Reporter
from omniops.detection import coco
from omniops.detection.trained import COCO, KEY, Description

TESTS = Path(__file__).parents[2]
SMALL = ("--min-size", "64", "--max-size", "96", "--lr", "0.02", "--workers", "0", "--device", "cpu")
FASTER, MASK = "faster-rcnn-r50-carafe", "mask-rcnn-r50-carafe"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes_dataset.make(folder, 6)
    return folder


@pytest.fixture
def content(shapes):
    return json.loads((shapes / "annotations.json").read_text())


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "changed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny_detectors.replace(monkeypatch.setattr)


def _arguments(shapes, out, *more, model=FASTER, annotations=None, start=("--random-weights",)):
    annotations = annotations or shapes / "annotations.json"
    inputs = ("--images", str(shapes / "images"), "--annotations", str(annotations))
    arguments = ("detect-train", *inputs, "--model", model, "--out", out, "--epochs", "2", *SMALL, *start, *more)
    return tuple(map(str, arguments))


def _history(out):
    return [
        {name: record[name] for name in ("epoch", "loss", "losses", "lr", "bbox", "segm") if name in record}
        for record in json.loads((out / "history.json").read_text())
    ]


def _state(path):
    return torch.load(path, weights_only=True)


def _same(left, right):
    return all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())


@pytest.mark.parametrize("model", [FASTER, MASK])
def test_its_result_is_what_detect_and_detect_eval_take(omniops, shapes, content, tmp_path, model):
    """By the names and ids of its own categories, whatever --model says."""
    out = tmp_path / "new" / "out"
    result = omniops(*_arguments(shapes, out, "--hold-out", "0.34", model=model))
    assert (result.status, result.err) == (0, "")
    assert any("training on 4 pictures" in note and "judging by 2" in note for note in result.notes)
    first, second, last = result.out.splitlines()
    losses = r"loss \d\.\d{3} \(classifier .*, box AP \d+\.\d, AP50 \d+\.\d"
    assert re.match(rf"epoch 1/2: {losses}", first)
    assert re.match(rf"epoch 2/2: {losses}", second)
    assert ("mask AP" in second) is (model == MASK)
    assert first.endswith(f"-> {out / 'best.pth'}")
    assert last == f"Wrote {out / 'last.pth'}, {out / 'best.pth'}, {out / 'history.json'}"

    picture, found = shapes / "images" / "more" / "1.png", tmp_path / "found"
    weights = ("--weights", str(out / "last.pth"), "--device", "cpu")
    result = omniops("detect", str(picture), *weights, "--out", str(found), "--threshold", "0.06")
    assert (result.status, result.err) == (0, "")
    records = json.loads((found / "detections.json").read_text())
    assert {record["category_id"] for record in records} <= {3, 20}
    assert all(("segmentation" in record) is (model == MASK) for record in records)
    assert re.search(r": \d+ (square|disc)", result.out)

    # On those that were held out the figures are the training's.
    held_out = [entry for entry in content["images"] if entry["id"] not in _trained_on(content)]
    own = {entry["id"] for entry in held_out}
    content["images"] = held_out
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in own]
    (tmp_path / "held_out.json").write_text(json.dumps(content))
    inputs = ("--images", str(shapes / "images"), "--annotations", str(tmp_path / "held_out.json"))
    result = omniops("detect-eval", *inputs, *weights, "--json", str(tmp_path / "figures.json"))
    assert (result.status, result.err) == (0, "")
    report, record = json.loads((tmp_path / "figures.json").read_text()), _history(out)[-1]
    assert report["model"] == model
    for name in ("bbox", "segm"):
        assert report.get(name) == record.get(name)


def _trained_on(content):
    from omniops.detection.training import hold_out

    return hold_out(content, 0.34, 0)[0]


def test_other_categories_than_those_it_was_trained_on(omniops, fails, shapes, content, write, tmp_path):
    omniops(*_arguments(shapes, tmp_path / "out", "--epochs", "1"))
    content["categories"][0]["name"] = "ball"
    arguments = ("--images", shapes / "images", "--annotations", write(content), "--weights", tmp_path / "out/last.pth")
    line = fails("detect-eval", *map(str, arguments), "--device", "cpu", status=2)
    assert "changed.json: the category 'ball' of id 20 is 'disc' of the detector's" in line


def test_a_training_of_coco_s_categories_is_judged_by_them_alone(omniops, fails, shapes, tmp_path):
    description = Description("faster_rcnn_resnet50_fpn_carafe", COCO, 64, 96)
    state = tiny_detectors.faster_rcnn().state_dict()
    torch.save({KEY: description.as_plain(), "state_dict": state}, tmp_path / "coco.pth")
    inputs = ("--images", shapes / "images", "--annotations", shapes / "annotations.json", "--device", "cpu")
    line = fails("detect-eval", *map(str, inputs), "--weights", str(tmp_path / "coco.pth"), status=2)
    assert "annotations.json: the category 'disc' of id 20 is 'sheep' of the detector's" in line


def _interrupt_at(monkeypatch, epoch, number):
    before = Reporter.on_step

    def on_step(self, step):
        before(self, step)
        if (step.epoch, step.number) == (epoch, number):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reporter, "on_step", on_step)


@pytest.mark.parametrize("kept", ["epoch", "step"])
def test_ctrl_c_and_resume(omniops, shapes, tmp_path, monkeypatch, kept):
    """The losses, the figures and the weights of a training that nobody interrupted."""
    more = ("--batch-size", "2", "--hold-out", "0.34", *(("--checkpoint-steps", "1") if kept == "step" else ()))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert omniops(*_arguments(shapes, whole, *more)).status == 0
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 2, 2)
        result = omniops(*_arguments(shapes, out, *more))
    assert result.status == 130
    kept_in = f"{out / 'last.pth'} has what came before, and --resume goes on from there"
    assert result.err == f"omniops: error: interrupted in epoch 2: {kept_in}\n"
    state = _state(out / "last.pth")
    assert (state["epoch"], state["step"]) == (1, 0 if kept == "epoch" else 1)
    result = omniops(*_arguments(shapes, out, *more, "--resume"))
    assert (result.status, result.err) == (0, "")
    assert any("going on after 1 of 2 epochs" in note for note in result.notes)
    assert result.out.startswith("epoch 2/2: ")
    assert _history(out) == _history(whole)
    for name in ("last.pth", "best.pth"):
        assert _same(_state(out / name), _state(whole / name))


def test_ctrl_c_before_anything_is_kept(omniops, shapes, tmp_path, monkeypatch):
    _interrupt_at(monkeypatch, 1, 1)
    result = omniops(*_arguments(shapes, tmp_path / "out"))
    assert result.status == 130
    assert result.err == "omniops: error: interrupted in epoch 1: nothing is kept\n"
    (tmp_path / "out" / "last.pth").write_text("of another training")
    result = omniops(*_arguments(shapes, tmp_path / "out", "--overwrite"))
    assert result.err == "omniops: error: interrupted in epoch 1: nothing is kept\n"


def test_resuming_takes_its_weights_from_the_state(omniops, fails, shapes, tmp_path):
    """Neither --weights nor --random-weights are needed; other settings are refused, and so are other pictures."""
    out = tmp_path / "out"
    assert omniops(*_arguments(shapes, out)).status == 0
    result = omniops(*_arguments(shapes, out, "--resume", start=()))
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"Nothing was left to do: {out / 'last.pth'}, ")
    line = fails(*_arguments(shapes, out, "--resume", "--epochs", "5", start=()), status=2)
    assert line.endswith(
        f"{out / 'last.pth'}: the state is of a training with other settings: epochs is 5 here and 2 there"
    )
    line = fails(*_arguments(shapes, out, "--resume", "--hold-out", "0.5"), status=2)
    assert line.endswith("the state is of a training with other pictures or annotations")
    line = fails(*_arguments(shapes, out, "--resume", model=MASK), status=2)
    assert "another model or other categories: architecture is 'mask_rcnn_resnet50_fpn_carafe' here" in line
    (out / "last.pth").write_bytes(b"no checkpoint")
    assert "last.pth is no checkpoint" in fails(*_arguments(shapes, out, "--resume"), status=1)


def test_resume_begins_where_there_is_nothing(omniops, shapes, tmp_path):
    result = omniops(*_arguments(shapes, tmp_path / "out", "--epochs", "1", "--resume"))
    assert result.status == 0
    assert f"omniops: there is no {tmp_path / 'out' / 'last.pth'}: beginning anew\n" in result.notes


def test_resuming_without_a_state_keeps_what_is_there(omniops, fails, shapes, tmp_path):
    """As where last.pth was removed, because it is large, and best.pth was kept."""
    (tmp_path / "best.pth").write_text("the best")
    line = fails(*_arguments(shapes, tmp_path, "--resume"), status=2)
    assert line.endswith(f"{tmp_path / 'best.pth'} is there already: --overwrite replaces what is there")
    assert (tmp_path / "best.pth").read_text() == "the best"
    assert omniops(*_arguments(shapes, tmp_path, "--resume", "--overwrite", "--epochs", "1")).status == 0
    assert (tmp_path / "best.pth").stat().st_size > 1000


def test_nothing_is_overwritten_unasked(omniops, fails, shapes, tmp_path):
    out = tmp_path / "out"
    omniops(*_arguments(shapes, out, "--epochs", "1"))
    before = (out / "last.pth").read_bytes()
    line = fails(*_arguments(shapes, out), status=2)
    assert "there already: --overwrite" in line
    line = fails(*_arguments(shapes, out, "--overwrite", start=("--weights", out / "last.pth")), status=2)
    assert "last.pth would be overwritten: it is what is read" in line
    assert (out / "last.pth").read_bytes() == before
    assert omniops(*_arguments(shapes, out, "--epochs", "1", "--seed", "3", "--overwrite")).status == 0
    assert (out / "last.pth").read_bytes() != before


def test_weights_of_other_categories_and_of_the_same(omniops, shapes, tmp_path):
    """COCO's heads are drawn anew, its own are kept; both leave the rest of the network as it was."""
    torch.save(tiny_detectors.faster_rcnn().state_dict(), tmp_path / "coco.pth")
    note = "omniops: its categories are others: what tells them apart begins anew\n"
    still = ("--epochs", "1", "--lr", "0")
    result = omniops(*_arguments(shapes, tmp_path / "a", *still, start=("--weights", tmp_path / "coco.pth")))
    assert (result.status, note in result.notes) == (0, True)
    first, saved = _state(tmp_path / "a" / "last.pth"), _state(tmp_path / "coco.pth")
    others = [name for name in saved if "box_predictor" not in name]
    assert all(torch.equal(first["state_dict"][name], saved[name]) for name in others)
    assert first["state_dict"]["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3
    result = omniops(*_arguments(shapes, tmp_path / "b", *still, start=("--weights", tmp_path / "a" / "last.pth")))
    assert (result.status, note in result.notes) == (0, False)
    assert _same(first, _state(tmp_path / "b" / "last.pth"))


def test_a_validation_set_of_its_own(omniops, fails, shapes, content, write, tmp_path):
    arguments = ("--epochs", "1", "--val-annotations", shapes / "annotations.json", "--val-images", shapes / "images")
    result = omniops(*_arguments(shapes, tmp_path / "out", *arguments))
    assert any("training on 6 pictures" in note and "judging by 6" in note for note in result.notes)
    assert "box AP" in result.out
    content["categories"].append({"id": 4, "name": "cone"})
    arguments = ("--val-annotations", write(content))
    line = fails(*_arguments(shapes, tmp_path / "other", *arguments), status=2)
    assert "changed.json: the category 'cone' of id 4 is none of the detector's" in line


def test_without_validation(omniops, shapes, tmp_path):
    result = omniops(*_arguments(shapes, tmp_path, "--epochs", "1", "--hold-out", "0"))
    assert result.status == 0
    assert "AP" not in result.out
    assert result.out.endswith(f"Wrote {tmp_path / 'last.pth'}, {tmp_path / 'history.json'}\n")


def test_validation_without_objects(omniops, shapes, content, write, tmp_path):
    content["annotations"] = []
    result = omniops(*_arguments(shapes, tmp_path / "out", "--epochs", "1", "--val-annotations", write(content)))
    assert result.status == 0
    assert "no average precision and no best.pth" in "".join(result.notes)
    assert "box AP -, AP50 - -> " in result.out
    assert not (tmp_path / "out" / "best.pth").exists()


@pytest.mark.parametrize("options", [("--amp",), ("--precision", "auto"), ("--precision", "bfloat16")])
def test_mixed_precision(omniops, shapes, tmp_path, monkeypatch, options):
    monkeypatch.setattr(train_command.devices, "autocast_dtype", lambda device: torch.bfloat16)
    assert omniops(*_arguments(shapes, tmp_path, "--epochs", "1", *options)).status == 0
    assert _state(tmp_path / "last.pth")["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [(None, "cpu", "float32"), ("auto", "mps", "bfloat16"), ("float16", "mps", "float16")],
)
def test_the_precision(precision, device, expected):
    named = None if precision is None else train_command.Precision(precision)
    assert train_command._dtype(named, False, torch.device(device)) == expected


def test_what_is_left_out_is_said(omniops, shapes, content, write, tmp_path):
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][3]["bbox"][2] = 0
    arguments = ("--epochs", "1", "--hold-out", "0")
    result = omniops(*_arguments(shapes, tmp_path / "out", *arguments, annotations=write(content)))
    assert "omniops: left out are 1 crowds and 1 objects without area\n" in result.notes
    assert any("with 5 objects of 2 categories" in note for note in result.notes)


def _without(content, key):
    for entry in content["annotations"]:
        entry.pop(key, None)
    return content


def _with(content, key, number, **fields):
    content[key][number].update(fields)
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: "no json", "is not JSON"),
        (lambda content: {**content, "images": []}, "its list of images is empty"),
        (
            lambda content: _with(content, "annotations", 0, image_id=5),
            "annotations[0] is of an image that is not listed, 5",
        ),
        (lambda content: _with(content, "annotations", 0, category_id=5), "of a category that is not listed, 5"),
        (lambda content: _with(content, "images", 1, file_name="gone.png"), "1 of "),
        (
            lambda content: _with(content, "images", 1, file_name="../a.png"),
            "the picture ../a.png is not in the folder",
        ),
        (lambda content: {**content, "annotations": []}, "there are no objects to train on in 6 pictures"),
        (lambda content: _without(content, "bbox"), "must have [x, y, width, height] as 'bbox'"),
    ],
)
def test_bad_annotations(fails, shapes, content, write, tmp_path, change, words):
    path = write(change(content))
    line = fails(*_arguments(shapes, tmp_path / "out", "--hold-out", "0", annotations=path), status=2)
    assert words in line


def test_objects_without_masks(fails, shapes, content, write, tmp_path):
    path = write(_without(content, "segmentation"))
    line = fails(*_arguments(shapes, tmp_path / "out", model=MASK, annotations=path), status=2)
    assert re.search(r"changed\.json: annotations\[\d\] has no 'segmentation'.* train Faster R-CNN", line)


def test_a_picture_of_another_size(omniops, shapes, content, write, tmp_path):
    path = write(_without(_with(content, "images", 1, width=65), "segmentation"))
    result = omniops(*_arguments(shapes, tmp_path / "out", "--hold-out", "0", annotations=path))
    assert result.status == 1
    assert re.search(r"error: .*1\.png has 80 x 64 pixels, its annotations 65 x 64", result.err)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--val-images", "."), "--val-images needs --val-annotations"),
        (("--amp", "--precision", "float32"), "--amp is --precision auto: give one of the two"),
        (("--weights", "coco"), "--weights and --random-weights exclude each other"),
        (("--val-annotations", "none.json"), "cannot read none.json"),
        (("--lr", "inf"), "lr must be a number"),
    ],
)
def test_options_that_do_not_go_together(fails, shapes, tmp_path, more, words):
    assert words in fails(*_arguments(shapes, tmp_path / "out", *more), status=2)


def test_paths_that_are_missing(fails, shapes, content, write, tmp_path):
    line = fails(*_arguments(shapes, tmp_path / "out", start=()), status=2)
    assert "--weights coco fetches" in line
    assert line.endswith("--random-weights trains the whole network from the beginning")
    start = ("--weights", tmp_path / "none.pth")
    assert "there is no checkpoint at" in fails(*_arguments(shapes, tmp_path / "out", start=start), status=2)
    assert "no such folder" in fails(
        *_arguments(tmp_path / "none", tmp_path / "out", annotations=write(content)), status=2
    )
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    line = fails(*_arguments(shapes, tmp_path / "out", annotations=write(content)), status=2)
    assert "nothing can be held out of a single picture: --hold-out 0" in line


def test_a_loss_that_is_no_number(omniops, shapes, tmp_path):
    result = omniops(*_arguments(shapes, tmp_path / "out", "--lr", "1e12", "--warmup", "0", "--epochs", "8"))
    assert result.status == 1
    assert re.search(r"error: the loss is no finite number .* a lower rate", result.err.splitlines()[-1])


@pytest.mark.parametrize("is_signalled", [False, True])
def test_another_process_that_ended(omniops, shapes, tmp_path, monkeypatch, is_signalled):
    """After Ctrl-C under torchrun the first to end closes its connections, and a signal may be lost meanwhile."""

    def closed(training, *arguments):
        training.processes.are_several = True
        if is_signalled:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:37058")

    monkeypatch.setattr("omniops.detection.training.fit", closed)
    result = omniops(*_arguments(shapes, tmp_path / "out"))
    expected = (
        (130, "interrupted in epoch 1: nothing is kept")
        if is_signalled
        else (1, "another process of the training ended")
    )
    assert (result.status, result.err) == (expected[0], f"omniops: error: {expected[1]}\n")


def test_a_reader_that_was_killed(omniops, shapes, tmp_path, monkeypatch):
    def killed(*arguments):
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.\nmore")

    monkeypatch.setattr("omniops.detection.training.fit", killed)
    result = omniops(*_arguments(shapes, tmp_path / "out"))
    assert result.status == 1
    assert "a process that reads pictures ended (DataLoader worker (pid 5)" in result.err
    assert "--workers 0" in result.err


def test_several_processes_need_cpus_or_nvidia_s_gpus(monkeypatch):
    class Two:
        are_several = True

    monkeypatch.setattr(train_command, "choose_own_device", lambda name, processes: torch.device("mps"))
    with pytest.raises(
        train_command.CommandError, match="several processes train on CPUs or on NVIDIA GPUs, not on mps"
    ):
        train_command._choose_device(None, Two())


def test_a_batch_that_processes_cannot_share():
    class Two:
        count = 2

    train_command._require_shares(4, Two())
    with pytest.raises(train_command.CommandError, match=r"--batch-size 3 .*: 2 of them need a multiple of that"):
        train_command._require_shares(3, Two())


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
def test_under_torchrun(omniops, tmp_path, monkeypatch):
    """Two processes print once, have the losses of one, and go on from one's state."""
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    shapes_dataset.make(shapes, 6, sizes=[(64, 64)])
    script = tmp_path / "tiny.py"
    script.write_text(
        "import sys, torch, tiny_detectors\n"
        "from omniops.cli import main\n"
        "torch.set_num_threads(1)\n"
        "tiny_detectors.replace()\n"
        "main(sys.argv[1:])\n"
    )
    one, two, half = (tmp_path / name for name in ("one", "two", "half"))
    more = ("--batch-size", "2", "--workers", "1")
    assert omniops(*_arguments(shapes, one, *more)).status == 0

    def run(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, timeout=240, env=environment
        )

    ran = run(*_arguments(shapes, two, *more))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("epoch 1/2") == ran.stdout.count("Wrote") == 1
    for own, other in zip(_history(two), _history(one), strict=True):
        assert own["losses"] == pytest.approx(other["losses"], rel=1e-3)

    with monkeypatch.context() as patch:
        _interrupt_at(patch, 2, 1)
        assert omniops(*_arguments(shapes, half, *more)).status == 130
    ran = run(*_arguments(shapes, half, *more, "--resume"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("epoch 2/2")
    for own, other in zip(_history(half), _history(one), strict=True):
        assert own["losses"] == pytest.approx(other["losses"], rel=1e-3)

    # What is wrong is said once by each, and all end.
    (shapes / "images" / "0.png").write_bytes(b"no picture")
    ran = run(*_arguments(shapes, two, *more, "--overwrite"))
    assert ran.returncode == 1
    assert ran.stderr.count("not a picture that Pillow can read") == 1


def test_a_picture_that_goes_missing_meanwhile(omniops, shapes, content, tmp_path, monkeypatch):
    for entry in content["images"]:
        target = tmp_path / "images" / entry["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shapes / "images" / entry["file_name"]).save(target)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    before = Reporter.on_epoch

    def on_epoch(self, record, is_best):
        before(self, record, is_best)
        (tmp_path / "images" / "0.png").unlink(missing_ok=True)

    monkeypatch.setattr(Reporter, "on_epoch", on_epoch)
    result = omniops(*_arguments(tmp_path, tmp_path / "out", "--workers", "1"))
    assert result.status == 1
    assert re.search(r"error: no such file: .*0\.png$", result.err.strip())
    assert coco.read_annotations(tmp_path / "annotations.json")
    assert _state(tmp_path / "out" / "last.pth")["epoch"] == 1
