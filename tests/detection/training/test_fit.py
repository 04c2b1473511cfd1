"""A whole training: its files, the average precision, the best epoch, and going on from last.pth."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

import tiny_detectors

from omniops.detection.trained import parse_description, read_description
from omniops.detection.training import BEST, HISTORY, LAST, CocoDataset, Observer, evaluate, fit, read_checkpoint
from omniops.detection.training import fit as fit_function
from omniops.detection.training.checkpoints import write_checkpoint
from omniops.detection.training.fit import judged


class Log(Observer):
    def __init__(self, stop=None):
        self.steps, self.epochs, self.validations, self._stop = [], [], [], stop

    def on_step(self, step):
        self.steps.append((step.epoch, step.number, step.loss))
        if (step.epoch, step.number) == self._stop:
            raise KeyboardInterrupt

    def on_validation(self, done, total):
        self.validations.append((done, total))

    def on_epoch(self, record, is_best):
        self.epochs.append((record["epoch"], is_best))


@pytest.fixture
def validation(shapes, annotations):
    return CocoDataset(shapes / "images", annotations, masks=False)


def _same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left) and left.keys() == right.keys()


@pytest.mark.parametrize("masks", [False, True])
def test_the_files_of_a_training(begin, validation, tmp_path, monkeypatch, masks):
    tiny_detectors.replace(monkeypatch.setattr)
    training, log = begin(masks), Log()
    history = fit(training, tmp_path / "new" / "out", validation, log)
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == sorted([LAST, BEST, HISTORY])
    assert json.loads((folder / HISTORY).read_text()) == history
    assert [record["epoch"] for record in history] == [1, 2]
    for record in history:
        assert record["loss"] == pytest.approx(sum(record["losses"].values()))
        assert set(record) >= {"lr", "images_per_second", "bbox"}
        assert ("segm" in record) is masks
    assert [entry[0] for entry in log.epochs] == [1, 2]
    assert log.validations == [(number, 6) for number in range(1, 7)] * 2
    for name in (LAST, BEST):
        description = read_description(folder / name)
        assert description == training.description
        builder = tiny_detectors.build
        model = builder(masks, folder / name, num_classes=3)
        state = torch.load(folder / name, weights_only=True)["state_dict"]
        assert _same(model.state_dict(), state)
    assert _same(torch.load(folder / LAST, weights_only=True)["state_dict"], training.model.state_dict())
    figures = evaluate(training.model, validation, torch.device("cpu"))
    assert figures["bbox"] == history[-1]["bbox"]
    assert training.model.training


@pytest.mark.slow
def test_the_average_precision_rises(begin, shapes, annotations, tmp_path):
    dataset = CocoDataset(shapes / "images", annotations, masks=False, image_ids=[7, 21])
    training = begin(dataset=dataset, epochs=24, lr=0.1, schedule="cosine", warmup=4)
    before = evaluate(training.model, dataset, torch.device("cpu"))
    while training.epoch < 23:
        training.run_epoch()
        training.history.append({})
    (*_, record) = fit(training, tmp_path, dataset)
    assert record["bbox"]["AP50"] > before["bbox"]["AP50"] + 0.3


def test_the_best_epoch_is_kept(begin, validation, tmp_path, monkeypatch):
    """The figures are scripted: the second epoch is the best, the third as good."""
    values = iter([0.1, 0.5, 0.5])
    module = __import__(fit_function.__module__, fromlist=["evaluate"])
    monkeypatch.setattr(module, "evaluate", lambda *arguments: {"bbox": {"AP": next(values)}})
    states, log = [], Log()
    log.on_epoch = lambda record, is_best: states.append((is_best, torch.load(tmp_path / LAST, weights_only=True)))
    fit(begin(epochs=3), tmp_path, validation, log)
    assert [is_best for is_best, _ in states] == [True, True, False]
    best = torch.load(tmp_path / BEST, weights_only=True)["state_dict"]
    assert _same(best, states[1][1]["state_dict"])
    assert not _same(best, states[2][1]["state_dict"])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"bbox": {"AP": 0.2}}, 0.2),
        ({"bbox": {"AP": 0.2}, "segm": {"AP": 0.1}}, 0.1),
        ({"bbox": {"AP": None}}, -1),
        ({}, -1),
    ],
)
def test_what_is_judged(record, expected):
    assert judged(record) == expected


def test_without_an_object_to_find_there_is_no_best(begin, shapes, annotations, tmp_path):
    empty = CocoDataset(shapes / "images", annotations, masks=False, image_ids=[35])
    (record,) = fit(begin(epochs=1), tmp_path, empty)
    assert record["bbox"]["AP"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LAST, HISTORY])


def test_without_a_validation_set_there_is_no_best(begin, tmp_path):
    (tmp_path / BEST).write_text("of another training")
    history = fit(begin(epochs=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LAST, HISTORY])
    assert "bbox" not in history[0]


@pytest.mark.parametrize(
    ("stop", "checkpoint_steps", "kept"),
    [
        ((2, 3), 2, (1, 2)),
        pytest.param((2, 1), None, (1, 0), marks=pytest.mark.slow),
        pytest.param((1, 2), 1, (0, 2), marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_from_what_ctrl_c_left(begin, validation, tmp_path, stop, checkpoint_steps, kept):
    """As if it had not ended: the steps, the figures, and the weights at the end."""
    log, whole = Log(), begin()
    expected = fit(whole, tmp_path / "whole", validation, log)
    with pytest.raises(KeyboardInterrupt):
        fit(begin(), tmp_path / "out", validation, Log(stop), checkpoint_steps)
    state = read_checkpoint(tmp_path / "out" / LAST)
    assert (state["epoch"], state["step"]) == kept
    training, rest = begin(), Log()
    training.load_state(state)
    history = fit(training, tmp_path / "out", validation, rest)
    assert rest.steps == log.steps[3 * kept[0] + kept[1] :]
    for record, other in zip(history, expected, strict=True):
        for name in ("epoch", "loss", "losses", "lr", "bbox"):
            assert record[name] == other[name], name
    for name in (LAST, BEST):
        own, other = (torch.load(tmp_path / run / name, weights_only=True)["state_dict"] for run in ("out", "whole"))
        assert _same(own, other)


def test_a_training_that_is_done_stays_as_it_is(begin, tmp_path):
    fit(begin(epochs=1), tmp_path)
    before = (tmp_path / LAST).read_bytes()
    training, log = begin(epochs=1), Log()
    training.load_state(read_checkpoint(tmp_path / LAST))
    assert len(fit(training, tmp_path, None, log)) == 1
    assert log.steps == []
    assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("room", [0, 1000])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(begin, tmp_path, monkeypatch, room):
    """Of a full disk, from the beginning or within the file."""
    fit(begin(epochs=1), tmp_path)
    before = (tmp_path / LAST).read_bytes()

    class Full:
        def __init__(self, file):
            self._file, self._room = file, room

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            self._room -= len(data)
            if self._room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *arguments: Full(opened(self, *arguments)))
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path / LAST, begin().state())
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / LAST))
    monkeypatch.undo()
    assert (tmp_path / LAST).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LAST, HISTORY])


class _Planted:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (Path.touch, (self._path,))


def test_files_that_are_no_state(begin, tmp_path):
    path = tmp_path / LAST
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*last\.pth"):
        read_checkpoint(path)
    path.write_bytes(b"PK no checkpoint")
    with pytest.raises(ValueError, match=r"last\.pth is no checkpoint, a damaged one"):
        read_checkpoint(path)
    torch.save(begin().weights(), path)
    with pytest.raises(ValueError, match="is no state of a training: it lacks dataset, epoch, history"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="is no state of a training"):
        read_checkpoint(path)
    planted = tmp_path / "planted"
    torch.save({**begin().state(), "totals": _Planted(planted)}, path)
    with pytest.raises(ValueError, match="only running code restores"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(_Planted(planted)))
    with pytest.raises(ValueError, match="only running code restores"):
        read_checkpoint(path)
    assert read_description(path) is None
    assert not planted.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "system"},
        {"architecture": 5},
        {"category_ids": [0, 3]},
        {"category_ids": [0, 3, 3]},
        {"category_ids": [1, 3, 20]},
        {"category_ids": [0, 3, "20"]},
        {"category_names": ["__background__", "square", 5]},
        {"category_names": "abc"},
        {"min_size": 0},
        {"max_size": 2.0},
    ],
)
def test_damaged_descriptions(begin, tmp_path, change):
    plain = begin().description.as_plain()
    assert parse_description(plain, "file") == begin().description
    with pytest.raises(ValueError, match=r"best\.pth is damaged: as 'detector' it must have"):
        parse_description({**plain, **change}, "best.pth")
    torch.save({"detector": {**plain, **change}, "state_dict": {}}, tmp_path / BEST)
    with pytest.raises(ValueError, match=r"best\.pth is damaged"):
        read_description(tmp_path / BEST)


def test_files_that_describe_nothing(tmp_path):
    model = tiny_detectors.faster_rcnn(num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert read_description(tmp_path / "bare.pth") is None
    assert read_description(tmp_path / "none.pth") is None
