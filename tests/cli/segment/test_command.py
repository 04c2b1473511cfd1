"""omniops segment: wrong use, all of it before the model is loaded, and the names of files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="needs PyAV")

from segment_files import read_json, run, write_picture, write_video

from omniops import sam2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to look for"),
        (("--everything", "--point", "1,2"), "--everything takes no --point and no --box"),
        (("--everything", "--box", "1,2,3,4"), "--everything takes no --point and no --box"),
        (("--point", "40,3"), "--point 40,3: it is outside: PICTURE has 40 x 30 pixels"),
        (("--point", "-1,3"), "--point -1,3: it is outside"),
        (("--point", "nan,3"), "--point nan,3: it is outside"),
        (("--point", "1,2@0"), "is a picture, which has no frames"),
        (("--point", "1,2,2"), "--point must be X,Y or X,Y,LABEL, with LABEL 1 or 0, then @FRAME"),
        (("--point", "1"), "got '1'"),
        (("--point", "one,2"), "got 'one,2'"),
        (("--point", "1,2#0"), "got '1,2#0'"),
        (("--point", "1,2@x"), "got '1,2@x'"),
        (("--point", ""), "got ''"),
        (("--point", "1,2,0"), "object 1 is only told where it is not"),
        (("--point", "1,2", "--point", "1,2,0#2"), "object 2 is only told where it is not"),
        (("--box", "1,2,3"), "--box must be X0,Y0,X1,Y1, then @FRAME"),
        (("--box", "30,2,10,20"), "it is inside out"),
        (("--box", "3,20,10,20"), "it is inside out"),
        (("--box", "3,2,41,20"), "--box 3,2,41,20: it is outside: PICTURE has 40 x 30 pixels"),
        (
            ("--box", "1,2,3,4", "--box", "1,2,5,6"),
            "--box 1,2,5,6: object 1 has a box there: for another object add #2",
        ),
        (("--point", "1,2", "--image-size", "100"), "--image-size must be a positive multiple of 32, got 100"),
        (("--point", "1,2", "--out", "masks.jpg"), "cannot write masks.jpg: what is made of PICTURE ends with .png"),
        (("--point", "1,2", "--out", ".png"), "--out .png: a name is missing before .png"),
        (("--point", "1,2", "--out", "/"), "cannot write /: what is made of PICTURE ends with .png"),
        (("--point", "1,2", "--out", ""), "cannot write .: what is made of PICTURE ends with .png"),
        (("--point", "inf,2"), "--point inf,2: it is outside"),
        (("--box", "nan,2,3,4"), "--box nan,2,3,4: it is inside out"),
        (("--box", "1,2,inf,4"), "--box 1,2,inf,4: it is outside"),
        (("--point", "1,2", "--device", "foo"), "unknown device 'foo'"),
        (
            ("--point", "1,2", "--random-weights", "--model", "x.pt"),
            "--model tiny, small, base-plus, large; got 'x.pt'",
        ),
    ],
)
def test_wrong_use_of_a_picture(fails, never_loaded, tmp_path, monkeypatch, arguments, reason):
    path = write_picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert reason.replace("PICTURE", str(path)) in fails("segment", str(path), *arguments, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--point", "1,2@6"), "--point 1,2@6: VIDEO has 6 frames, the first of which is 0"),
        (("--box", "1,2,3,4@99"), "--box 1,2,3,4@99: VIDEO has 6 frames"),
        (("--point", "48,2"), "--point 48,2: it is outside: VIDEO has 48 x 32 pixels"),
        (("--point", "1,2,0@1", "--point", "1,2@3"), "object 1 is only told where it is not"),
        (("--everything",), "--everything is for pictures"),
        (
            ("--point", "1,2", "--out", "masks.png"),
            "cannot write masks.png: what is made of VIDEO, which is no picture that Pillow can read, ends with .mp4",
        ),
    ],
)
def test_wrong_use_of_a_video(fails, never_loaded, tmp_path, monkeypatch, arguments, reason):
    path = write_video(tmp_path / "v.mp4")
    monkeypatch.chdir(tmp_path)
    assert reason.replace("VIDEO", str(path)) in fails("segment", str(path), *arguments, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_what_is_no_picture_and_no_video(fails, never_loaded, tmp_path):
    point = ("--point", "1,2", "--device", "cpu")
    assert fails("segment", str(tmp_path / "none.jpg"), *point, status=2).endswith(f"no such file: {tmp_path}/none.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    line = fails("segment", str(tmp_path / "text.jpg"), *point, status=2)
    assert f"{tmp_path}/text.jpg has no frame" in line or "text.jpg is not a video that FFmpeg can read" in line
    assert line.endswith("; nor is it a picture that Pillow can read")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4 is not a video" in fails("segment", str(tmp_path / "empty.mp4"), *point, status=2)
    (tmp_path / "frames").mkdir()
    assert "frames has no pictures" in fails("segment", str(tmp_path / "frames"), *point, status=2)
    damaged = write_picture(tmp_path / "a.png")
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert f"cannot read {damaged}" in fails("segment", str(damaged), *point, status=2)
    for i, size in enumerate([(40, 30), (30, 40)]):
        write_picture(tmp_path / "frames" / f"{i}.png", size)
    assert "must be of one size" in fails("segment", str(tmp_path / "frames"), *point, status=2)


def test_an_input_is_never_overwritten(fails, never_loaded, tmp_path):
    point = ("--point", "1,2", "--device", "cpu", "--out")
    picture, video = write_picture(tmp_path / "a.png"), write_video(tmp_path / "v.mp4")
    overlay = write_picture(tmp_path / "b-overlay.jpg")
    (tmp_path / "link.png").symlink_to(picture)
    before = {path: path.read_bytes() for path in (picture, video, overlay)}
    for source, out in ((picture, "a.png"), (picture, "link.png"), (overlay, "b.png"), (video, "v.mp4")):
        line = fails("segment", str(source), *point, str(tmp_path / out), status=2)
        assert line.endswith("would be overwritten: it is what is read, so --out must be another")
        fails("segment", str(source), *point, str(tmp_path / out), "--overwrite", status=2)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(("name", "theirs"), [
    ("p.png", ["out.png", "out.json", "out-overlay.jpg"]), ("v.mp4", ["out.mp4", "out.json", "out.jsonl"]),
])  # fmt: skip
def test_what_is_there_is_replaced_where_that_is_asked_for(omniops, fails, scripted, tracker, tmp_path, name, theirs):
    path = write_picture(tmp_path / name) if name == "p.png" else write_video(tmp_path / name)
    command = ("segment", str(path), "--point", "1,2", "--device", "cpu", "--out", str(tmp_path / theirs[0]))
    for file in theirs:
        (tmp_path / file).write_text("another's")
        line = fails(*command, status=2)
        assert line.endswith(f"{tmp_path / file} is there already: --overwrite replaces what is there")
        assert (tmp_path / file).read_text() == "another's"
        (tmp_path / file).unlink()
    for file in theirs:
        (tmp_path / file).symlink_to("nowhere")
    assert all(file in fails(*command, status=2) for file in theirs)
    for file in theirs:
        (tmp_path / file).unlink()
        (tmp_path / file).write_text("another's")
    assert omniops(*command, "--overwrite").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [name, *(file for file in theirs if not file.endswith(".jsonl"))]
    )
    assert len(read_json(tmp_path / "out.json")) == (1 if name == "p.png" else 6)


@pytest.mark.parametrize("everything", [False, True])
def test_random_weights_show_something_soon_and_are_named(omniops, tmp_path, everything):
    path, out = write_picture(tmp_path / "a.png", (300, 200)), tmp_path / "out.png"
    what = ("--everything",) if everything else ("--point", "1,2", "--image-size", "64")
    result = run(omniops, path, *what, "--random-weights", "--out", out)
    assert (result.status, result.err) == (0, "")
    assert any("random weights: its masks mean nothing" in note for note in result.notes)
    if everything:
        assert "masks of 16 points" in result.out
        assert "The weights are random" in result.out
        assert len(read_json(tmp_path / "out.json")) > 0
        assert np.array(Image.open(out)).any()


def test_results_that_cannot_be_written_are_refused_before_the_work(fails, never_loaded, tmp_path):
    path = write_picture(tmp_path / "a.png")
    point = ("segment", str(path), "--point", "1,2", "--device", "cpu", "--out")
    (tmp_path / "x-overlay.jpg").mkdir()
    assert "it is a folder" in fails(*point, str(tmp_path / "x.png"), status=2)
    (tmp_path / "y.json").mkdir()
    assert "it is a folder" in fails(*point, str(tmp_path / "y.png"), status=2)
    assert "cannot write" in fails(*point, str(path / "below.png"), status=2)


@pytest.mark.parametrize(
    ("module", "package"),
    [("huggingface_hub", "huggingface-hub"), ("safetensors", "safetensors"), ("av", "av"), ("PIL", "pillow")],
)
def test_a_missing_package_is_named_before_the_work(fails, never_loaded, monkeypatch, tmp_path, module, package):
    path = write_picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, module, None)
    line = fails("segment", str(path), "--point", "1,2", status=1)
    assert line.endswith(f"SAM 2 needs {package}, which is not installed: pip install 'omniops[sam2]'")


def test_a_module_of_sam_2_that_cannot_be_imported_is_named(fails, never_loaded, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "omniops.sam2.architectures", None)
    line = fails("segment", str(write_picture(tmp_path / "a.png")), "--point", "1,2", status=1)
    assert line.endswith("pip install --upgrade 'omniops[sam2]'")


def test_weights_that_are_missing_or_wrong(fails, monkeypatch, tmp_path):
    point = ("segment", str(write_picture(tmp_path / "a.png")), "--point", "1,2", "--device", "cpu")
    out = ("--out", str(tmp_path / "out.png"))
    missing = tmp_path / "none.pt"
    assert f"no checkpoint at {missing}" in fails(*point, *out, "--model", str(missing), status=2)
    (tmp_path / "text.pt").write_text("hello")
    assert "no checkpoint" in fails(*point, *out, "--model", str(tmp_path / "text.pt"), status=1)
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    assert "not a checkpoint of SAM 2" in fails(*point, *out, "--model", str(tmp_path / "other.pt"), status=1)
    names = []

    def unreachable(name, *args, **kwargs):
        names.append(name)
        raise ConnectionError("cannot fetch tiny: download it and put it there\nand more")

    monkeypatch.setattr(sam2, "load", unreachable)
    line = fails(*point, *out, status=1)
    assert line == "omniops: error: cannot fetch tiny: download it and put it there"
    assert names == ["tiny"]


def test_the_names_of_results_without_out(omniops, scripted, tracker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    assert run(omniops, write_picture(Path("in/a.png")), "--point", "1,2").status == 0
    assert run(omniops, write_video(Path("in/v.mp4")), "--point", "1,2").status == 0
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "omniops-mask-overlay.jpg", "omniops-mask.json", "omniops-mask.png", "omniops-video.json", "omniops-video.mp4",
    ]  # fmt: skip


def test_its_help_has_examples(omniops):
    result = omniops("segment", "--help")
    assert result.status == 0
    assert result.out.count("Example: omniops segment") == 5
    assert "[@FRAME][#OBJECT]" in result.out
