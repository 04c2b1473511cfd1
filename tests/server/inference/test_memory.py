"""Sessions in the predictor's process: what they share, and what they give back."""

import gc

import pytest
from PIL import Image
from server.inference.sessions import FRAMES, POINT, tracked

from omniops.server import inference as module


def test_sessions_on_one_file_share_its_frames(inference, clip):
    inference.open("b", clip)
    frames = inference.sessions["a"].frames
    assert inference.sessions["b"].frames is frames
    inference.close("a")
    inference.open("a", clip)
    assert inference.sessions["a"].frames is frames
    inference.close("a")
    inference.close("b")
    del frames
    gc.collect()
    assert not inference.open_frames


def test_a_file_that_changed_is_opened_again(inference, model, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (40, 30)).save(file)
    assert inference.open("b", str(file))["width"] == 40
    Image.new("RGB", (50, 30)).save(file)
    assert inference.open("c", str(file))["width"] == 50


def test_two_propagations_on_one_file_do_not_take_its_decoder_from_each_other(inference, clip):
    for session in ("b", "c"):
        inference.open(session, clip)
    for session, point in (("a", POINT), ("b", [0.7, 0.7])):
        inference.add(session, 0, 1, [point], [1])
    expected = [tracked(inference, "a", 1), tracked(inference, "b")]
    counts = inference.begin("a", 1), inference.begin("b", 0)
    a, b = (inference.sessions[session] for session in ("a", "b"))
    assert a.frames is b.frames is a.state.frames
    assert b.state.frames is not b.frames
    found = [], []
    for _ in range(max(counts)):
        for session, masks in zip(("a", "b"), found, strict=True):
            masks.append(inference.next(session))
    assert [[answer for answer in answers if answer] for answers in found] == expected
    assert inference.next("b") is None
    assert b.state.frames is b.frames  # at its end it shares them again
    assert inference.add("b", 5, 2, [POINT], [1])


def test_sessions_that_are_not_used_give_back_what_the_encoder_made(inference, clip, monkeypatch):
    monkeypatch.setattr(module, "SESSIONS_WITH_FEATURES", 4)
    inference.add("a", 0, 1, [POINT], [1])
    one_frame = inference.memory()["sessions"]["a"]
    for t in range(FRAMES):
        inference.preview("a", t, [POINT], [1])
    assert features(inference) == FRAMES
    assert inference.memory()["sessions"]["a"] > 4 * one_frame
    inference.open("b", clip)
    inference.preview("b", 0, [POINT], [1])
    assert features(inference) == 1  # that of the last frame: whoever comes back to it need not wait
    assert inference.sessions["a"].state.frames_with_features == [FRAMES - 1]
    for i in range(module.SESSIONS_WITH_FEATURES - 2):
        inference.open(f"more {i}", clip)
        inference.preview(f"more {i}", 0, [POINT], [1])
    assert features(inference) == 1
    inference.open("one too many", clip)
    inference.preview("one too many", 0, [POINT], [1])
    assert features(inference) == 0
    assert features(inference, "b") == 1
    assert inference.memory()["sessions"]["a"] < one_frame
    inference.add("a", 0, 1, [POINT], [1])  # and all goes on
    assert features(inference, "b") == 0


def features(inference, session="a"):
    return len(inference.sessions[session].state.frames_with_features)


def test_a_closed_session_leaves_nothing(inference, clip):
    inference.add("a", 0, 1, [POINT], [1])
    inference.begin("a", 0)
    inference.next("a")
    inference.close("a")
    assert inference.memory()["sessions"] == {}
    with pytest.raises(KeyError):
        inference.next("a")
    inference.close("a")
    gc.collect()
    from omniops.sam2.inference_state import InferenceState

    assert not [item for item in gc.get_objects() if type(item) is InferenceState]
