"""What was found, as files, read again by what reads such files."""

from __future__ import annotations

import io
import json
import os
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from video_files import picture, write_clip

pytest.importorskip("av", reason="videos need PyAV")

import av
from pycocotools import mask as coco

from omniops.drawing import colour_of
from omniops.sam2 import rle
from omniops.sam2.frames import Frames
from omniops.server import downloads as module
from omniops.server import jobs as jobs_module
from omniops.server.downloads import Download, Downloads
from omniops.server.errors import ServerError
from omniops.server.jobs import Cancelled, Jobs
from omniops.server.settings import Settings

WIDTH, HEIGHT, COUNT = 320, 240, 6
FORMATS = [("coco", None), ("png", None), ("overlay", None), ("overlay", "webm"), ("cutout", None)]


def mask_of(frame: int, number: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    if number == 0:
        mask[20:200, 20 + 10 * frame : 220 + 10 * frame] = True
    else:
        mask[60:120, 60 + 10 * frame : 120 + 10 * frame] = True  # inside of the other
    return mask


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    return write_clip(folder / "clip.mp4", COUNT, size=(WIDTH, HEIGHT), options={"crf": "5"}, rate=12)


def session_of(path: Path, name="gallery/a/my clip.mp4", frames=range(COUNT), **more) -> SimpleNamespace:
    found = {i: {k: rle.encode(mask_of(i, k))["counts"] for k in (7, 0)} for i in frames}
    values = {"path": path, "name": name, "width": WIDTH, "height": HEIGHT, "names": {7: "ball"}, "found": found}
    return SimpleNamespace(**{**values, "is_picture": False, **more})


@pytest.fixture
def downloads(tmp_path) -> Downloads:
    return Downloads(Settings(data=tmp_path), Jobs())


def content(made: Download) -> bytes:
    with made.file as file:
        data = file.read()
    assert len(data) == made.size
    return data


def left(downloads: Downloads) -> list[Path]:
    return list(downloads._folder.glob("*"))


def test_coco(clip, downloads):
    made = downloads.make(session_of(clip), "coco")
    assert (made.type, made.name) == ("application/json", "my clip-coco.json")
    records = json.loads(content(made))
    assert [(record["frame"], record["id"]) for record in records] == [(i, k) for i in range(COUNT) for k in (7, 0)]
    for record in records:
        mask = mask_of(record["frame"], record["id"])
        assert np.array_equal(coco.decode(record["segmentation"]), mask)
        assert record["area"] == mask.sum()
        assert record["time"] == pytest.approx(record["frame"] / 12, abs=1e-3)
        assert record.get("name") == ("ball" if record["id"] == 7 else None)
    assert left(downloads) == []


def test_masks(clip, downloads):
    session = session_of(clip, frames=[1, 3])
    session.names[0] = "../x/\\y: ☃"
    made = downloads.make(session, "png")
    assert (made.type, made.name) == ("application/zip", "my clip-png.zip")
    with zipfile.ZipFile(io.BytesIO(content(made))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == ["7-ball/00001.png", "0-x_y/00001.png", "7-ball/00003.png", "0-x_y/00003.png"]
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as mask:
                assert mask.mode == "L"
                expected = mask_of(int(name[-9:-4]), int(name[0]))
                assert np.array_equal(np.asarray(mask), expected * 255)


@pytest.mark.parametrize("kind", [None, "mp4", "webm"])
def test_overlay(clip, tmp_path, downloads, kind):
    made = downloads.make(session_of(clip, frames=range(3)), "overlay", kind)
    suffix = kind or "mp4"
    assert (made.type, made.name) == (f"video/{suffix}", f"my clip-overlay.{suffix}")
    path = tmp_path / made.name
    path.write_bytes(content(made))
    frames, source = Frames(path), Frames(clip)
    assert len(frames) == COUNT
    assert frames.times == pytest.approx(source.times, abs=2e-3)
    for i in range(COUNT):
        expected = source[i].astype(int)
        if i < 3:
            for k in (0, 7):  # the smaller one on top
                mask = mask_of(i, k)
                expected[mask] = source[i][mask] // 2 + np.array(colour_of(k)) // 2
        assert np.abs(frames[i].astype(int) - expected).mean() < 4


def test_cutout_on_black_where_there_is_no_transparency(clip, tmp_path, downloads):
    made = downloads.make(session_of(clip, frames=range(3)), "cutout", "mp4")
    assert (made.type, made.name) == ("video/mp4", "my clip-cutout.mp4")
    path = tmp_path / made.name
    path.write_bytes(content(made))
    frames, source = Frames(path), Frames(clip)
    assert len(frames) == COUNT
    for i in range(COUNT):
        inside = mask_of(i, 0) | mask_of(i, 7) if i < 3 else np.zeros(source[i].shape[:2], bool)
        expected = np.where(inside[..., None], source[i], 0).astype(int)
        assert np.abs(frames[i].astype(int) - expected).mean() < 4


def test_cutout(clip, tmp_path, downloads):
    made = downloads.make(session_of(clip, frames=range(4)), "cutout")
    assert (made.type, made.name) == ("video/webm", "my clip-cutout.webm")
    path = tmp_path / made.name
    path.write_bytes(content(made))
    decoder = av.CodecContext.create("libvpx-vp9", "r")  # FFmpeg's own knows no transparency
    with av.open(str(path)) as container:
        found = [frame for packet in container.demux(video=0) if packet.size for frame in decoder.decode(packet)]
    assert len(found) == COUNT
    source = Frames(clip)
    for i, frame in enumerate(found):
        pixels = frame.to_ndarray(format="rgba").astype(int)
        inside = mask_of(i, 0) if i < 4 else np.zeros((HEIGHT, WIDTH), bool)
        assert np.abs(pixels[..., 3] - inside * 255).mean() < 3
        if i < 4:
            assert np.abs(pixels[inside][:, :3] - source[i][inside]).mean() < 6
            assert pixels[:5, :5, :3].max() < 20  # what is far from it is not in the file


def test_an_edge_of_its_own_colours():
    mask = np.zeros((60, 80), bool)
    mask[0, 0] = mask[30, 40] = mask[59, 70:] = True
    for by in (1, 2, 3, 8):
        grown = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * by + 1))
        assert np.array_equal(module._dilated(mask, by), np.asarray(grown) > 0)


def test_pictures(tmp_path, downloads):
    path = tmp_path / "photo.png"
    pixels = picture(5, WIDTH, HEIGHT)
    Image.fromarray(pixels).save(path)
    name = "uploads/" + "ab" * 32 + ".png"
    session = session_of(path, name, frames=[0], is_picture=True)
    records = json.loads(content(downloads.make(session, "coco")))
    keys = {"id", "segmentation", "area"}
    assert [set(record) for record in records] == [{*keys, "name"}, keys]
    with zipfile.ZipFile(io.BytesIO(content(downloads.make(session, "png")))) as archive:
        assert archive.namelist() == ["7-ball.png", "0.png"]
    made = downloads.make(session, "cutout", "png")
    assert (made.type, made.name) == ("image/png", "upload-abababab-cutout.png")
    with Image.open(io.BytesIO(content(made))) as cut:
        inside = mask_of(0, 0)
        assert np.array_equal(np.asarray(cut)[..., 3], inside * 255)
        assert np.array_equal(np.asarray(cut)[..., :3], np.where(inside[..., None], pixels, 0))
    with Image.open(io.BytesIO(content(downloads.make(session, "overlay")))) as shown:
        expected = pixels.copy()
        for k in (0, 7):
            expected[mask_of(0, k)] = pixels[mask_of(0, k)] // 2 + np.array(colour_of(k), np.uint8) // 2
        assert np.array_equal(np.asarray(shown), expected)


@pytest.mark.parametrize(
    ("format", "kind", "is_picture", "words"),
    [
        ("gif", None, False, "format must be coco, png, overlay or cutout"),
        ("", None, False, "format must be"),
        ("overlay", "avi", False, "as must be mp4, webm or png"),
        ("overlay", "png", False, "A video is written as mp4 or webm"),
        ("overlay", "mp4", True, "A picture is written as png"),
        ("cutout", "webm", True, "A picture is written as png"),
    ],
)
def test_what_there_is_not(clip, downloads, format, kind, is_picture, words):
    with pytest.raises(ServerError, match=words) as caught:
        downloads.make(session_of(clip, is_picture=is_picture), format, kind)
    assert caught.value.status == 400


@pytest.mark.parametrize(("format", "kind"), FORMATS)
def test_nothing_was_found(clip, downloads, format, kind):
    with pytest.raises(ServerError, match="Nothing was found yet"):
        downloads.make(session_of(clip, frames=[]), format, kind)


@pytest.mark.parametrize(("format", "kind"), [case for case in FORMATS if case[0] != "png"])
def test_the_video_is_gone(tmp_path, downloads, format, kind):
    with pytest.raises(ServerError, match=r"^The video cannot be read any more.$"):
        downloads.make(session_of(tmp_path / "nothing.mp4"), format, kind)
    assert left(downloads) == []


@pytest.mark.parametrize(("format", "kind"), FORMATS)
def test_progress_and_who_goes_away(clip, downloads, monkeypatch, format, kind):
    monkeypatch.setattr(jobs_module, "_LOOK_AGAIN", 0.001)
    content(downloads.make(session_of(clip), format, kind, key="k"))
    assert downloads.jobs.progress("k").as_json() == {"done": COUNT, "total": COUNT, "what": "writing"}
    update = jobs_module.Progress.update

    def slow(self, *arguments):
        time.sleep(0.02)
        update(self, *arguments)

    monkeypatch.setattr(jobs_module.Progress, "update", slow)
    with pytest.raises(Cancelled):
        downloads.make(session_of(clip), format, kind, key="k", gone=lambda: downloads.jobs.progress("k").done > 1)
    assert 1 < downloads.jobs.progress("k").done < COUNT
    assert left(downloads) == []


def test_files_that_nobody_took(clip, downloads):
    downloads._folder.mkdir(parents=True)
    old, new = downloads._folder / ".made-old.mp4", downloads._folder / ".made-new.mp4"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 9999,) * 2)
    content(downloads.make(session_of(clip), "coco"))
    assert left(downloads) == [new]


def test_what_changes_meanwhile_does_not_matter(clip, downloads):
    session = session_of(clip)
    made = []
    threads = [threading.Thread(target=lambda: made.append(content(downloads.make(session, "coco")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
