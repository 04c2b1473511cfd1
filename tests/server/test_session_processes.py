"""Sessions over what they are made for: a model, and a process of its own that is killed at a bad moment."""

import os
import signal
from pathlib import Path

import pytest
from clips import HEIGHT, WIDTH, write_clip
from remote.processes import is_gone
from server.fake_inference import FakeInference
from server.test_predictors import FAKE, needs_remote
from server.waiting import Thread, wait_until
from server.world import CLIP, POINT

from omniops.remote import process_id
from omniops.sam2 import remote, rle
from omniops.server import predictors
from omniops.server.errors import NotFound, ServerError
from omniops.server.predictors import Predictor, make_inference
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

pytestmark = pytest.mark.slow  # processes that load a model, one after the other

DIED = "Cannot find session ID; it ended when the process of its model died"


def _in_process():
    return predictors._Process(remote("no model", predictor=FAKE, device="cpu"))


@needs_remote
def test_a_process_that_is_killed_in_the_middle_of_a_stream_ends_its_sessions_alone():
    sessions = Sessions(Settings(), [Predictor(_in_process, "a"), Predictor(FakeInference, "b")])
    killed, safe, asleep = (sessions.start(CLIP, "clip.mp4") for _ in range(3))
    assert killed.predictor is asleep.predictor is sessions.predictors[0]
    for session in (killed, safe):
        session.add_points(0, 1, POINT, [1])
    stream, untouched = killed.propagate(0), safe.propagate(0)
    assert next(stream)[0] == next(untouched)[0] == 0
    with sessions.predictors[0].turns.frame():
        pid = process_id(sessions.predictors[0]._inference._remote)
        reading = Thread(next, stream)
        clicking = Thread(asleep.add_points, 0, 1, POINT, [1])
        wait_until(lambda: sessions.predictors[0].turns.waiting == 2)
        os.kill(pid, signal.SIGKILL)
    for thread in (reading, clicking):
        with pytest.raises(NotFound) as raised:
            thread.result()
        assert raised.value.message == DIED
    assert list(stream) == []
    assert is_gone(pid)
    assert [frame for frame, _ in untouched] == list(range(1, 10))
    assert len(sessions) == 1
    anew = sessions.start(CLIP, "clip.mp4")
    assert anew.predictor is sessions.predictors[0]
    anew.add_points(0, 1, POINT, [1])
    assert [frame for frame, _ in anew.propagate(0)] == list(range(10))
    assert sessions.predictors[0].restarts == 1
    last = process_id(sessions.predictors[0]._inference._remote)
    sessions.shutdown()
    assert is_gone(last)


def test_sessions_over_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(predictors, "has_processes", lambda: False)
    monkeypatch.setattr(predictors, "_MEMORY_AGE", 0.0)
    settings = Settings(model="tiny", random_weights=True, image_size=64)
    sessions = Sessions(settings, [Predictor(lambda: make_inference(settings, "cpu"), "cpu")])
    path = write_clip(tmp_path / "clip", 4)
    session, other = sessions.start(path, "clip"), sessions.start(path, "clip")
    assert (session.frames, session.width, session.height) == (4, WIDTH, HEIGHT)

    clicked = session.add_points(1, 5, [[0.2, 0.5]], [1])
    session.add_box(1, 2, [0.6, 0.6, 0.9, 0.95])
    shown = session.nbytes
    stream = session.propagate(1)
    assert stream.total == 5
    tracked = dict([next(stream), next(stream)])
    other.add_points(0, 0, [[0.5, 0.5]], [1])  # somebody else's click between two frames
    hovered = session.preview(3, [[0.5, 0.5]], [1])
    assert rle.decode(hovered).shape == (HEIGHT, WIDTH)
    tracked.update(stream)
    assert sorted(tracked) == [0, 1, 2, 3]
    assert session.found == {t: {object: mask["counts"] for object, mask in tracked[t]} for t in tracked}
    assert [object for object, _ in tracked[3]] == [5, 2]
    assert rle.decode(clicked[0][1]).any()
    assert other.found.keys() == {0}

    assert session.nbytes > shown
    assert session.remove(5)[0][0] == 1
    assert all(list(found) == [2] for found in session.found.values())
    snapshot = session.snapshot()
    assert [item["object_id"] for item in snapshot["objects"]] == [2]
    assert snapshot["objects"][0]["prompts"][0]["box"] == [0.6, 0.6, 0.9, 0.95]
    stream = session.propagate(0)
    next(stream)
    session.cancel()
    assert list(stream) == []
    with pytest.raises(ServerError, match="There is no frame 4"):
        session.add_points(4, 0, [[0.5, 0.5]], [1])
    assert sessions.nbytes == session.nbytes + other.nbytes
    sessions.close(session.id)
    assert sessions.nbytes == other.nbytes > 0
    with pytest.raises(ServerError, match="cannot be read") as raised:
        sessions.start(Path("/secret/nothing.mp4"), "nothing.mp4")
    assert "secret" not in raised.value.message
    assert len(sessions) == 1
    sessions.shutdown()
