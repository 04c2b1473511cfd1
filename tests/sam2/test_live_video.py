"""Live videos: the masks of a file, objects that come and go between frames, bounded memory, dropped frames."""

from __future__ import annotations

import copy
import http.server
import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from one_thread import one_thread as one_thread
from PIL import Image
from video_files import HEIGHT, WIDTH, picture, write_clip

from omniops.sam2 import SAM2VideoPredictor, load
from omniops.sam2.frames import FrameError
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.live_sources import is_stream

POINT = {"points": [[10, 20]], "labels": [1]}
BOX = {"box": [4, 4, 40, 30]}


@pytest.fixture(scope="module")
def predictor() -> SAM2VideoPredictor:
    torch.manual_seed(0)
    return SAM2VideoPredictor(load("tiny", random_weights=True, image_size=64, device="cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for t in range(20):
        Image.fromarray(picture(t)).save(folder / f"{t}.png")
    return folder


def masks_of_file(predictor, folder, frame, **prompt):
    """Of one object, from a frame on."""
    state = predictor.init_state(folder)
    predictor.add_new_points_or_box(state, frame, 1, **prompt)
    return {t: masks for t, _, masks in predictor.propagate_in_video(state, frame)}


@pytest.mark.slow
def test_the_masks_are_those_of_a_file(predictor, folder):
    state = predictor.init_state(picture(t) for t in range(20))
    predictor.add_new_points_or_box(state, 0, "first", **POINT)
    first, second = {}, {}
    for t, ids, masks in predictor.propagate_in_video(state):
        found = dict(zip(ids, masks, strict=True))
        first[t] = found["first"]
        if t > 3:
            second[t] = found["second"]
        if t == 3:
            second[t] = predictor.add_new_points_or_box(state, 3, "second", **BOX)[2][1]
    assert state.num_frames == 20
    for found, expected in (
        (first, masks_of_file(predictor, folder, 0, **POINT)),
        (second, masks_of_file(predictor, folder, 3, **BOX)),
    ):
        assert list(found) == list(expected)
        for t, mask in found.items():
            torch.testing.assert_close(mask, expected[t][0], rtol=0, atol=1e-5)


def test_a_correction_counts_from_the_next_frame_on(predictor, folder):
    """As where a file is propagated to that frame, corrected, and propagated further."""
    correction = {"points": [[50, 10]], "labels": [0]}
    state = predictor.init_state(folder)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    expected = [masks for _, _, masks in predictor.propagate_in_video(state, max_frame_num_to_track=4)]
    _, _, corrected = predictor.add_new_points_or_box(state, 4, 1, **correction)
    expected += [masks for _, _, masks in predictor.propagate_in_video(state, 5, max_frame_num_to_track=3)]

    live = predictor.init_state(picture(t) for t in range(9))
    predictor.add_new_points_or_box(live, 0, 1, **POINT)
    for t, _, masks in predictor.propagate_in_video(live):
        torch.testing.assert_close(masks, expected[t], rtol=0, atol=1e-5)
        if t == 4:
            _, _, found = predictor.add_new_points_or_box(live, 4, 1, **correction)
            torch.testing.assert_close(found, corrected, rtol=0, atol=1e-5)
    assert not torch.equal(corrected, expected[4])


def test_objects_come_and_go(predictor):
    state = predictor.init_state(picture(t) for t in range(7))
    seen = []
    for t, ids, masks in predictor.propagate_in_video(state):
        seen.append(ids)
        assert masks.shape == (len(ids), 1, HEIGHT, WIDTH)
        if t == 1:
            predictor.add_new_points_or_box(state, t, "a", **POINT)
        if t == 2:
            predictor.add_new_points_or_box(state, 1, "b", **BOX)  # on a frame before
        if t == 3:
            predictor.remove_object(state, "a", need_output=False)
        if t == 4:
            predictor.clear_all_prompts_in_frame(state, 1, "b", need_output=False)
    assert seen == [[], [], ["a"], ["a", "b"], ["b"], [], []]


def test_it_goes_on_where_it_was_broken_off(predictor):
    state = predictor.init_state(picture(t) for t in range(6))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    assert [t for t, *_ in predictor.propagate_in_video(state, max_frame_num_to_track=2)] == [0, 1, 2]
    assert [t for t, *_ in predictor.propagate_in_video(state)] == [3, 4, 5]
    assert list(predictor.propagate_in_video(state)) == []


@pytest.mark.slow
def test_what_is_kept_does_not_grow(predictor):
    state = predictor.init_state(picture(t % 20) for t in range(45))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    sizes, counts = {}, {}
    for t, _, _ in predictor.propagate_in_video(state):
        if t in (20, 25):  # a correction, which is forgotten with its frame
            predictor.add_new_points_or_box(state, t, 1, points=[[5, 5]], labels=[0])
        obj = state.objects[1]
        sizes[t] = state.nbytes + state.frames.nbytes
        counts[t] = (
            len(obj.output_dict.outputs()), len(obj.frames_tracked), len(obj.prompt_frames), len(obj.point_inputs)
        )  # fmt: skip
    assert len(set(list(sizes.values())[19:20] + list(sizes.values())[-3:])) == 1
    assert counts[26] == (17, 16, 3, 3)
    assert counts[44] == (17, 16, 1, 1)
    assert counts[19] == (17, 16, 1, 1)
    assert state.mask_store.num_slots == 0
    assert list(state.frames.kept) == list(range(29, 45))


def test_conditioning_frames_that_none_attends_to_are_forgotten(predictor):
    bounded = SAM2VideoPredictor(predictor.model, add_all_frames_to_correct_as_cond=True, max_cond_frames_in_attn=2)
    state = bounded.init_state(picture(t % 20) for t in range(40))
    bounded.add_new_points_or_box(state, 0, 1, **POINT)
    for t, _, _ in bounded.propagate_in_video(state):
        if t % 5 == 0:
            bounded.add_new_points_or_box(state, t, 1, **POINT)
    assert list(state.objects[1].output_dict.cond_frame_outputs) == [25, 30, 35]


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,
        lambda image: image / 255,
        lambda image: image.astype(np.uint16) * 257,
        lambda image: np.dstack([image, image[..., 0]]),
    ],
    ids=["PIL", "tensor", "floating tensor", "floating", "16 bits", "alpha"],
)
def test_frames_of_every_kind(convert):
    frames = LiveFrames(convert(picture(t)) for t in range(3))
    assert (frames.width, frames.height, len(frames)) == (WIDTH, HEIGHT, 1)
    assert [frames.take(), frames.take(), frames.take()] == [1, 2, None]
    for t in range(3):
        assert frames[t].dtype == np.uint8
        assert np.array_equal(frames[t], picture(t))
    assert np.array_equal(frames[-1], picture(2))


def test_frames_in_one_array_or_tensor():
    pictures = np.stack([picture(t) for t in range(3)])
    for source in (pictures, torch.from_numpy(pictures).permute(0, 3, 1, 2)):
        frames = LiveFrames(source)
        assert [frames.take(), frames.take(), frames.take()] == [1, 2, None]
        assert np.array_equal(frames[2], picture(2))


def test_an_iterable_may_write_its_frames_to_one_place():
    buffer = np.zeros((8, 8, 3), np.uint8)

    def camera():
        for value in (1, 2):
            buffer[:] = value
            yield buffer

    frames = LiveFrames(camera())
    frames.take()
    assert [int(frames[t].max()) for t in range(2)] == [1, 2]


@pytest.mark.parametrize(("when_full", "expected"), [("drop_oldest", [0, 5, 6]), ("drop_newest", [0, 1, 2])])
def test_frames_that_come_too_fast_are_dropped(when_full, expected):
    read = threading.Semaphore(0)
    go_on = threading.Event()

    def camera():
        for value in range(7):
            yield np.full((8, 8, 3), value, np.uint8)
            if value == 0:
                go_on.wait()
            read.release()

    frames = LiveFrames(camera(), when_full=when_full, buffer_size=2)
    go_on.set()
    for _ in range(7):
        read.acquire()
    taken = [int(frames[0].max())]
    while (index := frames.take()) is not None:
        taken.append(int(frames[index].max()))
    assert taken == expected
    assert frames.num_dropped == 4
    assert len(frames) == 3


def test_latency_counts_from_the_arrival(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("omniops.sam2.live_frames.perf_counter", lambda: now[0])
    frames = LiveFrames(picture(t) for t in range(2))
    now[0] = 10.5
    assert frames.latency == 0.5
    frames.take()
    assert frames.latency == 0
    assert [frames.time(0), frames.time(1)] == [10.0, 10.5]


@pytest.mark.parametrize("when_full", ["wait", "drop_oldest"])
def test_what_an_iterable_raises_is_raised(predictor, when_full):
    def camera():
        yield picture(0)
        raise ZeroDivisionError("the lens")

    state = predictor.init_state(LiveFrames(camera(), when_full=when_full))
    with pytest.raises(ZeroDivisionError, match="the lens"):
        list(predictor.propagate_in_video(state))
    assert list(predictor.propagate_in_video(state)) == []


@pytest.mark.parametrize("when_full", ["wait", "drop_oldest"])
def test_closing_ends_the_source(when_full):
    closed = threading.Event()

    def camera():
        try:
            while True:
                yield picture(0)
        finally:
            closed.set()

    with LiveFrames(camera(), when_full=when_full) as frames:
        assert not closed.is_set()
    assert closed.wait(10)
    assert frames.take() is None


def test_an_iterable_is_not_read_in_inference_mode(predictor):
    modes = []

    def camera():
        for t in range(3):
            modes.append(torch.is_inference_mode_enabled())
            yield picture(t)

    list(predictor.propagate_in_video(predictor.init_state(camera())))
    assert modes == [False, False, False]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3.5, {}, TypeError, "source must be an iterable of frames, .* got float"),
        (picture(0), {}, TypeError, "source must be an iterable of frames"),
        ([], {}, ValueError, "ended before its first frame"),
        (["frame"], {}, TypeError, "NumPy array or a PIL image, got str"),
        ([torch.zeros(8, 8)], {}, ValueError, r"must be \(3, H, W\), got \(8, 8\)"),
        ([picture(0)], {"when_full": "drop"}, ValueError, "one of wait, drop_oldest, drop_newest, got 'drop'"),
        ([picture(0)], {"buffer_size": 0}, ValueError, "at least 1, got 0"),
        ("rtsp://localhost:1/none", {}, ValueError, "rtsp://localhost:1/none cannot be opened as a live video: "),
        ("lavfi:nothing", {}, ValueError, "lavfi:nothing cannot be opened as a live video: "),
        ("ftp://host/a", {}, ValueError, "is no live video: one begins with http, https"),
    ],
)  # fmt: skip
def test_errors(source, options, error, message):
    with pytest.raises(error, match=message):
        LiveFrames(source, **options)


def test_errors_of_states(predictor):
    state = predictor.init_state([picture(t) for t in range(20)] + [np.zeros((5, 5, 3), np.uint8)])
    for options in ({"start_frame_idx": 0}, {"reverse": True}):
        with pytest.raises(ValueError, match="come in order: leave out start_frame_idx and reverse"):
            next(predictor.propagate_in_video(state, **options))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(state)
    with pytest.raises(ValueError, match="frame 20 is of 5 x 5 pixels, the first of 64 x 48"):
        list(predictor.propagate_in_video(state))
    with pytest.raises(ValueError, match="frame_idx must be one of the last frames of the live video, 4 to 19, got 3"):
        predictor.add_new_points_or_box(state, 3, 1, **POINT)
    with pytest.raises(IndexError, match="frames 4 to 19 are kept"):
        state.frames[3]


def test_names_of_streams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("v4l2:0").touch()
    for name in ("rtsp://camera/1", "https://host/a.m3u8", "v4l2:/dev/video0", "lavfi:testsrc=size=64x48"):
        assert is_stream(name)
    for name in ("clip.mp4", "v4l2:0", "C:\\clip.mp4", "file:///etc/passwd", "concat:a|b", "/a/b:c.mp4"):
        assert not is_stream(name)


def test_a_synthetic_camera(predictor):
    state = predictor.init_state(LiveFrames("lavfi:testsrc=size=64x48:rate=50", when_full="wait"))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    assert [t for t, *_ in predictor.propagate_in_video(state, max_frame_num_to_track=3)] == [0, 1, 2, 3]
    assert state.frames[3].std() > 10
    assert state.frames.latency < 60
    state.frames.close()


def test_a_url(tmp_path):
    write_clip(tmp_path / "clip.ts", 6)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with LiveFrames(f"http://127.0.0.1:{server.server_port}/clip.ts", when_full="wait") as frames:
            while frames.take() is not None:
                pass
        server.shutdown()
    assert len(frames) == 6
    for t in range(6):
        assert np.abs(frames[t].astype(int) - picture(t)).mean() < 8


def test_a_playlist_reads_no_file_of_this_machine(tmp_path):
    write_clip(tmp_path / "clip.ts", 6)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises((ValueError, FrameError)):
            LiveFrames(f"http://127.0.0.1:{server.server_port}/list.m3u8")
        server.shutdown()


def test_a_pipe(tmp_path):
    content = write_clip(tmp_path / "clip.ts", 6).read_bytes()
    reading, writing = os.pipe()

    def write():
        with open(writing, "wb") as file:
            file.write(content)

    threading.Thread(target=write, daemon=True).start()
    with open(reading, "rb") as file, LiveFrames(file) as frames:
        while frames.take() is not None:
            pass
    assert len(frames) == 6
