"""omniops detect on many pictures: how they are named, batches, and what goes wrong in one."""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import threading
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

import tiny_detectors

from omniops import detection
from omniops.cli.detect import command as detect

SMALL = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 4}
SIZES = ((40, 30), (40, 30), (30, 40), (40, 30), (60, 45))
"""(width, height); the third one is padded to another size than the others."""


class Scripted:
    """In place of a detector: an object as wide as each picture, but not in those it fails for, by width."""

    def __init__(self):
        self.batches, self.failures = [], {}

    def __call__(self, images):
        widths = [image.shape[2] for image in images]
        self.batches.append(widths)
        for width in (*widths, len(widths) * 1000):
            if width in self.failures:
                raise self.failures[width]
        return [
            {
                "boxes": torch.tensor([[0.0, 0, width, 2]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.9]),
                "masks": torch.ones(1, 1, *image.shape[1:], dtype=torch.bool),
            }
            for image, width in zip(images, widths, strict=True)
        ]


@pytest.fixture
def scripted(monkeypatch):
    detector = Scripted()
    monkeypatch.setattr(detect, "load_detector", lambda *args, **kwargs: detector)
    return detector


@pytest.fixture
def small(monkeypatch):
    build = functools.partial(tiny_detectors.mask_rcnn, **SMALL)
    monkeypatch.setattr(detection, "mask_rcnn_resnet50_fpn_carafe", build)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Make 0.png, 1.png, ... of these sizes in a folder, and go there."""

    def make(sizes):
        monkeypatch.chdir(tmp_path)
        paths = []
        for number, (width, height) in enumerate(sizes):
            y, x = np.mgrid[:height, :width]
            red = (x * 6 + number * 20) % 256
            pixels = np.stack([red, y * 6 % 256, np.where((x // 7 + y // 5) % 2, 200, 30)], axis=2)
            Image.fromarray(pixels.astype(np.uint8)).save(f"{number}.png")
            paths.append(f"{number}.png")
        return paths

    return make


def _run(omniops, *arguments, out="out"):
    run = omniops("detect", *arguments, "--random-weights", "--device", "cpu", "--out", out)
    results = f"{out}/detections.json"
    return run, json.loads(open(results).read()) if os.path.exists(results) else None


@pytest.mark.slow
def test_a_batch_finds_what_single_pictures_have(omniops, small, pictures):
    paths = pictures(SIZES)
    (alone, expected), (together, results) = (
        _run(omniops, *paths, "--batch", size, "--threshold", "0", out=f"out{size}") for size in ("1", "4")
    )
    assert (alone.status, alone.err, together.status, together.err) == (0, "", 0, "")
    assert together.out == alone.out.replace("out1", "out4")
    assert len(results) == 4 * len(SIZES)
    for record, other in zip(results, expected, strict=True):
        assert [record[key] for key in ("file_name", "image_id", "category_id")] == [
            other[key] for key in ("file_name", "image_id", "category_id")
        ]
        assert record["score"] == pytest.approx(other["score"], rel=1e-5)
        assert record["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        masks = [detection.coco.rle.decode(_as_bytes(found["segmentation"])) for found in (record, other)]
        assert (masks[0] == masks[1]).mean() > 0.99


def _as_bytes(segmentation):
    return {**segmentation, "counts": segmentation["counts"].encode()}


def test_results_are_in_the_order_of_the_pictures(omniops, scripted, pictures):
    paths = pictures([(10 + number % 2, 9) for number in range(9)])[::-1]
    run, results = _run(omniops, *paths, "--batch", "4")
    assert [line.split(" -> ")[0] for line in run.out.splitlines()[:-1]] == paths
    assert [(result["file_name"], result["bbox"][2]) for result in results] == [
        (path, 10 + int(path[0]) % 2) for path in paths
    ]
    assert scripted.batches == [[10, 10], [11, 11], [10, 10], [11, 11], [10]]


def test_pictures_of_one_size_are_detected_together(omniops, scripted, pictures):
    paths = pictures([(20, 10)] * 7)
    run, results = _run(omniops, *paths, "--batch", "3")
    assert (run.status, len(results)) == (0, 7)
    assert [len(batch) for batch in scripted.batches] == [3, 3, 1]


def test_pictures_are_named_by_patterns_folders_and_lists(omniops, scripted, pictures, monkeypatch):
    paths = pictures([(10 + number, 9) for number in range(4)])
    os.mkdir("folder")
    os.rename(paths[3], "folder/3.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("1.png\n"))
    run, results = _run(omniops, "[02].png", "folder", "--files-from", "-")
    assert run.status == 0
    assert [result["file_name"] for result in results] == ["0.png", "2.png", "folder/3.png", "1.png"]
    assert scripted.batches == [[10], [12], [13], [11]]


def test_a_picture_from_a_pipe(omniops, fails, scripted, pictures, monkeypatch):
    (path,) = pictures([(20, 10)])
    data = pathlib.Path(path).read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    run, results = _run(omniops, "-")
    assert (run.status, run.err) == (0, "")
    assert run.out.startswith("stdin -> out/stdin.jpg: 1 person\n")
    assert [result["file_name"] for result in results] == ["stdin"]
    assert Image.open("out/stdin.jpg").size == (20, 10)
    assert fails("detect", "-", path, "--random-weights", status=2).endswith(
        "- is a picture from stdin, and is read alone"
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data[:20])))
    run, results = _run(omniops, "-", "--overwrite")
    assert run.status == 1
    assert "stdin" in run.err.splitlines()[0]
    assert results == []


def test_without_a_picture_it_says_how_to_name_one(fails):
    assert "--files-from" in fails("detect", "--random-weights", status=2)
    assert "nothing there is called no*.png" in fails("detect", "no*.png", "--random-weights", status=2)


@pytest.mark.parametrize("error", [RuntimeError("it is too large"), FloatingPointError("no finite numbers")])
def test_what_goes_wrong_with_one_of_a_batch_is_its_own(omniops, scripted, pictures, error):
    paths = pictures([(20, 10), (21, 10), (20, 10), (20, 10)])
    scripted.failures[21] = error
    run, results = _run(omniops, *paths, "--batch", "4")
    assert run.status == 1
    why, last = run.err.splitlines()
    assert why.startswith("omniops: error: ")
    assert str(error) in why
    assert last == "omniops: error: 1 of 4 images failed"
    assert [result["file_name"] for result in results] == ["0.png", "2.png", "3.png"]


def test_a_picture_that_is_none_takes_no_other_along(omniops, scripted, pictures):
    paths = pictures([(20, 10)] * 4)
    with open(paths[1], "w") as file:
        file.write("no picture")
    run, results = _run(omniops, *paths, "--batch", "2")
    assert run.status == 1
    assert "1.png" in run.err
    assert [result["file_name"] for result in results] == ["0.png", "2.png", "3.png"]
    assert scripted.batches == [[20], [20, 20]]


def test_batches_shrink_where_memory_does_not_suffice(omniops, scripted, pictures):
    paths = pictures([(20, 10)] * 12)
    scripted.failures[4000] = torch.OutOfMemoryError("out of memory")
    run, results = _run(omniops, *paths, "--batch", "4")
    assert (run.status, run.err, len(results)) == (0, "", 12)
    assert [len(batch) for batch in scripted.batches] == [4, 1, 1, 1, 1, 2, 2, 2, 2]
    assert run.notes[-1] == "omniops: 4 pictures at once take more memory than there is: going on with 2\n"


def test_an_interrupt_in_a_batch_keeps_those_before(omniops, scripted, pictures):
    paths = pictures([(20, 10)] * 4 + [(30, 10)] * 4)
    scripted.failures[30] = KeyboardInterrupt()
    run, results = _run(omniops, *paths, "--batch", "4")
    assert run.status == 130
    assert run.err == "omniops: error: interrupted: 4 of 8 images were done\n"
    assert [result["file_name"] for result in results] == paths[:4]
    assert sorted(os.listdir("out")) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "detections.json"]


def test_reading_ahead_is_bounded(omniops, scripted, pictures, monkeypatch):
    paths = pictures([(20, 10)] * 40)
    read, names, lock = detect.read_picture, [], threading.Lock()

    def count(path, data=None):
        with lock:
            names.append(path.name)
        return read(path)

    monkeypatch.setattr(detect, "read_picture", count)
    monkeypatch.setattr(detect.os, "cpu_count", lambda: 2)
    counts = []

    def detector(images):
        if not counts:
            deadline = monotonic() + 20
            while len(names) < 6 and monotonic() < deadline:  # that is beside the detector
                sleep(0.01)
            sleep(0.1)
            counts.append(len(names))
        return scripted(images)

    monkeypatch.setattr(detect, "load_detector", lambda *args, **kwargs: detector)
    run, _ = _run(omniops, *paths, "--batch", "2")
    assert run.status == 0
    # A batch, and as many more as there are threads and pictures in a batch.
    assert counts == [6]


def test_a_batch_of_none_is_refused(omniops, pictures):
    result = omniops("detect", *pictures([(9, 9)]), "--random-weights", "--batch", "0")
    assert result.status == 2
    assert "Invalid value for '--batch'" in result.err
