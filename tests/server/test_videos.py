"""The registry of what may be opened: the gallery, its posters, and paths that lead elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import HEIGHT, WIDTH, write_clip

pytest.importorskip("av", reason="videos need PyAV")

from omniops.sam2.frames import Frames
from omniops.server.errors import NotFound
from omniops.server.settings import Settings
from omniops.server.videos import Video, Videos


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def gallery(tmp_path) -> Path:
    folder = tmp_path / "gallery"
    folder.mkdir()
    return folder


@pytest.fixture
def videos(tmp_path, gallery) -> Videos:
    return Videos(Settings(data=tmp_path))


def names(found: list[Video]) -> list[str]:
    return [video.path for video in found]


def test_the_gallery_in_natural_order_with_its_folders(clip, gallery, videos):
    (gallery / "b").mkdir()
    for name in ("clip10.mp4", "clip2.mp4", "b/clip1.mp4", "A.mp4", ".hidden.mp4", "notes.txt", "clip.mov", "X.MP4"):
        shutil.copy(clip, gallery / name)
    expected = ["gallery/A.mp4", "gallery/b/clip1.mp4", "gallery/clip2.mp4", "gallery/clip10.mp4"]
    assert names(videos.videos()) == expected
    for video in videos.videos():
        assert (video.width, video.height, video.frames, video.fps, video.is_picture) == (WIDTH, HEIGHT, 6, 24, False)
        assert len(Frames(videos.find(video.path))) == video.frames
    assert videos.find("gallery/b/clip1.mp4") == gallery / "b/clip1.mp4"


def test_changes_are_noticed(clip, gallery, videos):
    assert videos.videos() == []
    shutil.copy(clip, gallery / "a.mp4")
    assert names(videos.videos()) == ["gallery/a.mp4"]
    shutil.copy(clip, gallery / "b.mp4")
    assert videos.find("gallery/b.mp4") == gallery / "b.mp4"  # before anyone asked for the list
    old = videos.videos()[0]
    write_clip(gallery / "a.mp4", count=9)
    new = videos.videos()[0]
    assert (old.frames, new.frames) == (6, 9)
    assert new.poster_path != old.poster_path
    (gallery / "a.mp4").unlink()
    with pytest.raises(NotFound):
        videos.find("gallery/a.mp4")
    assert names(videos.videos()) == ["gallery/b.mp4"]


def test_the_default(clip, tmp_path, gallery, videos):
    with pytest.raises(NotFound, match="There is no video in the gallery yet"):
        videos.default()
    for name in ("1.mp4", "2.mp4"):
        shutil.copy(clip, gallery / name)
    assert videos.default().path == "gallery/1.mp4"
    assert Videos(Settings(data=tmp_path, default_video="gallery/2.mp4")).default().path == "gallery/2.mp4"
    assert Videos(Settings(data=tmp_path, default_video="gallery/3.mp4")).default().path == "gallery/1.mp4"


def test_a_gallery_elsewhere(clip, tmp_path):
    elsewhere = tmp_path / "my clips"
    elsewhere.mkdir()
    shutil.copy(clip, elsewhere / "ä #1?.mp4")
    videos = Videos(Settings(data=tmp_path / "data", gallery=elsewhere))
    assert names(videos.videos()) == ["gallery/ä #1?.mp4"]
    assert videos.find("gallery/ä #1?.mp4") == elsewhere / "ä #1?.mp4"


BAD_PATHS = [
    "",
    ".",
    "/",
    "gallery",
    "gallery/",
    "gallery/..",
    "gallery/../outside.mp4",
    "../outside.mp4",
    "gallery/./clip.mp4",
    "gallery//clip.mp4",
    "gallery/b/../clip.mp4",
    "gallery\\clip.mp4",
    "Gallery/clip.mp4",
    "gallery/CLIP.mp4",
    "gallery/clip.mp4/",
    "gallery/clip.mp4\0",
    "gallery/clip.mp4\0.jpg",
    "gallery/%2e%2e/outside.mp4",
    "gallery/link.mp4",
    "gallery/folder/secret.mp4",
    "gallery/folder.mp4",
    "gallery/pipe.mp4",
    "gallery/device.mp4",
    "gallery/hanging.mp4",
    "gallery/loop.mp4",
    "gallery/.hidden.mp4",
    "clip.mp4",
    "/etc/passwd",
    "posters/clip.jpg",
    "uploads/../gallery/clip.mp4",
    "uploads/" + "0" * 64 + ".mp4",
    "uploads/" + "a" * 64 + ".mp4",
    "uploads/" + "b" * 64 + ".mp4",
    "uploads/" + "a" * 64 + ".MP4",
    "uploads/" + "A" * 64 + ".mp4",
    "uploads/.incoming-1",
    "uploads/" + "c" * 64 + ".mp4\n",
    "a" * 100_000,
    "gallery/" + "../" * 1000 + "etc/passwd",
    "\udcff",
]


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are POSIX's")
@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path[:40]))
def test_what_may_not_be_opened(clip, tmp_path, gallery, videos, path):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    shutil.copy(clip, tmp_path / "outside.mp4")
    shutil.copy(clip, secrets / "secret.mp4")
    shutil.copy(clip, gallery / "clip.mp4")
    shutil.copy(clip, gallery / ".hidden.mp4")
    (gallery / "b").mkdir()
    (gallery / "folder.mp4").mkdir()
    (gallery / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (gallery / "folder").symlink_to(secrets)
    (gallery / "device.mp4").symlink_to("/dev/zero")
    (gallery / "hanging.mp4").symlink_to(gallery / "nothing.mp4")
    (gallery / "loop.mp4").symlink_to(gallery / "loop.mp4")
    os.mkfifo(gallery / "pipe.mp4")
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / ("a" * 64 + ".mp4")).symlink_to(tmp_path / "outside.mp4")
    (uploads / ("b" * 64 + ".mp4")).mkdir()
    shutil.copy(clip, uploads / ("c" * 64 + ".mp4"))
    assert names(videos.videos()) == ["gallery/clip.mp4"]
    for find in (videos.find, videos.describe, videos.poster):
        with pytest.raises(NotFound) as caught:
            find(path)
        assert str(tmp_path) not in str(caught.value)
    assert videos.find("uploads/" + "c" * 64 + ".mp4").name == "c" * 64 + ".mp4"


@pytest.mark.skipif(sys.platform == "win32", reason="links are POSIX's")
def test_links_inside_of_the_gallery_and_loops(clip, gallery, videos):
    shutil.copy(clip, gallery / "a.mp4")
    (gallery / "b.mp4").symlink_to("a.mp4")
    (gallery / "again").symlink_to(gallery)
    assert names(videos.videos()) == ["gallery/a.mp4", "gallery/b.mp4"]
    assert videos.find("gallery/b.mp4").read_bytes() == clip.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="links are POSIX's")
def test_a_file_that_becomes_a_link(clip, tmp_path, gallery, videos):
    shutil.copy(clip, tmp_path / "outside.mp4")
    shutil.copy(clip, gallery / "a.mp4")
    assert names(videos.videos()) == ["gallery/a.mp4"]
    (gallery / "a.mp4").unlink()
    (gallery / "a.mp4").symlink_to(tmp_path / "outside.mp4")
    with pytest.raises(NotFound):
        videos.find("gallery/a.mp4")


@pytest.mark.parametrize("content", [b"", b"#EXTM3U\n/etc/passwd\n", b"\0" * 5000, b"<html></html>" * 99])
def test_what_is_no_video_is_left_out_and_said(clip, gallery, videos, caplog, content):
    shutil.copy(clip, gallery / "good.mp4")
    (gallery / "bad.mp4").write_bytes(content)
    for _ in range(2):
        with pytest.raises(NotFound):
            videos.find("gallery/bad.mp4")
        assert names(videos.videos()) == ["gallery/good.mp4"]
    assert [record.getMessage() for record in caplog.records if "bad.mp4 is left out" in record.getMessage()]
    assert len([record for record in caplog.records if "left out" in record.getMessage()]) == 1


def test_posters(clip, tmp_path, gallery, videos):
    for folder, count in (("a", 3), ("b", 9)):
        write_clip(gallery / folder / "same.mp4", count)
    found = videos.videos()
    assert not (tmp_path / "posters").exists()  # until one is asked for
    assert len({video.poster_path for video in found}) == 2
    for video in found:
        assert video.poster_path is not None
        poster = videos.poster(video.poster_path)
        assert poster.parent == tmp_path / "posters"
        with Image.open(poster) as picture:
            assert (picture.format, picture.size) == ("JPEG", (WIDTH, HEIGHT))
            first = Frames(videos.find(video.path))[0]
            assert np.abs(np.asarray(picture).astype(int) - first).mean() < 4
    old = videos.poster(found[0].poster_path)
    (gallery / "a" / "same.mp4").unlink()
    videos.videos()
    assert not old.exists()
    with pytest.raises(NotFound):
        videos.poster(found[0].poster_path)


def test_posters_asked_for_at_once(clip, gallery, videos):
    shutil.copy(clip, gallery / "a.mp4")
    poster = videos.videos()[0].poster_path
    made, barrier = [], threading.Barrier(8)

    def ask():
        barrier.wait()
        made.append(videos.poster(poster).read_bytes())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_pictures_in_the_gallery(clip, gallery, videos):
    shutil.copy(clip, gallery / "a.mp4")
    image = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    image.save(gallery / "a.png")
    found = videos.pictures()
    assert names(found) == ["gallery/a.png"]
    assert (found[0].width, found[0].height, found[0].frames, found[0].fps) == (64, 48, 1, None)
    assert found[0].is_picture
    assert names(videos.videos()) == ["gallery/a.mp4"]
    assert videos.find("gallery/a.png") == gallery / "a.png"
    with Image.open(videos.poster(found[0].poster_path)) as picture:
        assert picture.size == (64, 48)
