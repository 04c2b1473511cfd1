"""What is said of sessions whose predictor died, or which belong to the process that this one was forked from."""

import os
import threading
import warnings

import pytest
from server.test_session_races import CHANGES, frames
from server.waiting import Gate, Thread, wait_for_background, wait_until
from server.world import CLIP, POINT

from omniops.sam2 import RemoteError
from omniops.server.errors import Busy, NotFound
from omniops.server.predictors import DiedError

DIED = "Cannot find session ID; it ended when the process of its model died"


def test_a_death_in_a_click_ends_the_sessions_of_that_predictor_by_name(make_world):
    world = make_world(2)
    first, second, third, fourth = (world.start() for _ in range(4))
    assert first.predictor is third.predictor is not second.predictor
    second.add_points(0, 1, POINT, [1])
    stream = second.propagate(0)
    world.inference.dead = True
    for session in (first, third):
        with pytest.raises(NotFound) as raised:
            session.add_points(0, 1, POINT, [1])
        assert raised.value.message == DIED
        with pytest.raises(NotFound, match="the process of its model died"):
            world.sessions.get(session.id)
        assert not world.sessions.close(session.id)
    assert frames(stream) == list(range(10))
    assert world.sessions.get(fourth.id) is fourth
    assert len(world.made[0]) == 1
    anew = world.start()
    assert anew.predictor is world.predictors[0]
    assert len(world.made[0]) == 2
    anew.add_points(0, 1, POINT, [1])
    assert "omniops_predictor_restarts_total 1\n" in world.sessions.metrics_text()


def test_a_death_in_the_middle_of_a_stream_is_an_error_for_its_reader(world, session):
    other = world.start()
    stream = session.propagate(0)
    next(stream)

    def die(name, *args):
        if name == "next":
            world.inference.dead = True
            raise RemoteError("killed. It last wrote: /secret")

    gate = Gate(world.inference, "next")
    world.inference.before = lambda *args: (gate(*args), die(*args))
    reader = Thread(frames, stream)
    gate.wait()
    click = Thread(other.add_points, 0, 1, POINT, [1])
    wait_until(lambda: world.predictors[0].turns.waiting == 1)
    gate._go.set()
    for thread in (reader, click):
        with pytest.raises(NotFound) as raised:
            thread.result()
        assert raised.value.message == DIED
    assert list(stream) == []
    stream.close()
    assert len(world.sessions) == 0


@pytest.mark.parametrize(
    "use",
    [
        *CHANGES.values(),
        lambda session: session.preview(0, POINT, [1]),
        lambda session: session.everything(0),
        lambda session: session.propagate(0),
        lambda session: session.snapshot(),
    ],
)
def test_every_use_tells_of_a_death_by_name(world, session, use):
    if use is CHANGES["failing"]:
        use = CHANGES["add"]
    world.inference.dead = True
    for _ in range(2):
        with pytest.raises(NotFound) as raised:
            use(session)
        assert raised.value.message == DIED


def test_a_death_is_noticed_while_nobody_uses_the_session(world, session):
    world.inference.dead = True
    world.now += 100
    world.predictors[0]._memory_time -= 10
    world.sessions.sweep()
    with pytest.raises(NotFound, match="the process of its model died"):
        world.sessions.get(session.id)


def test_a_start_after_a_death_that_nobody_noticed_succeeds(world, session):
    stream = session.propagate(0)
    world.inference.dead = True
    anew = world.start()
    anew.add_points(0, 1, POINT, [1])
    with pytest.raises(NotFound, match="the process of its model died"):
        next(stream)
    assert len(world.sessions) == 1


def test_a_file_that_kills_the_process_is_not_tried_twice(world, session):
    world.inference.errors["open"] = RemoteError("killed. It last wrote: /secret")
    with pytest.raises(Busy, match="died while it opened this") as raised:
        world.start()
    assert "secret" not in raised.value.message
    assert len(world.sessions) == 0
    with pytest.raises(NotFound, match="the process of its model died"):
        session.cancel() or session.snapshot()
    world.start()
    assert len(world.made[0]) == 2


def test_a_death_right_after_a_session_was_opened_ends_that_too(world, session):
    opened = threading.Event()

    def before(name, *args):
        if name == "memory" and opened.is_set():
            raise RemoteError("killed")
        if name == "open":
            opened.set()

    world.inference.before = before
    with pytest.raises(Busy):
        world.start()
    assert len(world.sessions) == 0


def test_a_session_that_the_predictor_forgot_ends_by_name(world, session):
    world.inference.sessions.clear()
    with pytest.raises(NotFound) as raised:
        session.add_points(0, 1, POINT, [1])
    assert raised.value.message == DIED
    assert len(world.sessions) == 0
    assert len(world.made[0]) == 1


def test_another_key_error_is_no_lost_session(world, session):
    world.inference.errors["add"] = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        session.add_points(0, 1, POINT, [1])
    assert world.sessions.get(session.id) is session


def test_after_a_shutdown_everything_is_refused_by_name(world, session):
    stream = session.propagate(0)
    world.sessions.shutdown()
    assert list(stream) == []
    with pytest.raises(NotFound, match="was closed"):
        session.snapshot()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_forked_process_starts_with_no_sessions(world, session):
    stream = session.propagate(0)
    next(stream)

    def check():
        sessions = world.sessions
        if len(sessions) or sessions.nbytes or sessions.tracking:
            return False
        try:
            sessions.get(session.id)
            return False
        except NotFound:
            pass
        try:
            session.add_points(0, 1, POINT, [1])
            return False
        except DiedError:
            pass
        own = sessions.start(CLIP, "clip.mp4")
        own.add_points(0, 1, POINT, [1])
        is_right = frames(own.propagate(0)) == list(range(10)) and len(sessions) == 1 and len(world.made[0]) == 2
        wait_for_background(sessions)  # its own thread runs
        return is_right

    with warnings.catch_warnings(), world.sessions._lock, world.predictors[0].turns.frame():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork among threads: this is what is tested
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = 0 if check() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert frames(stream) == list(range(1, 10))
    assert len(world.sessions) == 1
