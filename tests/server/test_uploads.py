"""Uploads: limits while they come, what is made of them, progress, and what is removed."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import picture, shown, turn, write_clip

pytest.importorskip("av", reason="videos need PyAV")

from omniops.sam2.frames import Frames
from omniops.server import jobs as jobs_module
from omniops.server import videos as videos_module
from omniops.server.errors import Busy, NotFound, ServerError, TooLarge
from omniops.server.jobs import Cancelled
from omniops.server.settings import Settings
from omniops.server.uploads import Incoming, Uploads, temporary_file
from omniops.server.videos import Videos


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 20, size=(320, 240))


def make(data: Path, **options) -> Uploads:
    in_use = options.pop("in_use", tuple)
    settings = Settings(data=data, **options)
    return Uploads(settings, Videos(settings), in_use)


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    return make(tmp_path)


def stored(uploads: Uploads) -> list[str]:
    return sorted(path.name for path in uploads.settings.uploads.iterdir())


def test_a_video(clip, uploads):
    video = uploads.receive(clip.open("rb"))
    file = uploads.videos.find(video.path)
    assert video.path == f"uploads/{hashlib.sha256(file.read_bytes()).hexdigest()}.mp4"
    assert (video.width, video.height, video.frames, video.fps) == (320, 240, 20, 24)
    assert (video.poster_path, video.is_picture) == (None, False)
    frames = Frames(file)
    assert [shown(frame) for frame in frames] == list(range(20))
    made = file.stat().st_mtime_ns
    assert uploads.receive(io.BytesIO(clip.read_bytes()), key="again") == video
    assert uploads.jobs.progress("again").as_json() == {"done": 20, "total": 20, "what": "converting"}
    assert file.stat().st_mtime_ns == made
    assert stored(uploads) == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644


def test_the_part_that_is_asked_for(clip, tmp_path):
    uploads = make(tmp_path, max_upload_video_duration=0.5, video_encode_seek_time=0.25)
    frames = Frames(uploads.videos.find(uploads.receive(clip.open("rb")).path))
    assert [shown(frame) for frame in frames] == list(range(6, 18))
    frames = Frames(uploads.videos.find(uploads.receive(clip.open("rb"), start=0.5, duration=0.25).path))
    assert [shown(frame) for frame in frames] == list(range(12, 18))
    assert uploads.receive(clip.open("rb"), start=0, duration=9).frames == 12


@pytest.mark.parametrize("name", ["start", "duration"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none(clip, uploads, name, value):
    with pytest.raises(ServerError, match=f"{name}TimeSec must be a number of seconds"):
        uploads.receive(clip.open("rb"), **{name: value})


def test_the_environments_encoding(clip, tmp_path):
    uploads = make(tmp_path, video_encode_fps=12, video_encode_max_width=160)
    video = uploads.receive(clip.open("rb"))
    assert (video.width, video.height, video.frames, video.fps) == (160, 120, 10, 12)


def test_the_same_clip_has_the_same_path_on_every_server(clip, tmp_path):
    """However many threads are free: x264 writes other bytes for another number of its own."""
    alone, busy = (make(tmp_path / name, ffmpeg_num_threads=3) for name in ("alone", "busy"))
    expected = alone.receive(clip.open("rb"))
    with busy.jobs.budget.threads(2):
        assert busy.receive(clip.open("rb")) == expected


class Endless:
    """A file that does not end, and counts what was read of it."""

    def __init__(self):
        self.count = 0

    def read(self, size=-1):
        assert 0 < size < 2**24
        self.count += size
        return bytes(size)

    def close(self):
        pass


def test_too_many_bytes_are_refused_while_they_come(tmp_path):
    uploads = make(tmp_path, max_upload_bytes=3_000_000)
    endless = Endless()
    with pytest.raises(TooLarge, match="It has more than the 3 megabytes that are taken"):
        uploads.receive(endless)
    assert endless.count < 3_000_000 + 2**21
    assert stored(uploads) == []


def test_the_temporary_file(tmp_path):
    with temporary_file(Settings(data=tmp_path, max_upload_bytes=10)) as file:
        assert isinstance(file, Incoming)
        assert file.path.parent == tmp_path / "uploads"
        assert file.write(b"12345") == 5
        file.write(memoryview(b"67890"))
        with pytest.raises(TooLarge):
            file.write(b"1")
        file.seek(0)
        assert file.read() == b"1234567890"
    assert not file.path.exists()
    file.close()


def test_a_temporary_file_is_taken_as_it_is(clip, uploads):
    file = temporary_file(uploads.settings)
    file.write(clip.read_bytes())
    file.seek(0)
    assert uploads.receive(file).frames == 20
    assert file.closed
    assert len(stored(uploads)) == 1


def test_too_many_pixels(clip, tmp_path):
    uploads = make(tmp_path, max_upload_pixels=320 * 240 - 1)
    with pytest.raises(ServerError, match=r"It has 320 x 240 pixels") as caught:
        uploads.receive(clip.open("rb"))
    assert caught.value.status == 413
    image = io.BytesIO()
    Image.new("RGB", (400, 300)).save(image, "PNG")
    image.seek(0)
    with pytest.raises(TooLarge, match=r"It has 400 x 300 pixels"):
        uploads.receive(image, picture=True)
    assert stored(uploads) == []


@pytest.mark.parametrize("content", [b"", b"no video", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x18ftypmp42" + bytes(5000)])
@pytest.mark.parametrize("is_picture", [False, True])
def test_what_is_neither(uploads, content, is_picture):
    words = "This is not a picture that can be read" if is_picture else "not valid video file"
    with pytest.raises(ServerError, match=words) as caught:
        uploads.receive(io.BytesIO(content), picture=is_picture)
    assert str(uploads.settings.data) not in caught.value.message
    assert stored(uploads) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's /dev/full")
def test_a_full_disk(uploads):
    with temporary_file(uploads.settings) as file:
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, file.fileno())
        os.close(full)
        with pytest.raises(ServerError, match="no room left") as caught:
            file.write(b"1")
    assert caught.value.status == 507


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    return exif


PICTURE = Image.fromarray(picture(5, 320, 240))


@pytest.mark.parametrize(
    ("image", "kind", "options", "suffix"),
    [
        (PICTURE, "PNG", {}, ".png"),
        (PICTURE, "JPEG", {"quality": 95, "subsampling": 0}, ".jpg"),
        (PICTURE, "WEBP", {"lossless": True}, ".png"),
        (PICTURE, "TIFF", {}, ".png"),
        (PICTURE, "BMP", {}, ".png"),
        (PICTURE, "GIF", {}, ".png"),
        (PICTURE.convert("RGBA"), "PNG", {}, ".png"),
        (PICTURE.convert("P"), "PNG", {}, ".png"),
        (PICTURE.convert("L"), "PNG", {}, ".png"),
        (PICTURE.convert("CMYK"), "JPEG", {"quality": 95}, ".jpg"),
    ],
)
def test_pictures(uploads, image, kind, options, suffix):
    video = uploads.receive(encoded(image, kind, **options), picture=True)
    file = uploads.videos.find(video.path)
    assert file.suffix == suffix
    assert video.path == f"uploads/{hashlib.sha256(file.read_bytes()).hexdigest()}{suffix}"
    assert (video.width, video.height, video.frames, video.fps, video.is_picture) == (320, 240, 1, None, True)
    with Image.open(file) as made:
        assert made.mode == "RGB"
        expected = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(np.asarray(made) - expected).mean() < (0.01 if kind in ("PNG", "WEBP", "BMP", "TIFF") else 4)
    assert len(Frames(file)) == 1
    assert np.abs(Frames(file)[0].astype(int) - expected).mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned(uploads, orientation):
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    expected = PICTURE.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else PICTURE
    video = uploads.receive(encoded(PICTURE, "PNG", exif=turned_exif(orientation)), picture=True)
    with Image.open(uploads.videos.find(video.path)) as made:
        assert np.array_equal(np.asarray(made), np.asarray(expected))
        assert not made.getexif()
    assert (video.width, video.height) == expected.size


def test_progress_is_reported_by_its_key(clip, uploads, monkeypatch):
    updates = []
    reached = threading.Event()
    announce = uploads.jobs.announce

    def watch(key, what):
        progress = announce(key, what)
        update = progress.update

        def note(*args, **kwargs):
            update(*args, **kwargs)
            updates.append(uploads.jobs.progress("my key").as_json())
            reached.set()

        progress.update = note
        return progress

    monkeypatch.setattr(uploads.jobs, "announce", watch)
    uploads.receive(clip.open("rb"), key="my key")
    assert {"done": clip.stat().st_size, "total": None, "what": "receiving"} in updates
    assert {"done": 7, "total": 20, "what": "converting"} in updates
    assert uploads.jobs.progress("my key").as_json() == {"done": 20, "total": 20, "what": "converting"}
    assert uploads.jobs.progress("another") is None


def test_who_goes_away_ends_it(tmp_path, uploads, monkeypatch):
    monkeypatch.setattr(jobs_module, "_LOOK_AGAIN", 0.01)
    long = write_clip(tmp_path / "long.mp4", 400, size=(320, 240))
    with pytest.raises(Cancelled):
        uploads.receive(long.open("rb"), key="key", gone=lambda: uploads.jobs.progress("key").done > 0)
    assert 0 < uploads.jobs.progress("key").done < 240
    assert stored(uploads) == []
    assert uploads.receive(long.open("rb"), gone=lambda: False).frames == 240


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def put(uploads: Uploads, letter: str, seconds: float, size: int = 100) -> str:
    uploads.settings.uploads.mkdir(exist_ok=True)
    path = uploads.settings.uploads / (letter * 64 + ".mp4")
    path.write_bytes(bytes(size))
    age(path, seconds)
    return f"uploads/{path.name}"


def test_old_uploads_are_removed_but_for_those_in_use(tmp_path):
    used: list[str] = []
    uploads = make(tmp_path, upload_age=1000, in_use=lambda: used)
    old, other, new = put(uploads, "a", 2000), put(uploads, "b", 3000), put(uploads, "c", 500)
    (uploads.settings.uploads / "mine.mp4").write_bytes(b"not ours")
    age(uploads.settings.uploads / "mine.mp4", 9999)
    for name, seconds in ((".incoming-new", 60), (".incoming-old", 9999)):
        (uploads.settings.uploads / name).write_bytes(b"")
        age(uploads.settings.uploads / name, seconds)
    used.append(old)
    uploads.sweep()
    left = stored(uploads)
    assert left == sorted([".incoming-new", Path(old).name, Path(new).name, "mine.mp4"])
    assert Path(other).name not in left
    used.clear()
    uploads.sweep()
    assert stored(uploads) == left  # it looks once a minute
    uploads.sweep(keep="")
    assert Path(old).name not in stored(uploads)


def test_to_use_an_upload_keeps_it(tmp_path):
    uploads = make(tmp_path, upload_age=1000)
    path = put(uploads, "a", 2000)
    modified = (tmp_path / path).stat().st_mtime_ns
    uploads.videos.find(path)
    assert (tmp_path / path).stat().st_mtime_ns == modified
    uploads.sweep()
    assert stored(uploads) == [Path(path).name]


def test_the_oldest_are_removed_where_all_are_too_large(clip, tmp_path):
    used: list[str] = []
    uploads = make(tmp_path, max_uploads_bytes=100_000, in_use=lambda: used)
    put(uploads, "a", 500, 40_000)
    put(uploads, "b", 400, 40_000)
    used.append(put(uploads, "c", 900, 50_000))
    put(uploads, "d", 100, 40_000)
    video = uploads.receive(clip.open("rb"))
    assert (tmp_path / video.path).stat().st_size < 20_000
    assert stored(uploads) == sorted([Path(video.path).name, "c" * 64 + ".mp4", "d" * 64 + ".mp4"])
    with pytest.raises(NotFound):
        uploads.videos.find("uploads/" + "a" * 64 + ".mp4")


def test_many_at_once(clip, tmp_path):
    uploads = make(tmp_path)
    found, errors = [], []

    def send(start):
        try:
            found.append(uploads.receive(clip.open("rb"), start=start / 24).frames)
        except ServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(i % 4,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(found) == sorted([20, 19, 18, 17] * 3)
    assert len(stored(uploads)) == 4


GALLERY = {
    "turned": lambda path: turn(write_clip(path, 6, size=(320, 240)), (0, 1, -1, 0)),
    "hevc": lambda path: write_clip(
        path, 6, codec="libx265", size=(320, 240), options={"x265-params": "log-level=error"}
    ),
    "ten bits": lambda path: write_clip(path, 6, pix_fmt="yuv420p10le", size=(320, 240)),
    "early frames": lambda path: write_clip(path, 20, size=(320, 240), times=[i / 24 - 0.25 for i in range(20)]),
    "fragments": lambda path: write_clip(path, 6, size=(320, 240)),
}


@pytest.mark.parametrize("name", GALLERY)
def test_gallery_files_that_browsers_cannot_play(tmp_path, name):
    path = tmp_path / "gallery" / f"{name}.mp4"
    GALLERY[name](path)
    if name == "fragments":
        fragment(path)
    expected = Frames(path)
    videos = Videos(Settings(data=tmp_path))
    assert videos.default().path == f"gallery/{name}.mp4"  # waits for it
    file = videos.find(f"gallery/{name}.mp4")
    assert file.parent == tmp_path / "converted"
    video = videos.videos()[0]
    assert (video.width, video.height, video.frames) == (expected.width, expected.height, len(expected))
    frames = Frames(file)
    assert len(frames) == len(expected)
    for one, other in zip(frames, expected, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 3
    with Image.open(videos.poster(video.poster_path)) as poster:
        assert poster.size == (expected.width, expected.height)
    before = file.stat().st_mtime_ns
    again = Videos(Settings(data=tmp_path))
    assert again.videos()[0] == video
    assert again.find(video.path).stat().st_mtime_ns == before
    path.unlink()
    assert again.videos() == []
    assert not file.exists()


def fragment(path: Path) -> None:
    """Write the packets of an MP4 file as fragments, of which its header does not tell."""
    import av

    with (
        av.open(str(path)) as source,
        av.open(str(path) + ".part", "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    os.replace(str(path) + ".part", path)


def test_pictures_of_the_gallery_that_browsers_show_otherwise(tmp_path):
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    PICTURE.save(gallery / "turned.jpg", exif=turned_exif(6), quality=95, subsampling=0)
    PICTURE.save(gallery / "scan.tiff")
    videos = Videos(Settings(data=tmp_path))
    files = {name: videos.find(f"gallery/{name}") for name in ("turned.jpg", "scan.tiff")}
    assert [file.suffix for file in files.values()] == [".jpg", ".png"]
    found = {picture.path: picture for picture in videos.pictures()}
    assert (found["gallery/turned.jpg"].width, found["gallery/turned.jpg"].height) == (240, 320)
    expected = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    assert np.abs(Frames(files["turned.jpg"])[0].astype(int) - expected).mean() < 4
    assert np.array_equal(Frames(files["scan.tiff"])[0], np.asarray(PICTURE))


def test_a_photograph_of_the_gallery_is_offered_as_it_is(tmp_path):
    """With the EXIF data of a camera that was held upright."""
    path = tmp_path / "gallery" / "photo.jpg"
    path.parent.mkdir()
    PICTURE.save(path, exif=turned_exif(1))
    videos = Videos(Settings(data=tmp_path))
    (found,) = videos.pictures()
    assert (found.width, found.height, found.frames, found.fps, found.is_picture) == (*PICTURE.size, 1, None, True)
    assert videos.find(found.path) == path
    frames = Frames(path)
    assert (len(frames), frames.width, frames.height, frames.fps) == (1, *PICTURE.size, None)


def test_posters_and_lists_do_not_wait_for_uploads(clip, tmp_path):
    uploads = make(tmp_path)
    write_clip(tmp_path / "gallery" / "a.mp4", 6)
    write_clip(tmp_path / "gallery" / "b.mp4", 6, pix_fmt="yuv444p")
    with uploads.jobs.budget.threads():  # as long as something is converted
        assert uploads.videos.find("gallery/b.mp4").parent.name == "converted"
        found = uploads.videos.videos()
        assert [video.path for video in found] == ["gallery/a.mp4", "gallery/b.mp4"]
        for video in found:
            assert uploads.videos.poster(video.poster_path).is_file()


def test_a_conversion_that_takes_long(tmp_path, monkeypatch):
    write_clip(tmp_path / "gallery" / "a.mp4", 400, pix_fmt="yuv444p", size=(320, 240))
    write_clip(tmp_path / "gallery" / "b.mp4", 6)
    videos = Videos(Settings(data=tmp_path))
    assert [video.path for video in videos.videos()] == ["gallery/b.mp4"]
    monkeypatch.setattr(videos_module, "_PATIENCE", 0.01)
    with pytest.raises(Busy, match="is being converted"):
        videos.find("gallery/a.mp4")
    monkeypatch.setattr(videos_module, "_PATIENCE", 60.0)
    assert len(Frames(videos.find("gallery/a.mp4"))) == 400
    assert [video.path for video in videos.videos()] == ["gallery/a.mp4", "gallery/b.mp4"]
