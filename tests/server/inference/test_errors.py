"""Sessions in the predictor's process: what errors say, and what they leave behind."""

import functools

import pytest
from clips import HEIGHT, WIDTH, write_clip
from server.inference.sessions import EMPTY, FRAMES, POINT, everything, tracked

from omniops.sam2 import rle
from omniops.sam2.frame_inference import FrameInference
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.server import inference as module
from omniops.server.inference import Inference

WRONG = {
    "a frame behind the last": ((FRAMES, 1, [POINT], [1]), r"There is no frame 6: the video has frames 0 to 5\."),
    "a frame before the first": ((-1, 1, [POINT], [1]), r"There is no frame -1"),
    "half a frame": ((0.5, 1, [POINT], [1]), r"The frame must be a whole number, got 0\.5\."),
    "an object that is no number": ((0, "one", [POINT], [1]), r"The object must be a whole number, got 'one'\."),
    "label 7": ((0, 1, [POINT], [7]), r"A label must be 1 .* or 0 .*, got 7\."),
    "half a label": ((0, 1, [POINT], [0.5]), r"A label must be a whole number"),
    "no points": ((0, 1, [], []), r"There is no prompt: give a point or a box\."),
    "no label": ((0, 1, [POINT], []), r"as many labels as points, got 0 and 1"),
    "NaN": ((0, 1, [[float("nan"), 0.5]], [1]), r"A point must be 2 fractions .* from 0 to 1, got \[nan, 0\.5\]"),
    "infinity": ((0, 1, [[0.5, float("inf")]], [1]), "A point must be 2 fractions"),
    "a point to the right": ((0, 1, [[1.001, 0.5]], [1]), "A point must be 2 fractions"),
    "a point above": ((0, 1, [[0.5, -0.001]], [1]), "A point must be 2 fractions"),
    "a point of one number": ((0, 1, [[0.5]], [1]), "A point must be 2 fractions"),
    "a point of texts": ((0, 1, [["0", "0"]], [1]), "A point must be 2 fractions"),
    "too many points": ((0, 1, [POINT] * 501, [1] * 501), "at most 500 points on a frame, got 501"),
    "a box out of the frame": ((0, 1, [], [], [0, 0, 1, 1.5]), "A box must be 4 fractions"),
    "a box of three numbers": ((0, 1, [], [], [0, 0, 1]), "A box must be 4 fractions"),
    "a box the wrong way round": ((0, 1, [], [], [0.9, 0, 0.1, 1]), "A box must be left, top, right, bottom"),
    "a box with old points": ((0, 1, [], [], [0, 0, 1, 1], False), "A box comes before all points"),
    "too many points with old ones": ((0, 1, [POINT] * 500, [1] * 500, None, False), "at most 500 points"),
}


def test_faulty_clicks_leave_no_trace(twins_of_session):
    """Neither of an object that is known nor of a new one."""
    inference = twins_of_session.inference
    for arguments, words in WRONG.values():
        frame, object, *rest = arguments
        for obj in (1, 2) if object == 1 and len(rest) < 4 else (object,):
            click = functools.partial(inference.add, "a", frame, obj, *rest)
            twins_of_session.require_failure(click, ValueError, words)
    twins_of_session.require_alike()


MASKS = {
    "another size": {"size": [WIDTH, HEIGHT], "counts": EMPTY["counts"]},
    "no size": {"counts": EMPTY["counts"]},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "too few counts": {"size": [HEIGHT, WIDTH], "counts": [5]},
    "no string of COCO's": {"size": [HEIGHT, WIDTH], "counts": "ÿ"},
    "counts of texts": {"size": [HEIGHT, WIDTH], "counts": ["a"]},
    "counts of more than 64 bits": {"size": [HEIGHT, WIDTH], "counts": [2**70]},
    "a number": 5,
    "a size of a number": {"size": 5, "counts": EMPTY["counts"]},
}


def test_faulty_masks_leave_no_trace(twins_of_session):
    inference = twins_of_session.inference
    words = r"The (mask must be of the size of the video, \[90, 140\]|counts of the mask are not COCO's)"
    for mask in MASKS.values():
        for object in (1, 2):
            show = functools.partial(inference.add_mask, "a", 0, object, mask)
            twins_of_session.require_failure(show, ValueError, words)
    twins_of_session.require_alike()


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.add("a", 2, 1, [POINT], [1]),
        lambda made: made.add("a", 2, 2, [POINT], [1]),
        lambda made: made.add_mask("a", 0, 1, EMPTY),
        lambda made: made.add_mask("a", 0, 2, EMPTY),
        lambda made: made.clear_frame("a", 0, 1),
        lambda made: made.remove("a", 1),
    ],
    ids=["add to a known object", "add a new one", "mask of a known object", "mask of a new one", "clear", "remove"],
)
def test_a_failure_of_the_model_leaves_no_trace(twins_of_session, monkeypatch, call):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    inference = twins_of_session.inference
    for owner, function in (rle, "count_runs"), (FrameInference, "get_orig_video_res_output"):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            twins_of_session.require_failure(functools.partial(call, inference), RuntimeError, "out of memory")
    monkeypatch.setattr(SAM2Base, "forward_sam_heads", fail)
    click = functools.partial(inference.add, "a", 4, 3, [POINT], [1])
    twins_of_session.require_failure(click, RuntimeError, "out of memory")
    monkeypatch.undo()
    twins_of_session.require_alike()


class Twins:
    """Two sessions, a and b, alike. What fails in a must leave it so."""

    def __init__(self, inference, clip):
        self.inference = inference
        inference.open("b", clip)
        for session in ("a", "b"):
            inference.add(session, 0, 1, [POINT], [1])
            inference.add(session, 3, 5, [[0.6, 0.4]], [1])
            tracked(inference, session)
        inference.preview("a", 5, [POINT], [1])

    def require_failure(self, call, error, words):
        with pytest.raises(error, match=words):
            call()
        assert self.inference.prompts("a") == self.inference.prompts("b")

    def require_alike(self):
        for session in ("a", "b"):
            self.inference.sessions[session].state.release_features()
        assert self.inference.sessions["a"].state.nbytes == self.inference.sessions["b"].state.nbytes
        assert self.inference.clear_frame("a", 2, 5) == self.inference.clear_frame("b", 2, 5)
        assert tracked(self.inference, "a", 4) == tracked(self.inference, "b", 4)


@pytest.fixture
def twins_of_session(inference, clip):
    return Twins(inference, clip)


def test_a_faulty_click_is_none_on_a_new_session(inference):
    for arguments, words in WRONG.values():
        if len(arguments) < 6:
            with pytest.raises(ValueError, match=words):
                inference.add("a", *arguments)
    assert inference.prompts("a") == {}
    with pytest.raises(ValueError, match="nothing to track"):
        inference.begin("a", 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.add("no", 0, 1, [POINT], [1]),
        lambda made: made.add_mask("no", 0, 1, EMPTY),
        lambda made: made.clear_frame("no", 0, 1),
        lambda made: made.clear_video("no"),
        lambda made: made.remove("no", 1),
        lambda made: made.preview("no", 0, [POINT], [1]),
        lambda made: made.begin_everything("no", 0, 2),
        lambda made: made.begin("no", 0),
        lambda made: made.next("no"),
        lambda made: made.stop("no"),
        lambda made: made.prompts("no"),
    ],
)
def test_an_unknown_session_is_named(inference, call):
    with pytest.raises(KeyError) as raised:
        call(inference)
    assert raised.value.args == ("no",)
    inference.close("no")
    assert list(inference.memory()["sessions"]) == ["a"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda made: made.clear_frame("a", FRAMES, 1), "There is no frame 6"),
        (lambda made: made.clear_frame("a", 0, 9), r"Object 9 is unknown in this session\."),
        (lambda made: made.preview("a", 0), "There is no prompt"),
        (lambda made: made.preview("a", FRAMES, [POINT], [1]), "There is no frame 6"),
        (lambda made: made.begin_everything("a", FRAMES, 2), "There is no frame 6"),
        (lambda made: made.begin_everything("a", 0, 0), "along a side must be from 1 to 64, got 0"),
        (lambda made: made.begin_everything("a", 0, 65), "along a side must be from 1 to 64, got 65"),
        (lambda made: made.begin_everything("a", 0, "4"), "along a side must be a whole number"),
        (lambda made: made.begin("a", FRAMES), "There is no frame 6"),
        (lambda made: made.begin("a", None), "The frame must be a whole number, got None"),
        (lambda made: made.open("a", "elsewhere"), "There is a session of that id already"),
    ],
)
def test_wrong_arguments_are_named(inference, call, words):
    inference.add("a", 0, 1, [POINT], [1])
    with pytest.raises(ValueError, match=words):
        call(inference)
    assert [t for t, _ in tracked(inference)] == [*range(FRAMES)]


def test_objects_are_bounded(inference, monkeypatch):
    monkeypatch.setattr(module, "MAX_OBJECTS", 2)
    for object in (1, 2, 1):
        inference.add("a", 0, object, [POINT], [1])
    with pytest.raises(ValueError, match="at most 2 objects: remove one first"):
        inference.add("a", 0, 3, [POINT], [1])
    with pytest.raises(ValueError, match="at most 2 objects"):
        inference.add_mask("a", 0, 3, EMPTY)
    inference.remove("a", 1)
    assert len(inference.add("a", 0, 3, [POINT], [1])) == 2


def test_messages_are_short(inference):
    with pytest.raises(ValueError, match="A point must be") as raised:
        inference.add("a", 0, 1, [["x" * 10**5] * 10**5], [1])
    assert len(str(raised.value)) < 300


def test_files_that_are_no_videos_are_named_without_their_path(model, tmp_path):
    inference = Inference(model)
    (tmp_path / "notes.mp4").write_text("notes")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (tmp_path / "empty").mkdir()
    for name in ("notes.mp4", "picture.png", "empty", "missing.mp4", "null\0.mp4"):
        with pytest.raises(ValueError, match=r"^The file cannot be read as a video or a picture\.$"):
            inference.open("a", str(tmp_path / name))
    assert inference.memory()["sessions"] == {}


def damaged(folder):
    """A clip whose frame 3 cannot be decoded."""
    write_clip(folder, FRAMES)
    file = folder / "3.jpg"
    file.write_bytes(file.read_bytes()[:120])
    return str(folder)


def test_a_damaged_frame_is_named_without_its_path(model, tmp_path):
    inference = Inference(model)
    inference.open("a", damaged(tmp_path / "clip"))
    inference.open("guided", damaged(tmp_path / "other"), guided=True)
    for call in (
        lambda: inference.add("a", 3, 1, [POINT], [1]),
        lambda: inference.add("guided", 3, 1, [POINT], [1]),
        lambda: inference.add_mask("a", 3, 1, EMPTY),
        lambda: inference.preview("a", 3, [POINT], [1]),
        lambda: everything(inference, "a", 3, 2),
    ):
        with pytest.raises(ValueError, match=r"^Frame 3 cannot be decoded: the file is damaged there\.$"):
            call()
    assert inference.prompts("a") == inference.prompts("guided") == {}


def test_a_propagation_past_a_damaged_frame_gives_the_others_and_says_so(model, tmp_path):
    inference = Inference(model)
    inference.open("a", damaged(tmp_path / "clip"))
    inference.add("a", 1, 1, [POINT], [1])
    inference.begin("a", 1)
    frames = []
    with (
        pytest.warns(UserWarning, match="the masks end before frame 3"),
        pytest.raises(ValueError, match=r"^Frame 3 cannot be decoded: the file is damaged there, and tracking ended"),
    ):
        frames.extend(iter(lambda: inference.next("a")[0], None))
    assert frames == [1, 2, 1, 0]
    assert inference.next("a") is None
