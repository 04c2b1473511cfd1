import gc
import itertools
import json
import logging
import threading

import pytest
from server.client import ORIGIN, Api, Parser, frames

from omniops.server import stream
from omniops.server.errors import ServerError

MASK = {"size": [2, 3], "counts": "06"}


def produced(*items):
    """An iterator of the items, which raises those that are exceptions."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def test_a_body_part_without_objects():
    assert stream.body_part(3, []).endswith(b'Content-Length: 33\r\n\r\n{"frame_index": 3, "results": []}')


def test_the_first_part_is_computed_before_anything_is_answered():
    with pytest.raises(ServerError, match="nothing to track"):
        stream.MultipartStream(produced(ServerError("nothing to track")))
    frames = produced((0, []), (1, []))
    body = stream.MultipartStream(frames)
    assert next(frames) == (1, [])
    assert list(body) == [stream.body_part(0, [])]


def test_a_propagation_of_nothing_is_an_empty_stream():
    assert list(stream.MultipartStream(produced())) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ServerError("Cannot find session ID; it expired"), "Cannot find session ID; it expired"),
        (ZeroDivisionError("/secret"), "An unknown error occurred."),
    ],
)
def test_an_error_in_the_middle_ends_inside_of_a_part_after_its_words(error, message, caplog):
    with caplog.at_level(logging.ERROR):
        chunks = list(stream.MultipartStream(produced((0, [(1, MASK)]), error)))
    assert chunks[0] == stream.body_part(0, [(1, MASK)])
    parser = Parser(stream.CONTENT_TYPE)
    (first, last) = itertools.chain.from_iterable(map(parser.push, chunks))
    assert json.loads(first[1])["frame_index"] == 0
    assert not last[0]["Content-Type"].startswith("application/json")
    assert json.loads(last[1]) == {"error": {"message": message}}
    with pytest.raises(EOFError):
        parser.end()
    assert ("/secret" in caplog.text) == isinstance(error, ZeroDivisionError)


def test_after_an_error_there_is_nothing():
    body = stream.MultipartStream(produced((0, []), ServerError("over"), (1, [])))
    assert len(list(body)) == 2
    assert list(body) == []


def test_closing_ends_the_propagation_once():
    ended = []

    def endless():
        try:
            for frame in itertools.count():
                yield frame, []
        finally:
            ended.append("frames")

    body = stream.MultipartStream(endless(), on_close=lambda: ended.append("slot"))
    next(body)
    body.close()
    body.close()
    assert ended == ["frames", "slot"]
    assert list(body) == []


def test_a_stream_that_nobody_closes_gives_its_slot_back():
    ended = []
    body = stream.MultipartStream(produced((0, [])), on_close=lambda: ended.append("slot"))
    del body
    gc.collect()
    assert ended == ["slot"]


def test_slots_come_back_however_often_garbage_is_collected():
    slots = stream.StreamSlots(2)
    taken = []

    def begin_and_forget():
        for _ in range(200):
            while not slots.take(0):  # until what was forgotten is collected
                pass
            forgotten = [stream.MultipartStream(produced((0, [])), slots.give_back)]
            forgotten.append(forgotten)
            del forgotten
            taken.append(True)

    thread = threading.Thread(target=begin_and_forget, daemon=True)
    before = gc.get_threshold()
    gc.set_threshold(1)  # at almost every step, also within take() and give_back()
    try:
        thread.start()
        thread.join(20)
    finally:
        gc.set_threshold(*before)
    assert len(taken) == 200
    gc.collect()
    assert [slots.take(0) for _ in range(3)] == [True, True, False]


def test_who_stalled_longest_makes_room_but_nobody_who_reads(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("omniops.server.stream.time.monotonic", lambda: now[0])
    slots = stream.StreamSlots(3)
    broken_off = []
    streams = {}

    def begin(name):
        assert slots.take(0)
        body = stream.MultipartStream(produced(*((frame, []) for frame in range(9))), slots.give_back)
        body.break_off = lambda: (broken_off.append(name), body.close())
        slots.watch(body)
        streams[name] = body
        next(body)

    for name in ("first", "second", "reads"):
        begin(name)
        now[0] += 1
    now[0] += 6.5  # the first has stalled for 9.5 seconds
    next(streams["reads"])
    assert not slots.take(0)
    assert broken_off == []
    now[0] += 1
    begin("third")
    assert broken_off == ["first"]
    now[0] += 1
    begin("fourth")
    assert broken_off == ["first", "second"]
    assert not slots.take(0)


def tracked(api, object_id=0):
    """A session with an object."""
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, object_id, [[0.5, 0.5]])
    return session


def test_the_order_of_frames(api):
    session = tracked(api)
    assert [frame["frame_index"] for frame in api.propagate(session)] == list(range(10))
    assert [frame["frame_index"] for frame in api.propagate(session, 7)] == [7, 8, 9, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [frame["frame_index"] for frame in api.propagate(session, 9)] == [9, *range(9, -1, -1)]


def test_cancelling_ends_the_stream_without_the_part_that_was_being_computed(app, api, inference):
    session = tracked(api)
    chunks = iter(api.post_propagate(session).response)
    next(chunks)
    computing, go_on = threading.Event(), threading.Event()

    def before(name, *args):
        if name == "next":
            computing.set()
            assert go_on.wait(10)

    inference.before = before
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(chunks))
    reader.start()
    assert computing.wait(10)
    assert Api(app.test_client()).cancel(session) is True  # while the part is being computed
    assert reader.is_alive()
    go_on.set()
    reader.join(10)
    assert rest == []


def test_a_click_ends_the_stream_between_two_parts(api):
    session = tracked(api)
    response = api.post_propagate(session)
    chunks = iter(response.response)
    first = next(chunks)
    api.add_points(session, 0, 1, [[0.1, 0.1]])
    assert len(list(frames(response.headers["Content-Type"], [first, *chunks]))) == 1


def test_a_client_that_goes_away_ends_its_propagation(app, api, inference):
    session = tracked(api)
    response = api.post_propagate(session)
    next(iter(response.response))
    response.close()
    assert not app.extensions["omniops"].sessions.get(session).tracking
    asked = len(inference.called("next"))
    assert asked < 10
    assert [frame["frame_index"] for frame in api.propagate(session)] == list(range(10))


def test_only_so_many_are_tracked_at_once(make_app, monkeypatch):
    monkeypatch.setattr("omniops.server.web._STREAM_PATIENCE", 0.05)
    api = Api(make_app(max_streams=2).test_client())
    sessions = [tracked(api) for _ in range(3)]
    running = [api.post_propagate(session) for session in sessions[:2]]
    refused = api.post_propagate(sessions[2])
    assert refused.status_code == 503
    assert refused.json["error"]["message"] == "2 videos are tracked right now, which is all that the server does"
    assert refused.headers["Retry-After"] == "10"
    running[0].close()
    assert len(list(api.propagate(sessions[2]))) == 10
    running[1].close()
    for session in sessions * 2:  # neither ends nor errors keep a slot
        assert len(list(api.propagate(session))) == 10
        assert api.post_propagate(session, 99).status_code == 400
        assert api.post_propagate("unknown").status_code == 404


def test_tracking_again_ends_the_stream_before(api):
    session = tracked(api)
    chunks = iter(api.post_propagate(session).response)
    next(chunks)
    again = api.post_propagate(session)
    assert list(chunks) == []
    assert len(list(again.response)) == 10


def test_a_session_that_dies_says_so_in_its_stream(api, inference):
    session = tracked(api)
    response = api.post_propagate(session)
    chunks = iter(response.response)
    parser = Parser(response.headers["Content-Type"])
    parser.push(next(chunks))
    inference.dead = True
    ((headers, body),) = itertools.chain.from_iterable(map(parser.push, chunks))
    assert headers["Content-Type"] == "application/problem+json; charset=utf-8"
    assert json.loads(body)["error"]["message"].startswith("Cannot find session ID; it ended when")
    with pytest.raises(EOFError):
        parser.end()


def test_a_model_that_fails_at_the_first_part_is_an_error_that_the_page_can_read(api, inference, caplog):
    session = tracked(api)
    inference.errors["next"] = RuntimeError("/secret")
    response = api.post_propagate(session)
    assert (response.status_code, response.json) == (500, {"error": {"message": "An unknown error occurred."}})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "/secret" in caplog.text
