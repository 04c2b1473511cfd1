"""How many sessions there may be, on which predictors they are, and the figures of them."""

import threading
from pathlib import Path

import pytest
from server.fake_inference import FEATURE_BYTES, TRACKED_BYTES, FakeInference
from server.test_metrics import parsed
from server.waiting import Thread, hasty, held, wait_until
from server.world import CLIP, POINT, missing

from omniops.server.errors import Busy, NotFound, ServerError, TooLarge
from omniops.server.predictors import Predictor, StartError
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

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
    with held(world.inference, "next_everything") as gate:
        thread = Thread(session.everything, 0)
        gate.wait()
        world.now += 100
        with pytest.raises(Busy):
            world.start()
        gate.open()
        thread.result()


def test_threads_that_start_at_once_do_not_exceed_the_limit(make_world):
    world = make_world(2, max_sessions=5)
    barrier, counts = threading.Barrier(16), []

    def start():
        barrier.wait(10)
        try:
            return world.start()
        except Busy:
            return None
        finally:
            counts.append(sum(len(made[0].sessions) for made in world.made if made))

    with hasty():
        answers = [thread.result() for thread in [Thread(start) for _ in range(16)]]
    started = [session for session in answers if session is not None]
    assert len(started) == 5 == len(world.sessions)
    assert max(counts) <= 5
    assert sorted(len(made[0].sessions) for made in world.made) == [2, 3]


def test_a_session_that_is_just_open_counts_once(make_world):
    world = make_world(max_sessions=2)
    world.sessions.close(world.start().id)
    with held(world.inference, "memory") as gate:
        first = Thread(world.start)
        gate.wait()  # it is open, but its start has not returned
        assert len(world.sessions) == 1
        second = Thread(world.start)
        wait_until(lambda: world.predictors[0].turns.waiting == 1 or not second.is_alive())
        gate.open()
        assert first.result() is not second.result()
    assert len(world.sessions) == 2


def test_sessions_are_spread_over_the_predictors(make_world):
    world = make_world(3)
    started = [world.start() for _ in range(7)]
    assert [len(made[0].sessions) for made in world.made] == [3, 2, 2]
    for session in started[1::3]:
        world.sessions.close(session.id)
    assert world.start().predictor is world.predictors[1]


def test_a_start_that_fails_does_not_count(make_world):
    world = make_world(max_sessions=1)
    for _ in range(3):
        with pytest.raises(ServerError, match="cannot be read"):
            world.sessions.start(Path("broken.mp4"), "broken.mp4")
    world.start()


def test_a_file_that_is_gone_is_named_without_its_path(world, caplog):
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
    assert world.inference.sessions[session.id].pending is None
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
