"""How many sessions there may be, when they end, and what is said of them then."""

import gc
import threading
import uuid
import weakref
from pathlib import Path

import pytest
from server.fake_inference import FEATURE_BYTES, TRACKED_BYTES, FakeInference
from server.test_metrics import parsed
from server.waiting import Thread, held, settle, wait_until

from omniops.server import sessions as sessions_module
from omniops.server.errors import Busy, NotFound, ServerError, TooLarge
from omniops.server.predictors import Predictor, StartError
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

CLIP = Path("clip.mp4")
POINT = [[0.5, 0.5]]


class World:
    """Sessions over predictors that compute nothing, with a clock of their own."""

    def __init__(self, devices=1, **settings):
        self.now = 1000.0
        self.made = [[] for _ in range(devices)]
        self.errors = [[] for _ in range(devices)]
        self.predictors = [Predictor(self._maker(i), f"cuda:{i}") for i in range(devices)]
        self.sessions = Sessions(Settings(**settings), self.predictors, clock=lambda: self.now)

    def _maker(self, i):
        def make():
            if self.errors[i]:
                raise self.errors[i].pop(0)
            self.made[i].append(FakeInference())
            return self.made[i][-1]

        return make

    @property
    def inference(self):
        """That of the first device."""
        return self.made[0][-1]

    def start(self, name="gallery/clip.mp4", **given):
        return self.sessions.start(CLIP, name, **given)


@pytest.fixture
def make_world():
    worlds = []

    def make(*args, **settings):
        worlds.append(World(*args, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.sessions.shutdown()
        assert all(inference.overlaps == [] for made in world.made for inference in made)


@pytest.fixture
def world(make_world):
    return make_world()


def missing(world, id, reason):
    for use in (world.sessions.get, getattr(id, "add_points", None)):
        if use is None:
            continue
        with pytest.raises(NotFound) as raised:
            use(getattr(id, "id", id)) if use == world.sessions.get else use(0, 1, POINT, [1])
        assert raised.value.message == f"Cannot find session ID; it {reason}"
        assert raised.value.status == 404


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
    both = session.clear_frame(4, 0)
    assert [object for object, _ in both] == [7, 0]
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
    assert world.inference.called("everything") == [[id, 1, 8]]


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
    assert session.found == {frame: {1: each[1]} for frame, each in tracked.items()}
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


def test_a_closed_session_is_told_so_and_frees_the_predictor(world):
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
    settle(world.sessions)
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
    with held(world.inference, "everything") as gate:
        thread = Thread(session.everything, 0)
        gate.wait()
        waiting = Thread(other.everything, 0)
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        world.now += 4000
        assert world.sessions.get(session.id) is session
        gate.open()
        thread.result()
        waiting.result()
    world.sessions.sweep()
    assert len(world.sessions) == 2


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


def test_the_reasons_of_a_thousand_are_remembered(make_world):
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
    settle(world.sessions)
    assert "odd" in caplog.text
    assert world.sessions.get(session.id) is session


def test_nothing_is_left_of_what_is_not_used_any_more(monkeypatch):
    monkeypatch.setattr(sessions_module, "_SWEEP", 0.01)
    threads = set(threading.enumerate())
    sessions = Sessions(Settings(), [Predictor(FakeInference)])
    sessions.start(CLIP, "clip.mp4")
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


# How many there may be.


def test_when_all_are_in_use_one_more_is_refused(make_world):
    world = make_world(max_sessions=2)
    world.start()
    world.now += 60
    world.start()
    with pytest.raises(Busy, match="All 2 sessions") as raised:
        world.start()
    assert raised.value.status == 503
    assert len(world.sessions) == 2


def test_the_one_that_was_idle_longest_makes_room(make_world):
    world = make_world(max_sessions=3)
    first, second, third = (world.start() for _ in range(3))
    world.now += 1
    second.add_points(0, 1, POINT, [1])
    world.now += 1
    world.sessions.get(first.id)
    world.now += 61
    fourth = world.start()
    missing(world, third, "made room for another session")
    assert set(world.inference.sessions) == {first.id, second.id, fourth.id}
    fifth = world.start()
    missing(world, second, "made room for another session")
    assert set(world.inference.sessions) == {first.id, fourth.id, fifth.id}


def test_one_whose_page_was_left_makes_room_at_once(make_world):
    world = make_world(max_sessions=2)
    first, second = world.start(), world.start()
    world.sessions.leave(second.id)
    world.start()
    assert world.sessions.get(first.id) is first
    missing(world, second, "made room for another session")


def test_one_that_is_busy_makes_no_room(make_world):
    world = make_world(max_sessions=1)
    session = world.start()
    with held(world.inference, "everything") as gate:
        thread = Thread(session.everything, 0)
        gate.wait()
        world.now += 100
        with pytest.raises(Busy):
            world.start()
        gate.open()
        thread.result()


def test_threads_that_start_at_once_do_not_exceed_the_limit(make_world):
    world = make_world(2, max_sessions=5)
    barrier, most = threading.Barrier(16), []

    def start():
        barrier.wait(10)
        try:
            return world.start()
        except Busy:
            return None
        finally:
            most.append(sum(len(made[0].sessions) for made in world.made if made))

    started = [session for session in [thread.result() for thread in [Thread(start) for _ in range(16)]] if session]
    assert len(started) == 5 == len(world.sessions)
    assert max(most) <= 5
    assert sorted(len(made[0].sessions) for made in world.made) == [2, 3]


def test_sessions_are_spread_over_the_predictors(make_world):
    world = make_world(3)
    started = [world.start() for _ in range(7)]
    assert [len(made[0].sessions) for made in world.made] == [3, 2, 2]
    for session in started[1::3]:
        world.sessions.close(session.id)
    assert world.start().predictor is world.predictors[1]


def test_a_start_that_fails_takes_no_place(make_world):
    world = make_world(max_sessions=1)
    for _ in range(3):
        with pytest.raises(ServerError, match="cannot be read"):
            world.sessions.start(Path("broken.mp4"), "broken.mp4")
    world.start()


def test_a_file_that_is_gone_is_told_without_its_path(world, caplog):
    world.start()
    world.inference.errors["open"] = FileNotFoundError(2, "No such file", "/secret/clip.mp4")
    with pytest.raises(NotFound) as raised:
        world.start()
    assert raised.value.message == "This file cannot be read."
    assert "/secret/clip.mp4" in caplog.text


def test_another_device_serves_where_one_does_not_start(make_world):
    world = make_world(2)
    world.errors[0] = [MemoryError()]
    assert [world.start().predictor for _ in range(3)] == [world.predictors[1]] * 3
    assert world.predictors[0].failure is not None
    world.errors[0], world.errors[1] = [MemoryError()] * 2, []
    world.made[1][0].dead = True
    world.errors[1] = [FileNotFoundError("/secret"), FileNotFoundError("/secret")]
    with pytest.raises(StartError, match=r"not enough memory|not there") as raised:
        world.start()
    assert "secret" not in raised.value.message
    with pytest.raises(StartError):
        world.start()
    assert world.start() is not None
    assert len(world.sessions) == 1


# How much memory they may have.


def test_a_video_that_needs_more_than_all_may_have_is_refused(make_world):
    world = make_world(max_session_bytes=10 * FEATURE_BYTES - 1)
    with pytest.raises(TooLarge) as raised:
        world.start()
    assert raised.value.status == 413
    assert len(world.sessions) == 0
    assert world.inference.sessions == {}


def test_an_idle_session_makes_room_for_the_bytes_of_another(make_world):
    world = make_world(max_session_bytes=25 * FEATURE_BYTES)
    first, second = world.start(), world.start()
    with pytest.raises(Busy, match="memory"):
        world.start()
    assert set(world.inference.sessions) == {first.id, second.id}
    world.now += 61
    world.sessions.get(first.id)
    third = world.start()
    missing(world, second, "made room for another session")
    assert set(world.inference.sessions) == {first.id, third.id}
    assert world.sessions.nbytes == 20 * FEATURE_BYTES


def test_tracking_ends_by_name_where_it_would_need_more(make_world):
    world = make_world(max_session_bytes=10 * FEATURE_BYTES + 600)
    session = world.start()
    session.add_points(0, 1, POINT, [1])
    stream = session.propagate(0)
    with pytest.raises(Busy, match="need all the memory"):
        list(stream)
    assert 1 < len(session.found) < 10
    assert list(stream) == []
    assert not session.tracking
    assert world.inference.sessions[session.id].parts is None
    with pytest.raises(Busy):
        session.propagate(0)
    session.clear_video()
    session.add_points(0, 1, POINT, [1])
    assert len(list(zip(session.propagate(0), range(2), strict=False))) == 2


# Figures.


def test_the_figures_count_sessions_clicks_frames_and_memory(make_world):
    world = make_world(2)
    session, _, third = world.start(), world.start(), world.start()
    session.add_points(0, 1, POINT, [1])
    assert len(list(session.propagate(4))) == 11
    world.sessions.close(third.id)
    figures = {
        key: value for _, _, samples in parsed(world.sessions.metrics_text()).values() for key, value in samples.items()
    }
    assert figures["omniops_sessions", ()] == 2
    assert figures["omniops_frames_total", ()] == 11
    assert figures["omniops_frames_per_second", ()] == pytest.approx(1.1)
    assert figures["omniops_clicks_total", ()] == 1
    assert figures["omniops_queue", ()] == 0
    assert figures["omniops_session_bytes", ()] == world.sessions.nbytes
    assert figures["omniops_device_memory_bytes", (("device", "cuda:0"),)] == 10 * FEATURE_BYTES + 10 * TRACKED_BYTES
    assert figures["omniops_device_memory_bytes", (("device", "cuda:1"),)] == 10 * FEATURE_BYTES


def test_a_click_is_as_long_as_its_wait(world):
    session = world.start()
    with world.predictors[0].turns.frame():
        thread = Thread(session.add_points, 0, 1, POINT, [1])
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        assert parsed(world.sessions.metrics_text())["omniops_queue"][2]["omniops_queue", ()] == 1
        world.now += 3
    thread.result()
    summary = parsed(world.sessions.metrics_text())["omniops_click_seconds"][2]
    assert summary["omniops_click_seconds_sum", ()] == 3


def test_predictors_on_the_same_device_are_one_figure(world):
    sessions = Sessions(Settings(), [Predictor(FakeInference, "cuda:0"), Predictor(FakeInference, "cuda:0")])
    for _ in range(2):
        sessions.start(CLIP, "clip.mp4")
    samples = parsed(sessions.metrics_text())["omniops_device_memory_bytes"][2]
    assert samples == {("omniops_device_memory_bytes", (("device", "cuda:0"),)): 20 * FEATURE_BYTES}
    sessions.shutdown()
