"""Folders of people's own pictures, and animations: every picture is a frame, upright, or is refused by name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from omniops.sam2 import animation, picture_files
from omniops.sam2.frames import FrameError, Frames
from omniops.sam2.picture_files import is_animation

RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def corners(size=(12, 8)) -> Image.Image:
    """A colour in name corner but one: like none of its turns or mirrors."""
    picture = Image.new("RGB", size)
    half = size[0] // 2, size[1] // 2
    picture.paste(RED, (0, 0, *half))
    picture.paste(GREEN, (half[0], 0, size[0], half[1]))
    picture.paste(BLUE, (0, half[1], half[0], size[1]))
    return picture


def orientation_is(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp"])
def test_pictures_of_a_folder_are_upright(tmp_path, ending, turn):
    more = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(ending, {})
    path = tmp_path / f"1{ending}"
    corners((32, 16)).save(path, exif=orientation_is(turn), **more)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    frames = Frames(tmp_path)
    assert (frames.height, frames.width) == expected.shape[:2] == ((32, 16) if 5 <= turn <= 8 else (16, 32))
    assert np.array_equal(frames[0], expected)
    small = Image.fromarray(expected).resize((8, 8))
    assert np.array_equal(frames.resized(0, 8), np.asarray(small))


def test_png_with_exif_after_its_pixels(tmp_path):
    path = tmp_path / "1.png"
    corners().save(path, exif=orientation_is(6))
    data = path.read_bytes()
    offset = data.index(b"eXIf") - 4
    size = 12 + int.from_bytes(data[offset : offset + 4], "big")
    without = data[:offset] + data[offset + size :]
    end = without.index(b"IEND") - 4
    path.write_bytes(without[:end] + data[offset : offset + size] + without[end:])
    frames = Frames(tmp_path)
    assert (frames.height, frames.width) == (12, 8)
    assert np.array_equal(frames[0], np.rot90(np.asarray(corners()), -1))


def test_pictures_of_one_size_once_they_are_upright(tmp_path):
    corners((12, 8)).save(tmp_path / "1.jpg")
    corners((8, 12)).save(tmp_path / "2.jpg", exif=orientation_is(8))
    assert len(Frames(tmp_path)) == 2
    corners((12, 8)).save(tmp_path / "3.jpg", exif=orientation_is(8))
    with pytest.raises(ValueError, match=r"of one size, got 8x12 in .*3.jpg"):
        Frames(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1.png", "2.png", "3.png", "1.jpg"], r"several kinds, 1 \.jpg, 2 \.png \(2\.png and 1\.jpg are two\)"),
        (["1.png", "2.webp"], r"several kinds, 1 \.png, 1 \.webp"),
        (["1.jpg", "2.dng"], r"several kinds, 1 \.dng, 1 \.jpg"),
        (["1.jxl"], r"1\.jxl is a picture of a kind that is not read"),
    ],
)
def test_a_folder_of_several_kinds_is_refused(tmp_path, names, said):
    for name in names:
        corners().save(tmp_path / name, format="PNG")
    with pytest.raises(ValueError, match=said):
        Frames(tmp_path)


@pytest.mark.parametrize("names", [["1.jpg", "2.JPEG", "3.jfif"], ["1.tif", "2.TIFF"], ["1.pgm", "2.ppm"]])
def test_one_kind_may_have_several_endings(tmp_path, names):
    for name in names:
        corners().save(tmp_path / name, format="PPM" if "p" in name[2:4] and "j" not in name.lower() else "PNG")
    (tmp_path / "readme.txt").write_text("no picture")
    assert len(Frames(tmp_path)) == len(names)


COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
ANIMATIONS = {
    "a.gif": {"duration": [100, 50, 200, 40, 100], "loop": 0},
    "a.png": {"duration": [100, 50, 200, 40, 100]},
    "a.webp": {"duration": [100, 50, 200, 40, 100], "lossless": True},
    "a.tif": {},
}
if features.check("avif"):
    ANIMATIONS["a.avif"] = {"duration": [100, 50, 200, 40, 100], "quality": 100, "subsampling": "4:4:4"}


def animate(path: Path, **more) -> Path:
    first, *rest = [Image.new("RGB", (16, 10), colour) for colour in COLOURS]
    first.save(path, save_all=True, append_images=rest, **more)
    return path


@pytest.mark.parametrize("name", ANIMATIONS)
def test_all_frames_of_an_animation(tmp_path, monkeypatch, name):
    path = animate(tmp_path / name, **ANIMATIONS[name])
    assert is_animation(path)
    frames = Frames(path)
    assert (len(frames), frames.height, frames.width) == (5, 10, 16)
    for memory in (2**20, 0):
        monkeypatch.setattr(animation, "MAX_DECODED_BYTES", memory)
        for i in (0, 1, 2, 3, 4, 2, 0, 4, -1):
            assert np.abs(frames[i].astype(int) - COLOURS[i]).max() <= 6
            assert np.abs(frames.resized(i, 8).astype(int) - COLOURS[i]).max() <= 6
    if name == "a.tif":
        assert (frames.times, frames.fps) == (None, None)
    else:
        assert frames.times == pytest.approx([0, 0.1, 0.15, 0.35, 0.39], abs=0.011)
        assert frames.fps == pytest.approx(5 / 0.49, rel=0.03)


@pytest.mark.parametrize("name", ANIMATIONS)
def test_an_animation_in_a_folder_is_refused_by_name(tmp_path, name):
    animate(tmp_path / name, **ANIMATIONS[name])
    with pytest.raises(ValueError, match=rf"{name} is an animation or has several pages, not one frame"):
        Frames(tmp_path)


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp", "p.tif", "p.jpg", "p.bmp", "p.ppm"])
def test_a_picture_alone_is_a_video_of_one_frame(tmp_path, name):
    corners().save(tmp_path / name)
    assert not is_animation(tmp_path / name)
    frames = Frames(tmp_path / name)
    assert (len(frames), frames.fps, frames.times, frames.time_base) == (1, None, None, None)
    assert (frames[0][0, 0] > 200).tolist() == [True, False, False]


@pytest.mark.parametrize("turn", [1, 6, 7])
def test_a_photograph_is_turned_as_its_camera_was(tmp_path, turn):
    path = tmp_path / "a.JPG"
    corners((12, 8)).save(path, exif=orientation_is(turn), quality=95, subsampling=0)
    frames = Frames(path)
    with Image.open(path) as picture:
        assert np.array_equal(frames[0], np.asarray(ImageOps.exif_transpose(picture)))
    assert (frames.height, frames.width) == frames[0].shape[:2]


def test_photographs_of_several_pictures_are_no_animations(tmp_path):
    corners().save(tmp_path / "1.jpg", format="MPO", save_all=True, append_images=[corners((6, 4))])
    with Image.open(tmp_path / "1.jpg") as picture:
        assert picture.n_frames == 2
    assert not is_animation(tmp_path / "1.jpg")
    assert len(Frames(tmp_path)) == len(Frames(tmp_path / "1.jpg")) == 1


def test_an_animation_that_breaks_off(tmp_path):
    path = animate(tmp_path / "a.png", duration=100)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"fdAT") + 12])
    with pytest.warns(UserWarning, match=r"a.png breaks off after 4 of 5 frames") as caught:
        frames = Frames(path)
    assert caught[0].filename == __file__
    assert [frame[0, 0].tolist() for frame in frames] == [list(colour) for colour in COLOURS[:4]]
    path.write_bytes(content[: content.index(b"IDAT") + 6])
    with pytest.raises(ValueError, match=r"a.png has no frame that can be decoded"):
        Frames(path)


def test_pages_of_different_sizes(tmp_path):
    corners().save(tmp_path / "a.tif", save_all=True, append_images=[corners((6, 4))])
    with pytest.raises(ValueError, match=r"of one size, got 6x4 in page 1 and 12x8 in page 0 of .*a.tif"):
        Frames(tmp_path / "a.tif")


HEIF = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize("in_folder", [True, False])
def test_heif_without_pillow_heif_names_it(tmp_path, monkeypatch, in_folder):
    (tmp_path / "1.heic").write_bytes(HEIF)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    picture_files.register_heif.cache_clear()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("HEIF", "AVIF")])
    with pytest.raises(ValueError, match=r"1\.heic cannot be read .*pip install 'omniops\[heif\]'"):
        Frames(tmp_path if in_folder else tmp_path / "1.heic")
    picture_files.register_heif.cache_clear()


def test_heif_with_pillow_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="the extra heif")
    heif.from_pillow(corners((64, 32))).save(tmp_path / "1.heic", quality=95)
    for source in (tmp_path, tmp_path / "1.heic"):
        frames = Frames(source)
        assert (len(frames), frames.height, frames.width) == (1, 32, 64)
        assert np.abs(frames[0].astype(int) - np.asarray(corners((64, 32)))).mean() < 8


def test_pictures_are_not_decoded_to_learn_their_size(tmp_path, monkeypatch):
    for i in range(3):
        corners().save(tmp_path / f"{i}.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Frames(tmp_path)) == 3


def test_a_link_to_nothing_is_not_left_out(tmp_path):
    corners().save(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"2\.png cannot be read: No such file or directory"):
        Frames(tmp_path)


def test_a_frame_that_vanished(tmp_path):
    corners().save(tmp_path / "1.png")
    frames = Frames(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(FrameError, match=r"1\.png cannot be read"):
        frames[0]
