"""omniops segment of live video: synthetic cameras, pipes, and the window."""

import io
import json
import sys
import types

import numpy as np
import pytest

pytest.importorskip("av", reason="needs PyAV")

from segment_files import read_frames, run, write_video

from omniops.cli.segment import live, window
from omniops.sam2 import SAM2VideoPredictor, rle
from omniops.sam2.live_frames import LiveFrames

CAMERA = "lavfi:testsrc=size=64x48:rate=10"
POINT = ("--point", "30,20")


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_synthetic_camera_is_written_as_it_comes(omniops, loaded, tmp_path):
    out = tmp_path / "out.mp4"
    options = ("--frames", "5", "--when-full", "wait", "--out", out)
    result = run(omniops, CAMERA, *POINT, "--point", "10,40@2#2", *options)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("5 frames in ")
    assert " 0 dropped, latency " in result.out
    assert result.out.endswith(f"Wrote {out} and {tmp_path / 'out.jsonl'}\n")
    lines = _lines(tmp_path / "out.jsonl")
    assert [line["frame"] for line in lines] == list(range(5))
    assert [[found["id"] for found in line["objects"]] for line in lines] == [[1], [1], [1, 2], [1, 2], [1, 2]]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(line["latency"] >= 0 for line in lines)
    assert len(read_frames(out)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.mp4"]


def test_its_masks_are_the_predictors(omniops, loaded, tmp_path):
    options = ("--frames", "4", "--when-full", "wait", "--save", "jsonl", "--out", tmp_path / "out.mp4")
    assert run(omniops, CAMERA, *POINT, *options).status == 0
    predictor = SAM2VideoPredictor(loaded)
    state = predictor.init_state(LiveFrames(CAMERA, when_full="wait"))
    predictor.add_new_points_or_box(state, 0, 1, [[30, 20]], [1])
    for line, (frame, _, logits) in zip(
        _lines(tmp_path / "out.jsonl"), predictor.propagate_in_video(state), strict=False
    ):
        found = rle.decode(line["objects"][0]["segmentation"])
        assert np.array_equal(found, logits[0, 0].numpy() > 0), frame


def test_a_video_from_a_pipe(omniops, loaded, tmp_path, monkeypatch):
    content = write_video(tmp_path / "v.mp4").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    result = run(omniops, "-", *POINT, "--out", tmp_path / "out.mp4")
    assert (result.status, result.err) == (0, "")
    assert len(_lines(tmp_path / "out.jsonl")) == 6


def test_what_cannot_be_opened_is_named(omniops, loaded, tmp_path):
    result = run(omniops, "--camera", "99", *POINT, "--out", tmp_path / "out.mp4")
    assert result.status == 1
    assert "camera 99" in result.err
    result = run(omniops, "http://127.0.0.1:9/x", *POINT, "--out", tmp_path / "out.mp4")
    assert (result.status, "http://127.0.0.1:9/x cannot be opened" in result.err) == (1, True)


def test_a_prompt_outside_of_its_frames(omniops, loaded, tmp_path):
    result = run(omniops, CAMERA, "--point", "64,2", "--out", tmp_path / "out.mp4")
    assert (result.status, "--point 64,2: it is outside: lavfi" in result.err) == (2, True)


def test_ctrl_c_is_its_ordinary_end(omniops, loaded, tmp_path, monkeypatch):
    frames_of = live._LiveVideo._add_prompts

    def interrupt(self, state, frame):
        if frame == 3:
            raise KeyboardInterrupt
        return frames_of(self, state, frame)

    monkeypatch.setattr(live._LiveVideo, "_add_prompts", interrupt)
    result = run(omniops, CAMERA, *POINT, "--when-full", "wait", "--out", tmp_path / "out.mp4")
    assert (result.status, result.err) == (0, "")
    assert len(_lines(tmp_path / "out.jsonl")) == len(read_frames(tmp_path / "out.mp4")) == 3


def test_memory_does_not_grow_with_the_frames(omniops, loaded, tmp_path, monkeypatch):
    """Neither records nor latencies are kept of all frames."""
    kept = []
    write = live.VideoResults.write

    def watch(self, files):
        write(self, files)
        kept.append(len(self.recorded_frames))

    monkeypatch.setattr(live.VideoResults, "write", watch)
    monkeypatch.setattr(live, "_NUM_LATENCIES", 3)
    assert run(omniops, CAMERA, *POINT, "--frames", "8", "--save", "jsonl", "--out", tmp_path / "o.mp4").status == 0
    assert kept == [0] * 8


class _Tk:
    """In place of tkinter's windows: remembers what is shown and bound, and lets tests click."""

    def __init__(self):
        self.bound, self.shown, self.updates, self.titles = {}, [], 0, []
        self.happenings = {}
        self.is_destroyed = False

    def winfo_screenwidth(self):
        return 1920

    def winfo_screenheight(self):
        return 1080

    def bind(self, event, call):
        self.bound[event] = call

    def protocol(self, name, call):
        self.bound[name] = call

    def title(self, text):
        self.titles.append(text)

    def update(self):
        self.updates += 1
        self.happenings.get(self.updates, lambda: None)()

    def destroy(self):
        self.is_destroyed = True


@pytest.fixture
def tk(monkeypatch):
    root = _Tk()

    class Label:
        def __init__(self, parent, **options):
            self.parent = parent

        def pack(self):
            pass

        def bind(self, event, call):
            root.bound[event] = call

        def configure(self, image):
            root.shown.append(image)

    module = types.ModuleType("tkinter")
    module.Tk, module.Label, module.TclError = lambda: root, Label, RuntimeError
    monkeypatch.setitem(sys.modules, "tkinter", module)
    image_tk = types.ModuleType("PIL.ImageTk")
    image_tk.PhotoImage = lambda picture, master: picture.copy()
    monkeypatch.setitem(sys.modules, "PIL.ImageTk", image_tk)
    import PIL

    monkeypatch.setattr(PIL, "ImageTk", image_tk, raising=False)
    return root


def _event(**values):
    return types.SimpleNamespace(**{"x": 0, "y": 0, "char": "", "keysym": "", **values})


def test_a_window_shows_it_and_takes_clicks(omniops, loaded, tmp_path, monkeypatch, tk):
    monkeypatch.chdir(tmp_path)
    calls = []
    add = SAM2VideoPredictor.add_new_points_or_box

    def remember(self, state, frame, number, points=None, labels=None, **options):
        calls.append((frame, number, points, labels))
        return add(self, state, frame, number, points, labels, **options)

    monkeypatch.setattr(SAM2VideoPredictor, "add_new_points_or_box", remember)
    removed = []
    remove = SAM2VideoPredictor.remove_object
    monkeypatch.setattr(
        SAM2VideoPredictor, "remove_object", lambda self, *a, **o: removed.append(a[1]) or remove(self, *a, **o)
    )
    tk.happenings = {
        2: lambda: tk.bound["<Button-1>"](_event(x=30, y=20)),
        3: lambda: (tk.bound["<Key>"](_event(char="2")), tk.bound["<Button-1>"](_event(x=5, y=6))),
        4: lambda: tk.bound["<Button-3>"](_event(x=7, y=8)),
        5: lambda: tk.bound["<Key>"](_event(keysym="BackSpace", char="\b")),
        7: lambda: tk.bound["<Key>"](_event(char="q")),
    }
    result = run(omniops, CAMERA, "--when-full", "wait")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("7 frames in ")
    assert calls == [(2, 1, [(30, 20)], [1]), (3, 2, [(5, 6)], [1]), (4, 2, [(7, 8)], [0])]
    assert removed == [2]
    assert tk.titles[-1].endswith("object 2")
    assert (len(tk.shown), tk.is_destroyed) == (7, True)
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_is_closed_ends_it(omniops, loaded, tk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tk.happenings = {2: lambda: tk.bound["WM_DELETE_WINDOW"]()}
    result = run(omniops, CAMERA, *POINT, "--show", "--out", "out.mp4", "--when-full", "wait")
    assert result.status == 0
    assert len(_lines(tmp_path / "out.jsonl")) == 2
    assert len(read_frames(tmp_path / "out.mp4")) == 2


def test_clicks_in_a_window_smaller_than_the_frame(tk):
    tk.winfo_screenwidth = lambda: 160
    shown = window.Window("live", 1280, 720)
    shown.show(np.zeros((720, 1280, 3), np.uint8))
    assert tk.shown[0].size == (144, 81)
    tk.bound["<Button-1>"](_event(x=72, y=40.5))
    (click,) = shown.take_clicks()
    assert (click.x, click.y) == pytest.approx((640, 360))
    assert shown.take_clicks() == []


def test_no_window_can_be_opened(omniops, loaded, tk, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no display name and no $DISPLAY environment variable")

    sys.modules["tkinter"].Tk = fail
    result = run(omniops, CAMERA)
    assert result.status == 1
    assert "no window can be opened here (no display name and no $DISPLAY environment variable)" in result.err
    monkeypatch.setitem(sys.modules, "tkinter", None)
    result = run(omniops, CAMERA)
    assert (result.status, "a window needs tkinter" in result.err) == (1, True)
