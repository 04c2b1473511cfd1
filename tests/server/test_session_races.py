"""Propagations, and everything that may happen to one at a bad moment: each moment is made by a gate, not awaited."""

import gc
import random
from pathlib import Path

import pytest
from server.fake_inference import BATCHES
from server.waiting import Thread, hasty, held, wait_for_background, wait_until
from server.world import POINT

from omniops.server.errors import Busy, NotFound, ServerError


def frames(stream):
    return [frame for frame, _ in stream]


def begun(world, session):
    """Whether the predictor has a propagation of the session."""
    return world.inference.sessions[session.id].pending is not None


# From its beginning to its end.


def test_frames_come_to_the_end_and_then_back_to_the_beginning(world, session):
    stream = session.propagate(7)
    assert stream.total == 11
    assert session.tracking
    assert frames(stream) == [7, 8, 9, 7, 6, 5, 4, 3, 2, 1, 0]
    assert not session.tracking
    assert not begun(world, session)
    assert list(stream) == []
    assert frames(session.propagate()) == list(range(10))


def test_without_an_object_there_is_nothing_to_track(world):
    session = world.start()
    with pytest.raises(ServerError, match="There is nothing to track") as raised:
        session.propagate(0)
    assert raised.value.status == 400
    assert not session.tracking


def test_each_part_is_computed_when_it_is_asked_for(world, session):
    stream = session.propagate(0)
    assert world.inference.called("next") == []
    next(stream)
    next(stream)
    assert len(world.inference.called("next")) == 2


@pytest.mark.parametrize("error", [ValueError("Frame 2 cannot be decoded."), RuntimeError("odd"), MemoryError()])
def test_a_part_that_fails_ends_the_stream_with_its_error(world, session, error):
    kind = {ValueError: ServerError, RuntimeError: RuntimeError, MemoryError: Busy}[type(error)]
    stream = session.propagate(0)
    next(stream)
    world.inference.errors["next"] = error
    with pytest.raises(kind) as raised:
        next(stream)
    assert type(raised.value) is kind
    assert list(stream) == []
    wait_for_background(world.sessions)
    assert not session.tracking
    assert not begun(world, session)
    assert frames(session.propagate(0)) == list(range(10))


# A reader that stalls or vanishes.


def test_who_stops_reading_holds_no_turn(world, session):
    other = world.start()
    stream = session.propagate(0)
    next(stream)
    turns = world.predictors[0].turns
    with turns.click(timeout=0), pytest.raises(TimeoutError), turns.click(timeout=0):
        pass
    other.add_points(0, 1, POINT, [1])
    assert frames(other.propagate(0)) == list(range(10))
    assert session.tracking
    assert len(frames(stream)) == 9


def test_a_stream_that_is_closed_frees_its_slot(world, session):
    stream = session.propagate(0)
    next(stream)
    stream.close()
    assert not begun(world, session)
    assert not session.tracking
    assert list(stream) == []
    stream.close()
    assert len(world.inference.called("stop")) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_a_stream_that_is_dropped_frees_its_slot(world, session, count):
    stream = session.propagate(0)
    for _ in range(count):
        next(stream)
    with world.predictors[0].turns.frame():  # garbage is collected by any thread, also one that has a turn
        del stream
        gc.collect()
        assert not session.tracking
    wait_for_background(world.sessions)
    assert not begun(world, session)


def test_a_generator_over_it_that_is_dropped_frees_its_slot(world, session):
    def body():
        for frame, _ in session.propagate(0):
            yield frame

    generator = body()
    assert next(generator) == 0
    generator.close()
    del generator
    gc.collect()
    wait_for_background(world.sessions)
    assert not begun(world, session)
    assert not session.tracking


def test_a_stalled_stream_does_not_keep_its_session(world, session):
    stream = session.propagate(0)
    next(stream)
    world.now += 2000
    world.sessions.sweep()
    assert len(world.sessions) == 0
    with pytest.raises(NotFound, match="expired after 30 minutes without use"):
        next(stream)
    assert list(stream) == []


def test_a_stream_that_goes_on_keeps_its_session(world, session):
    stream = session.propagate(0)
    for _ in range(10):
        world.now += 1700
        next(stream)
        world.sessions.sweep()
    assert world.sessions.get(session.id) is session


# Somebody else meanwhile.


def test_a_click_waits_for_the_frame_in_progress_alone(world):
    tracked = [world.start() for _ in range(3)]
    clicked = world.start()
    for session in tracked:
        session.add_points(0, 1, POINT, [1])
    streams = [session.propagate(0) for session in tracked]
    turns = world.predictors[0].turns
    before = len(world.inference.calls)
    with held(world.inference, "next") as gate:
        readers = [Thread(frames, streams[0])]
        gate.wait()
        readers += [Thread(frames, stream) for stream in streams[1:]]
        wait_until(lambda: turns.waiting == 2)
        click = Thread(clicked.add_points, 0, 1, POINT, [1])
        wait_until(lambda: turns.waiting == 3)
        gate.open()
        click.result()
        for reader in readers:
            assert reader.result() == list(range(10))
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    assert calls[:2] == ["next", "add"]


def test_a_click_goes_before_what_only_hovers_or_looks_for_everything(world, session):
    turns = world.predictors[0].turns
    others = [world.start() for _ in range(2)]
    before = len(world.inference.calls)
    with turns.frame():
        threads = [Thread(others[0].preview, 0, POINT, [1])]
        wait_until(lambda: turns.waiting == 1)
        threads.append(Thread(others[1].everything, 0))
        wait_until(lambda: turns.waiting == 2)
        threads.append(Thread(session.add_points, 0, 1, POINT, [1]))
        wait_until(lambda: turns.waiting == 3)
    for thread in threads:
        thread.result()
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    assert calls == ["add", "preview", "begin_everything", *["next_everything"] * BATCHES]


def test_a_click_waits_for_one_batch_of_points_and_a_search_for_the_one_before(world, session):
    others = [world.start() for _ in range(2)]
    before = len(world.inference.calls)
    with held(world.inference, "next_everything") as gate:
        first = Thread(others[0].everything, 0)
        gate.wait()
        click = Thread(session.add_points, 0, 1, POINT, [1])
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        second = Thread(others[1].everything, 0)
        wait_until(lambda: others[1].is_busy)
        gate.open()
        for thread in (first, click, second):
            thread.result()
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    search = ["begin_everything", *["next_everything"] * BATCHES]
    assert calls == [*search[:2], "add", *search[2:], *search]


def test_a_session_that_is_closed_ends_its_search_for_everything(world, session):
    with held(world.inference, "next_everything") as gate:
        search = Thread(session.everything, 0)
        gate.wait()
        closing = Thread(world.sessions.close, session.id)
        wait_until(lambda: session.ended is not None)
        gate.open()
        assert closing.result()
        with pytest.raises(NotFound):
            search.result()
    assert world.start().everything(0)


def test_cancel_does_not_wait_for_the_part_that_is_computed(world, session):
    stream = session.propagate(0)
    assert next(stream)[0] == 0
    with held(world.inference, "next") as gate:
        reader = Thread(frames, stream)
        gate.wait()
        session.cancel()
        assert not session.tracking
        gate.open()
        assert reader.result() == []  # without the part
    wait_for_background(world.sessions)
    assert set(session.found) == {0}
    assert not begun(world, session)


def test_cancel_of_a_stream_that_nobody_reads_frees_its_slot(world, session):
    stream = session.propagate(0)
    next(stream)
    session.cancel()
    wait_for_background(world.sessions)
    assert not begun(world, session)
    assert list(stream) == []


def test_cancel_where_nothing_runs_is_nothing(world, session):
    session.cancel()
    assert frames(session.propagate(0)) == list(range(10))
    session.cancel()


def test_cancel_of_what_has_not_begun(world, session):
    with world.predictors[0].turns.frame():
        beginning = Thread(session.propagate, 0)
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        session.cancel()
    stream = beginning.result()
    assert (stream.total, list(stream)) == (0, [])
    assert world.inference.called("begin") == []


def failing(session):
    with pytest.raises(ServerError):
        session.add_points(99, 2, POINT, [1])


CHANGES = {
    "add": lambda session: session.add_points(3, 2, POINT, [1]),
    "box": lambda session: session.add_box(3, 2, [0, 0, 1, 1]),
    "mask": lambda session: session.add_mask(3, 2, {"size": [24, 32], "counts": "o0"}),
    "clear_frame": lambda session: session.clear_frame(0, 1),
    "clear_video": lambda session: session.clear_video(),
    "remove": lambda session: session.remove(1),
    "failing": failing,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_ends_the_propagation_first(world, session, change):
    stream = session.propagate(0)
    next(stream)
    before = len(world.inference.calls)
    with held(world.inference, "next") as gate:
        reader = Thread(frames, stream)
        gate.wait()
        changing = Thread(change, session)
        wait_until(lambda: not session.tracking)
        gate.open()
        assert reader.result() == []
        changing.result()
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    assert calls[:2] == ["next", "stop"]
    assert len(calls) == 3
    assert 1 not in session.found


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_parts_ends_the_stream_there(world, session, change):
    stream = session.propagate(0)
    next(stream)
    before = len(world.inference.calls)
    change(session)
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    assert calls[0] == "stop"
    assert len(calls) == 2
    assert list(stream) == []
    assert not begun(world, session)


def test_what_changes_nothing_lets_the_propagation_go_on(world, session):
    stream = session.propagate(0)
    next(stream)
    session.preview(0, POINT, [1])
    session.everything(0)
    session.snapshot()
    session.rename(1, "dog")
    assert frames(stream) == list(range(1, 10))


def test_the_second_propagation_ends_the_first(world, session):
    first = session.propagate(0)
    next(first)
    before = len(world.inference.calls)
    with held(world.inference, "next") as gate:
        reader = Thread(frames, first)
        gate.wait()
        beginning = Thread(session.propagate, 5)
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        gate.open()
        assert reader.result() == []
        second = beginning.result()
    calls = [name for name, *_ in world.inference.calls[before:] if name != "memory"]
    assert calls == ["next", "stop", "begin"]
    first.close()
    del first
    gc.collect()
    wait_for_background(world.sessions)
    assert session.tracking
    assert frames(second) == [5, 6, 7, 8, 9, 5, 4, 3, 2, 1, 0]


def test_the_second_propagation_ends_one_that_nobody_reads(world, session):
    first = session.propagate(0)
    next(first)
    before = len(world.inference.calls)
    second = session.propagate(5)
    assert [name for name, *_ in world.inference.calls[before:] if name != "memory"] == ["stop", "begin"]
    assert list(first) == []
    assert frames(second) == [5, 6, 7, 8, 9, 5, 4, 3, 2, 1, 0]


def test_closing_a_session_ends_its_propagation_quietly(world, session):
    stream = session.propagate(0)
    next(stream)
    with held(world.inference, "next") as gate:
        reader = Thread(frames, stream)
        gate.wait()
        closing = Thread(world.sessions.close, session.id)
        wait_until(lambda: len(world.sessions) == 0)
        gate.open()
        assert reader.result() == []
        assert closing.result() is True
    assert world.inference.sessions == {}
    assert list(stream) == []


def test_a_click_that_waits_while_its_session_is_closed_fails_by_name(world, session):
    with world.predictors[0].turns.frame():
        click = Thread(session.add_points, 0, 1, POINT, [1])
        wait_until(lambda: world.predictors[0].turns.waiting == 1)
        closing = Thread(world.sessions.close, session.id)
        wait_until(lambda: world.predictors[0].turns.waiting == 2)
    with pytest.raises(NotFound, match="it was closed"):
        click.result()
    closing.result()
    assert len(world.inference.called("add")) == 1


# All at once.


def do_anything(world, session, dice):
    """One of the things that people do with a session, or the death of a predictor."""
    choice = dice.randrange(12)
    if choice < 4:
        session.add_points(dice.randrange(10), dice.randrange(3), POINT, [1])
    elif choice == 4:
        session.clear_frame(dice.randrange(10), dice.randrange(3))
    elif choice == 5:
        session.remove(dice.randrange(3))
    elif choice < 8:
        list(zip(session.propagate(dice.randrange(10)), range(dice.randrange(12)), strict=False))
    elif choice == 8:
        session.cancel()
    elif choice == 9:
        world.sessions.get(session.id).snapshot()
    elif choice == 10 and dice.random() < 0.3:
        world.sessions.close(session.id)
    elif choice == 11 and dice.random() < 0.1:
        dice.choice(world.made)[-1].dead = True


def test_many_people_at_once_lose_nothing(make_world):
    """8 threads do at random what can be done, on sessions that they share; the predictors die now and then."""
    world = make_world(2, max_sessions=6)
    shared = [world.start() for _ in range(4)]
    unexpected, counted = [], {"answered": 0, "refused": 0}

    def work(seed):
        dice = random.Random(seed)
        for _ in range(150):
            i = dice.randrange(len(shared))
            try:
                do_anything(world, shared[i], dice)
                counted["answered"] += 1
            except ServerError as error:
                counted["refused"] += 1
                if isinstance(error, NotFound):
                    try:
                        shared[i] = world.sessions.start(Path("clip.mp4"), "clip.mp4")
                    except ServerError as error:
                        if not isinstance(error, Busy):
                            unexpected.append(error)
                elif error.status != 400:
                    unexpected.append(error)
            except BaseException as error:
                unexpected.append(error)

    with hasty():
        for thread in [Thread(work, seed) for seed in range(8)]:
            thread.result()
    gc.collect()
    wait_for_background(world.sessions)
    assert unexpected == []
    assert counted["answered"] > 300
    for predictor, made in zip(world.predictors, world.made, strict=True):
        assert predictor.turns.waiting == 0
        if made and not made[-1].dead:
            live = [session for session in world.sessions._sessions.values() if session.predictor is predictor]
            assert set(made[-1].sessions) == {session.id for session in live}
            for session in live:
                assert session.tracking or made[-1].sessions[session.id].pending is None
                assert not session.is_busy
                assert session._found_bytes == sum(
                    len(counts) + 120 for found in session.found.values() for counts in found.values()
                )
