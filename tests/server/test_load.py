"""Many people at once, those who stop reading, and those who vanish: the rest must not notice."""

import json
import random
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from server.client import Api, Parser
from server.running import HttpClient, Running, is_alive, resident
from server.waiting import wait_until

pytest.importorskip("gunicorn", reason="what is tested: gunicorn from PyPI")

CLIENTS = 50
PATH = "gallery/clip.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("load")
    (folder / "gallery").mkdir()
    shutil.copy(clip, folder / "gallery" / "clip.mp4")
    return folder


def _running(folder, inference, threads, **variables):
    command = [sys.executable, "-m", "server.applications", inference, "{port}", threads]
    environment = {"DATA_PATH": str(folder)} | {name: str(value) for name, value in variables.items()}
    return Running(command, folder, environment)


@pytest.fixture(scope="module")
def server(folder):
    """For all of them."""
    with _running(folder, "Delayed", 64, OMNIOPS_MAX_SESSIONS=CLIENTS + 10, OMNIOPS_MAX_STREAMS=CLIENTS) as running:
        api = running.api()
        api.close_session(api.start_session(PATH))  # the predictor has started
        yield running


@pytest.fixture(scope="module")
def large(folder):
    """Whose streams are more than a socket holds, and which sends for two seconds at most."""
    with _running(folder, "Large", 12, FRAMES=400, OMNIOPS_MAX_STREAMS=4, OMNIOPS_SEND_TIMEOUT=2) as running:
        api = running.api()
        api.close_session(api.start_session(PATH))
        yield running


def _person(server, seed, until):
    """What one person does, again and again; returns how often. Every answer is looked at."""
    rng = random.Random(seed)
    api = server.api()
    rounds = 0
    while time.monotonic() < until:
        session = api.start_session(PATH)
        objects = rng.sample(range(9), rng.randint(1, 3))
        for object_id in objects:
            found = api.add_points(session, rng.randrange(10), object_id, [[rng.random(), rng.random()]])
            assert found["rleMaskList"][-1]["objectId"] == object_id
        start = rng.choice((0, 0, 7))
        tracked = []
        stop_at = rng.choice((None, 3))
        for frame in api.propagate(session, start):
            tracked.append(frame["frame_index"])
            assert [result["object_id"] for result in frame["results"]] == objects
            if stop_at is not None and len(tracked) == stop_at:
                assert api.cancel(session)
        expected = [*range(start, 10), *(range(start, -1, -1) if start else ())]
        assert tracked == expected[: len(tracked)]
        assert stop_at is not None or tracked == expected
        if rng.random() < 0.5:
            removed = api.remove_object(session, objects[0])
            assert len(removed) == int(len(objects) > 1)
        assert api.clear_video(session)
        assert api.close_session(session)
        rounds += 1
    return rounds


def _all_at_once(server, seconds):
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(lambda seed: _person(server, seed, until), range(CLIENTS)))


def _memory(server):
    return [resident(pid) for pid in server.processes()]


@pytest.mark.slow
def test_fifty_people_at_once(server):
    assert _all_at_once(server, 3) >= CLIENTS
    figures = server.metrics()
    assert figures["omniops_sessions"] == 0
    assert figures["omniops_session_bytes"] == 0
    assert figures["omniops_queue"] == 0


@pytest.mark.slow
def test_fifty_people_for_a_minute_leave_nothing_behind(server):
    _all_at_once(server, 20)  # until all threads have run, and each holds what it keeps for the next request
    before = _memory(server)
    assert _all_at_once(server, 60) >= CLIENTS
    figures = server.metrics()
    assert figures["omniops_sessions"] == 0
    assert figures["omniops_session_bytes"] == 0
    growth = [now - then for now, then in zip(_memory(server), before, strict=True)]
    assert max(growth) < 16 * 2**20, growth


def _tracked(server, api):
    session = api.start_session(PATH)
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    return session


def _stalled(server, session):
    """A stream whose reader stops after the first part; None where as many are tracked as may be."""
    response = Api(HttpClient(server.port, receive_bytes=2**16)).post_propagate(session)
    if response.status_code == 503:
        assert "4 videos are tracked right now" in response.text
        return None
    assert response.status_code == 200
    parser = Parser(response.headers["Content-Type"])
    while not parser.push(next(response.response)):
        pass
    return response


def _begun(server, session):
    """The same, once another stream has ended."""
    return wait_until(lambda: _stalled(server, session), 10, "the end of another stream")


def _seconds(call, *arguments):
    start = time.monotonic()
    call(*arguments)
    return time.monotonic() - start


@pytest.mark.slow
def test_readers_that_stop_are_not_waited_for(large):
    api = large.api()
    stalled = [_tracked(large, api) for _ in range(4)]
    responses = [_stalled(large, session) for session in stalled]
    other = api.start_session(PATH)
    # The streams' sockets are full by now or soon; in either case the others click, and whoever stalls may cancel.
    waits = [_seconds(api.add_points, other, frame, 0, [[0.5, 0.5]]) for frame in range(10)]
    assert max(waits) < 1, waits
    assert _seconds(api.cancel, stalled[0]) < 1
    assert _seconds(api.add_points, stalled[1], 0, 1, [[0.5, 0.5]]) < 1
    # After two seconds in which they took nothing they are gone, and others may be tracked.
    again = [_begun(large, _tracked(large, api)) for _ in range(4)]
    for response in (*responses, *again):
        response.close()


def test_a_client_that_does_not_close_its_connection_keeps_nobody_waiting(large):
    click = _post(json.dumps({"query": "{ defaultVideo { path } }"}).encode())
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", large.port), timeout=20))
            connection.sendall(click)
            while connection.recv(2**16):
                pass
        assert _seconds(large.client().get, "/healthy") < 1


@pytest.mark.slow
def test_a_slow_reader_is_served_to_the_end(large):
    api = large.api()
    session = _tracked(large, api)
    response = Api(HttpClient(large.port, receive_bytes=2**16)).post_propagate(session)
    parser = Parser(response.headers["Content-Type"])
    found, paused_at = [], 0
    for chunk in response.response:
        found += parser.push(chunk)
        if len(found) >= paused_at + 100:
            paused_at = len(found)
            time.sleep(1)  # less than it is given, and long enough to have the sender wait
    parser.end()
    assert [json.loads(body)["frame_index"] for _, body in found] == list(range(400))


def _post(body, path="/graphql", headers=()):
    lines = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        **dict(headers),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def _vanishes(port, request, received=0, is_reset=False):
    """Send, read that many bytes, and go."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        while received > 0:
            received -= len(connection.recv(min(received, 2**16))) or received
        if is_reset:  # not the end of the conversation, but a connection that is gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("is_reset", [False, True])
def test_clients_that_vanish_at_every_stage_leave_nothing_behind(large, is_reset):
    api = large.api()
    session = _tracked(large, api)
    before = large.metrics()["omniops_sessions"]
    click = json.dumps(
        {
            "query": "mutation Page($input: AddPointsInput!) { addPoints(input: $input) { frameIndex } }",
            "variables": {
                "input": {
                    "sessionId": session,
                    "frameIndex": 0,
                    "objectId": 0,
                    "labels": [1],
                    "points": [[0.5, 0.5]],
                    "clearOldPoints": True,
                }
            },
        }
    ).encode()
    propagation = _post(json.dumps({"session_id": session}).encode(), "/propagate_in_video")
    form = b'--b\r\nContent-Disposition: form-data; name="operations"\r\n\r\n{"query": ""}\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="a.mp4"\r\nContent-Type: video/mp4\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": 50_000_000}
    upload = _post(form, headers=headers) + b"\0" * 100_000
    stages = [
        (b"",),
        (b"POST /gra",),
        (_post(click)[:60],),
        (_post(click)[:-20],),
        (_post(click),),
        (_post(click), 10),
        (upload,),
        (propagation,),
        (propagation, 20),
        (propagation, 250_000),
        (b"GET /gallery/clip.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n", 300),
    ]
    random.Random(0).shuffle(stages)
    # As many at once as the server has threads, twice.
    threads = [
        threading.Thread(target=_vanishes, args=(large.port, *stage), kwargs={"is_reset": is_reset})
        for stage in 2 * stages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_until(lambda: large.metrics()["omniops_queue"] == 0, 10, "an empty queue")
    assert large.metrics()["omniops_sessions"] == before
    assert large.client().get("/healthy").text == "OK"
    # Every stream that there may be is free again, and every thread.
    responses = [_begun(large, _tracked(large, api)) for _ in range(4)]
    for response in responses:
        response.close()
    uploads = large.folder / "uploads"
    wait_until(lambda: not uploads.exists() or not any(path.is_file() for path in uploads.rglob("*")), 10, "no remains")
    assert "Traceback" not in large.output(), large.output()


@pytest.mark.slow
def test_the_server_ends_though_people_are_tracking_and_stalling(folder):
    with _running(folder, "Large", 12, FRAMES=400, DELAY=0.01) as server:
        api = server.api()
        responses = [_stalled(server, _tracked(server, api)) for _ in range(3)]
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"GET /healthy HTTP/1.1\r\nHost: local")
        processes = [server.process.pid, *server.processes()]
        start = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - start < 8
        wait_until(lambda: not any(map(is_alive, processes)), 10, f"the end of {processes}")
        assert "[ERROR]" not in server.output(), server.output()
        for connection in (*responses, half):
            connection.close()
