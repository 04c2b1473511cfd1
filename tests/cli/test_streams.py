"""Every command in a process of its own: results on stdout, notes on stderr, and with --quiet no notes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")
pytest.importorskip("av", reason="of the extra sam2")
pytest.importorskip("flask", reason="of the extra server")

from coco_dataset import dataset as dataset
from segment_files import write_video
from server.running import free_port

from omniops.cli.app import COMMANDS

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
MAIN = "from omniops.cli import main; main()"
TINY_DETECTORS = "import tiny_detectors; tiny_detectors.replace(); "
TABLE = (r"  .*", r" ─+ ")
RANDOM = "loading mask-rcnn-r50-carafe, with random weights: what it finds means nothing"


class Example(NamedTuple):
    """A run of a command: each line of stdout is of one of ``lines``, and each of these is there; notes likewise."""

    arguments: str
    lines: tuple[str, ...]
    notes: tuple[str, ...] = ()
    before: str = ""


EXAMPLES = {
    "doctor": Example(
        "", (*TABLE, r" (python|omniops|\w.*?)  +\S.*", r"Enabled in this process.*|\S.*\.|\S.* not installed: .*")
    ),
    "selftest": Example(
        "--only connected_components --device cpu",
        (*TABLE, r"omniops .*, torch .*; .*; cpu: .*", r"All \d+ results are right in \d+ runs\."),
    ),
    "bench": Example(
        "connected_components --quick --device cpu --seconds 0",
        (
            *TABLE,
            r".*: a copy reads and writes \d+ GB/s",
            r"connected_components \(2, 1, 24, 40\): ms .*",
            r"connected_components \(1, 1, 32, 32\): microseconds of the *",
            r"(times|host) .*",
        ),
    ),
    "bench sam2": Example(
        "picture.png --devices cpu --image-size 64 --seconds 0",
        (*TABLE, r"cpu: .*", r"SAM 2\.1 tiny, 164 x 170 pixels: medians.*"),
        ("loading SAM 2",),
    ),
    "demo": Example("picture.png --steps 2 --device cpu --out demo.png", (*TABLE, r"Wrote demo\.png")),
    "detect": Example(
        "picture.png other.png --random-weights --device cpu --out found --batch 2",
        (
            r"(picture|other)\.png -> found/(picture|other)\.jpg: .*",
            r"Wrote \d+ detections in 2 pictures to found/detections\.json",
        ),
        ("loading PyTorch and torchvision", RANDOM, "looking at 2 pictures"),
        TINY_DETECTORS,
    ),
    "detect-eval": Example(
        "--images {dataset}/images --annotations {dataset}/annotations.json --random-weights --device cpu",
        (*TABLE, r"  +5 images, mask-rcnn-r50-carafe, .*", r"  (boxes|masks) +[\d.].*"),
        (RANDOM,),
        TINY_DETECTORS,
    ),
    "detect-train": Example(
        "--images {dataset}/images --annotations {dataset}/annotations.json --random-weights --device cpu --epochs 1 "
        "--min-size 64 --max-size 96 --workers 0 --hold-out 0.2 --out trained",
        (r"epoch 1/1: loss [\d.]+ .*", r"Wrote trained/last\.pth, .*"),
        (
            "loading mask-rcnn-r50-carafe with random weights",
            r"training on 4 pictures with \d+ objects of 3 categories, and judging by 1, on .*",
            r"left out are \d+ crowds",
        ),
        TINY_DETECTORS,
    ),
    "segment": Example(
        "picture.png --random-weights --image-size 64 --device cpu --point 40,40 --out cut.png",
        (r".*cut\.png.*", r".+"),  # tests/cli/segment has the words
        (r".+",),
    ),
    "export": Example(
        "tiny --random-weights --image-size 64 --part memory-encoder --out encoder.pt",
        (r"Wrote encoder\.pt, [\d.]+ MB", r"  takes   pix_feat float32 .*", r"  .*"),
        (
            "loading PyTorch",
            "loading SAM 2, tiny, with random weights: its masks mean nothing",
            "writing encoder.pt",
        ),
    ),
}
OF_THEIR_OWN = {"serve"}
_MEANS_NOTHING = r"The weights are random: these masks mean nothing\."
_LOADING = ("loading PyTorch", "loading SAM 2, tiny, with random weights: its masks mean nothing")
SEGMENT = {
    "many": Example(
        "picture.png other.png",
        (
            r"(picture|other)\.png -> out/(picture|other)\.png: 1 object",
            r"2 pictures in .+ s, .+ pictures/s, on .+",
            _MEANS_NOTHING,
            r"Wrote what was found to out",
        ),
        (*_LOADING, "segmenting 2 pictures"),
    ),
    "video": Example(
        "v.mp4",
        (r"6 of 6 frames in .+ s, .+ frames/s, on .+", _MEANS_NOTHING, r"Wrote out\.mp4 and out\.json"),
        (*_LOADING, "following 1 object through 6 frames"),
    ),
    "live": Example(
        "-",
        (
            r"6 frames in .+ s, .+ frames/s, 0 dropped, latency .+ s, on .+",
            _MEANS_NOTHING,
            r"Wrote out\.mp4 and out\.jsonl",
        ),
        (*_LOADING, "following stdin, 48 x 32, until Ctrl-C"),
    ),
}
"""Whatever segment is given."""


@pytest.fixture
def folder(tmp_path):
    """Where the commands run."""
    for seed, name in enumerate(("picture.png", "other.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (170, 164, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def _start(folder, *arguments, before="", stdin=subprocess.DEVNULL):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OMNIOPS_", "SAM2_"))}
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *arguments],
        cwd=folder,
        env={**keep, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def _run(folder, *arguments, before="", stdin=subprocess.DEVNULL):
    with _start(folder, *arguments, before=before, stdin=stdin) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _require(text, patterns):
    """Each line that is not blank is of a pattern, and each pattern that of a line."""
    lines = [line for line in text.splitlines() if line.strip()]
    others = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in patterns)]
    assert not others, "\n".join(others)
    missing = [pattern for pattern in patterns if not any(re.fullmatch(pattern, line) for line in lines)]
    assert not missing, f"{missing} in\n{text}"


def test_every_command_has_an_example():
    assert EXAMPLES.keys() | OF_THEIR_OWN == COMMANDS.keys()


@pytest.mark.parametrize("command", EXAMPLES)
def test_results_are_on_stdout_and_notes_on_stderr(command, folder, dataset):
    example = EXAMPLES[command]
    arguments = [*command.split(), *example.arguments.format(dataset=dataset).split()]
    (folder / "loud").mkdir()
    (folder / "quiet").mkdir()
    for name in ("picture.png", "other.png"):
        for run in ("loud", "quiet"):
            os.link(folder / name, folder / run / name)
    status, out, err = _run(folder / "loud", *arguments, before=example.before)
    assert status == 0, err
    _require(out, example.lines)
    _require(err, [f"omniops: (?!error){note}" for note in example.notes])
    status, out, err = _run(folder / "quiet", *arguments, "--quiet", before=example.before)
    assert (status, err) == (0, "")
    _require(out, example.lines)


@pytest.mark.parametrize("more", [(), ("--quiet",)])
@pytest.mark.parametrize("given", SEGMENT)
def test_of_segment_whatever_it_is_given(folder, given, more):
    write_video(folder / "v.mp4")
    example = SEGMENT[given]
    out = "out" if given == "many" else "out.mp4"
    prompt = ("--point", "20,10", "--random-weights", "--image-size", "64", "--device", "cpu", "--out", out)
    with (folder / "v.mp4").open("rb") as stdin:
        status, out, err = _run(folder, "segment", *example.arguments.split(), *prompt, *more, stdin=stdin)
    assert status == 0, err
    _require(out, example.lines)
    _require(err, [] if more else [f"omniops: {note}" for note in example.notes])


@pytest.mark.parametrize("more", [(), ("--quiet",)])
def test_json_is_all_of_stdout(folder, more):
    status, out, err = _run(folder, "doctor", "--json", "-", *more)
    assert (status, err) == (0, "")
    assert "torchvision" in json.loads(out)["packages"]


@pytest.mark.parametrize("more", [(), ("--quiet",)])
def test_serving(folder, more):
    port = str(free_port())
    arguments = ["serve", "--random-weights", "--image-size", "64", "--device", "cpu", "--port", port, *more]
    with _start(folder, *arguments) as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert lines[0] == f"SAM 2 is served at http://127.0.0.1:{port} - Ctrl-C ends it\n"
    assert re.fullmatch(r"ready: .+, \w+, SAM 2 tiny at 64 x 64\n", lines[1])
    assert out == ""
    notes = (
        "no FOLDER was given: the gallery shows a sample clip",
        "loading SAM 2, tiny, with random weights: its masks mean nothing",
    )
    _require(err, [] if more else [f"omniops: {note}" for note in notes])


@pytest.mark.parametrize("command", ["detect", "detect-eval"])
def test_what_fails_is_said_even_quietly(folder, dataset, command):
    (folder / "other.png").write_bytes((folder / "other.png").read_bytes()[:500])
    annotations = json.loads((dataset / "annotations.json").read_text())
    for image, name in zip(annotations["images"], ("picture.png", "other.png"), strict=False):
        image.update(file_name=name, width=164, height=170)
    (folder / "annotations.json").write_text(
        json.dumps({**annotations, "images": annotations["images"][:2], "annotations": []})
    )
    sources = {
        "detect": ["picture.png", "other.png", "--out", "found"],
        "detect-eval": ["--images", ".", "--annotations", "annotations.json"],
    }[command]
    arguments = [command, *sources, "--random-weights", "--device", "cpu", "--quiet"]
    status, out, err = _run(folder, *arguments, before=TINY_DETECTORS)
    assert status == 1
    why, last = err.splitlines()
    assert why.startswith("omniops: error: cannot read other.png: ")
    assert last == "omniops: error: 1 of 2 images failed"
    assert "omniops:" not in out
    assert "1 pictures" in out or "1 images" in out
