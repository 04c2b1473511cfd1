"""What a session does, and how it ends."""

import gc
import threading
import uuid
import weakref
from pathlib import Path

import pytest
from server.fake_inference import FEATURE_BYTES, TRACKED_BYTES, FakeInference
from server.waiting import Thread, held, wait_for_background, wait_until
from server.world import CLIP, POINT, missing

from omniops.server import sessions as sessions_module
from omniops.server.errors import Busy, ServerError
from omniops.server.predictors import Predictor
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

# A session.


def test_nothing_starts_before_the_first_session(world):
    threads = threading.active_count()
    assert len(world.sessions) == 0
    assert not world.sessions.close("a")
    world.sessions.leave("a")
    world.sessions.sweep()
    world.sessions.metrics_text()
    assert world.made == [[]]
    assert threading.active_count() == threads


def test_a_session_tells_what_it_is_of(world):
    session = world.start(guided=True)
    assert uuid.UUID(session.id).version == 4
    assert (session.path, session.name, session.guided) == (CLIP, "gallery/clip.mp4", True)
    assert (session.frames, session.width, session.height, session.fps) == (10, 32, 24, 24.0)
    assert not session.is_picture
    assert not session.tracking
    assert session.nbytes == 10 * FEATURE_BYTES
    assert world.inference.called("open") == [[session.id, "clip.mp4", True]]
    assert world.sessions.get(session.id) is session
    assert world.start().id != session.id
    assert world.sessions.start(Path("a.png"), "uploads/a.png").is_picture


def test_what_is_asked_of_a_session_reaches_the_predictor(world):
    session = world.start()
    first = session.add_points(2, 7, ((0.25, 0.5),), (1,), clear=False)
    assert [object for object, _ in first] == [7]
    assert first[0][1]["size"] == [24, 32]
    session.add_box(3, 0, (0, 0, 1, 1), points=((0.5, 0.5),), labels=(0,))
    session.add_mask(4, 0, {"size": (24, 32), "counts": "o0"})
    masks = session.clear_frame(4, 0)
    assert [object for object, _ in masks] == [7, 0]
    assert session.preview(0, ((0.5, 0.5),), (1,), box=(0, 0, 1, 1))["size"] == [24, 32]
    assert session.everything(1, points_per_side=8)[0]["area"] == 24 * 32
    id = session.id
    assert world.inference.called("add") == [
        [id, 2, 7, [[0.25, 0.5]], [1], None, False],
        [id, 3, 0, [[0.5, 0.5]], [0], [0, 0, 1, 1], True],
    ]
    assert world.inference.called("add_mask") == [[id, 4, 0, {"size": (24, 32), "counts": "o0"}]]
    assert world.inference.called("clear_frame") == [[id, 4, 0]]
    assert world.inference.called("preview") == [[id, 0, [[0.5, 0.5]], [1], [0, 0, 1, 1]]]
    assert world.inference.called("begin_everything") == [[id, 1, 8]]


def counts(masks):
    return {object: rle["counts"] for object, rle in masks}


def test_what_was_found_is_kept_until_its_object_is_removed(world):
    session = world.start()
    clicked = session.add_points(2, 7, POINT, [1])
    assert session.found == {2: counts(clicked)}
    session.add_points(2, 1, POINT, [1])
    tracked = {frame: counts(masks) for frame, masks in session.propagate(2)}
    assert session.found == tracked
    assert set(tracked) == set(range(10))
    before = session.nbytes
    assert before > 10 * FEATURE_BYTES + 20 * TRACKED_BYTES
    changed = session.remove(7)
    assert [frame for frame, _ in changed] == [2]
    assert session.found == {frame: {1: masks[1]} for frame, masks in tracked.items()}
    assert session.nbytes < before
    cleared = session.clear_frame(2, 1)
    assert session.found[2] == counts(cleared)
    assert session.remove(1) == []
    assert session.found == {}
    session.add_points(0, 1, POINT, [1])
    session.clear_video()
    assert session.found == {}
    world.sessions.sweep()
    assert session.nbytes == 10 * FEATURE_BYTES


def test_a_call_that_fails_changes_nothing(world):
    session = world.start()
    session.add_points(0, 1, POINT, [1])
    found = session.found
    for call in (
        lambda: session.add_points(99, 2, POINT, [1]),
        lambda: session.add_points(0, 2, POINT, [7]),
        lambda: session.add_points(0, 2, [], []),
        lambda: session.add_mask(0, 2, {"size": [1, 1], "counts": ""}),
        lambda: session.clear_frame(0, 2),
        lambda: session.propagate(10),
        lambda: session.preview(0, [], []),
    ):
        with pytest.raises(ServerError) as raised:
            call()
        assert raised.value.status == 400
    assert session.found == found
    assert not session.tracking
    assert [object["object_id"] for object in session.snapshot()["objects"]] == [1]


def test_objects_have_names_until_they_are_removed(world):
    session = world.start()
    for object in (1, 2, 3):
        session.add_points(0, object, POINT, [1])
        session.rename(object, f"number {object}")
    session.rename(3, "")
    session.remove(1)
    assert session.names == {2: "number 2"}
    session.clear_video()
    assert session.names == {}


def test_names_take_no_memory_without_end(world):
    session = world.start()
    with pytest.raises(ServerError, match="at most 200 characters, got 201"):
        session.rename(0, "a" * 201)
    for object in range(255):
        session.rename(object, "a" * 200)
    with pytest.raises(ServerError, match="At most 255 objects have names"):
        session.rename(255, "a")
    session.rename(254, "b")
    session.rename(0, "")
    session.rename(255, "a")
    assert len(session.names) == 255


def test_a_snapshot_has_what_a_page_needs_that_was_loaded_again(world):
    session = world.start()
    session.add_points(5, 3, POINT, [1])
    session.add_box(1, 0, [0, 0, 1, 1])
    session.add_mask(0, 3, {"size": [24, 32], "counts": "o0"})
    session.rename(3, "dog")
    stream = session.propagate(0)
    frame, masks = next(stream)
    snapshot = session.snapshot()
    assert snapshot["frames"][0] == (frame, masks)
    assert [frame for frame, _ in snapshot["frames"]] == [0, 1, 5]
    assert snapshot["objects"] == [
        {
            "object_id": 3,
            "name": "dog",
            "prompts": [
                {"frame_index": 0, "points": [], "labels": [], "box": None, "has_mask": True},
                {"frame_index": 5, "points": POINT, "labels": [1], "box": None, "has_mask": False},
            ],
        },
        {
            "object_id": 0,
            "name": "",
            "prompts": [{"frame_index": 1, "points": [], "labels": [], "box": [0, 0, 1, 1], "has_mask": False}],
        },
    ]
    rest = {key: value for key, value in snapshot.items() if key not in ("objects", "frames")}
    assert rest == {
        "session_id": session.id,
        "path": "gallery/clip.mp4",
        "num_frames": 10,
        "width": 32,
        "height": 24,
        "fps": 24.0,
        "is_picture": False,
        "tracking": True,
    }


# Its end.


def test_a_session_that_never_was_might_have_expired(world):
    missing(world, "never", "might have expired")


def test_a_closed_session_says_so_and_frees_the_predictor(world):
    session = world.start()
    assert world.sessions.close(session.id) is True
    assert world.inference.sessions == {}
    assert world.sessions.close(session.id) is False
    missing(world, session, "was closed")
    assert len(world.sessions) == 0


def test_a_session_that_nobody_uses_expires(make_world):
    world = make_world(session_timeout=1800)
    idle, used, swept = world.start(), world.start(), world.start()
    world.now += 1800
    assert world.sessions.get(used.id) is used
    world.now += 1
    missing(world, idle, "expired after 30 minutes without use")
    wait_for_background(world.sessions)
    assert set(world.inference.sessions) == {used.id, swept.id}
    world.sessions.sweep()
    assert set(world.inference.sessions) == {used.id}
    missing(world, swept, "expired after 30 minutes without use")
    used.add_points(0, 1, POINT, [1])
    world.now += 1799
    world.sessions.sweep()
    assert len(world.sessions) == 1


def test_a_session_does_not_expire_while_something_is_computed_for_it(world):
    session, other = world.start(), world.start()
    with held(world.inference, "next_everything") as gate:
        thread = Thread(session.everything, 0)
        gate.wait()
        waiting = Thread(other.everything, 0)
        wait_until(lambda: other.is_busy)
        world.now += 4000
        assert world.sessions.get(session.id) is session
        gate.open()
        thread.result()
        waiting.result()
    world.sessions.sweep()
    assert len(world.sessions) == 2


def test_a_session_that_is_used_while_others_are_swept_stays(world):
    session, other = world.start(), world.start()
    other.add_points(0, 1, POINT, [1])
    stream = other.propagate(0)
    world.now += 4000
    with held(world.inference, "close") as gate:
        sweeping = Thread(world.sessions.sweep)
        gate.wait()  # both were found to be due
        reading = Thread(next, stream)
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        gate.open()
        sweeping.result()
        assert reading.result()[0] == 0
    assert world.sessions.get(other.id) is other
    missing(world, session, "expired after 30 minutes without use")


def test_a_session_whose_page_was_left_ends_in_a_minute_unless_it_is_used(world):
    gone, back = world.start(), world.start()
    world.sessions.leave(gone.id)
    world.sessions.leave(back.id)
    world.now += 59
    world.sessions.sweep()
    assert len(world.sessions) == 2
    world.sessions.get(back.id)
    world.now += 1
    world.sessions.sweep()
    assert world.sessions.get(back.id) is back
    missing(world, gone, "was given back when its page was left")
    world.now += 1000
    assert world.sessions.get(back.id) is back


def test_the_reasons_of_a_thousand_are_kept(make_world):
    world = make_world(max_sessions=1100)
    started = [world.start() for _ in range(1003)]
    for session in started:
        world.sessions.close(session.id)
    for session in started[:3]:
        missing(world, session.id, "might have expired")
    for session in started[3:]:
        missing(world, session.id, "was closed")


def test_what_has_expired_is_ended_in_the_background(monkeypatch):
    monkeypatch.setattr(sessions_module, "_SWEEP", 0.01)
    sessions = Sessions(Settings(session_timeout=0.05), [Predictor(FakeInference)])
    sessions.start(CLIP, "clip.mp4")
    wait_until(lambda: len(sessions) == 0)
    sessions.shutdown()


def test_the_background_goes_on_after_an_error(monkeypatch, caplog, world):
    session = world.start()

    def fail():
        raise RuntimeError("odd")

    world.sessions.later(fail)
    wait_for_background(world.sessions)
    assert "odd" in caplog.text
    assert world.sessions.get(session.id) is session


def test_nothing_is_left_of_what_is_not_used_any_more(monkeypatch):
    monkeypatch.setattr(sessions_module, "_SWEEP", 0.01)
    threads = set(threading.enumerate())
    sessions = Sessions(Settings(), [Predictor(FakeInference)])
    sessions.start(CLIP, "clip.mp4")
    wait_for_background(sessions)
    (thread,) = set(threading.enumerate()) - threads
    reference = weakref.ref(sessions)
    del sessions
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert reference() is None


def test_shutdown_ends_everything_and_refuses_what_comes_later(make_world):
    world = make_world(2)
    threads = threading.active_count()
    started = [world.start(), world.start()]
    assert threading.active_count() == threads + 1
    world.sessions.shutdown()
    assert [made[0].is_shut for made in world.made] == [True, True]
    for session in started:
        missing(world, session, "was closed")
    with pytest.raises(Busy, match="The server is stopping"):
        world.start()
    assert len(world.sessions) == 0
    wait_until(lambda: threading.active_count() == threads)
    world.sessions.shutdown()
