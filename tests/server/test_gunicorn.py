"""Real gunicorn: its document's command, processes that die, and ways to start it that cannot work."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from server.client import ApiError, Parser, frames
from server.running import GUNICORN, Running, is_alive
from server.waiting import wait_until

pytest.importorskip("gunicorn", reason="what is tested: gunicorn from PyPI")

ONE_WORKER = ["--workers", "1", "--threads", "8", "--bind", "127.0.0.1:{port}"]


@pytest.fixture
def serve(tmp_path, data):
    """gunicorn with an application of ``applications.py`` and options of its own."""
    with ExitStack() as stack:

        def start(inference, *options):
            command = [*GUNICORN, f"server.applications:app({inference!r})", *ONE_WORKER, *options]
            return stack.enter_context(Running(command, tmp_path, {"DATA_PATH": str(data)}))

        yield start


@pytest.fixture(scope="module")
def app_root(tmp_path_factory):
    """The official server's APP_ROOT: a checkpoint of Meta's, with random weights."""
    sam2 = pytest.importorskip("sam2.build_sam", reason="what makes a checkpoint of Meta's: sam2 from PyPI")
    root = tmp_path_factory.mktemp("app")
    (root / "checkpoints").mkdir()
    torch.manual_seed(0)
    model = sam2.build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", mode="eval")
    torch.save({"model": model.state_dict()}, root / "checkpoints" / "sam2.1_hiera_tiny.pt")
    return root


@pytest.mark.slow
def test_the_document_s_command(tmp_path, data, app_root):
    environment = {
        "APP_ROOT": str(app_root),
        "MODEL_SIZE": "tiny",
        "DATA_PATH": str(data),
        "DEFAULT_VIDEO_PATH": "gallery/clip.mp4",
        "API_URL": "http://localhost:7263",
        "OMNIOPS_IMAGE_SIZE": "64",
        "OMNIOPS_DEVICE": "cpu",
    }
    command = [*GUNICORN, "omniops.server:app()", *ONE_WORKER]
    with Running(command, tmp_path, environment) as server:
        api = server.api()
        video = api.default_video()
        assert (video["path"], video["width"], video["height"]) == ("gallery/clip.mp4", 32, 24)
        assert video["url"] == "http://localhost:7263/gallery/clip.mp4"
        played = server.client().get("/gallery/clip.mp4")
        assert int(played.headers["Content-Length"]) == len(played.data)
        session = api.start_session(video["path"])
        found = api.add_points(session, 0, 0, [[0.5, 0.5]])
        assert [mask["objectId"] for mask in found["rleMaskList"]] == [0]
        response = api.post_propagate(session)
        assert response.headers["Transfer-Encoding"] == "chunked"
        tracked = list(frames(response.headers["Content-Type"], response.response))
        assert [frame["frame_index"] for frame in tracked] == list(range(10))
        assert {len(frame["results"]) for frame in tracked} == {1}
        processes = [server.process.pid, *server.processes()]
        assert len(processes) == 3
        assert all(map(is_alive, processes))
        assert server.end() == 0
        wait_until(lambda: not any(map(is_alive, processes)), 10, f"the end of {processes}")


@pytest.fixture(scope="module")
def slow(tmp_path_factory, clip):
    """A server whose processes the tests kill, on a pretended Mac; a frame of a video of 300 takes 0.1 s."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "gallery").mkdir()
    shutil.copy(clip, folder / "gallery" / "clip.mp4")
    environment = {"DATA_PATH": str(folder), "DELAY": "0.1", "FRAMES": "300"}
    with Running([*GUNICORN, "server.applications:app('OnAMac')", *ONE_WORKER], folder, environment) as server:
        yield server


@pytest.mark.slow
def test_a_predictor_that_dies_in_the_middle_of_a_stream_takes_its_sessions_with_it_by_name(slow):
    api = slow.api()
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    response = api.post_propagate(session)
    parser = Parser(response.headers["Content-Type"])
    received = []
    while len(received) < 3:
        received += parser.push(next(response.response))

    restarts = slow.metrics()["omniops_predictor_restarts_total"]
    worker, predictor = slow.processes()
    os.kill(predictor, signal.SIGKILL)
    for chunk in response.response:
        received += parser.push(chunk)
    # Our page reads the words; the official front end reads on, and takes the part that is cut short for an error.
    headers, body = received[-1]
    assert headers["Content-Type"].startswith("application/problem+json")
    assert "died" in json.loads(body)["error"]["message"]
    with pytest.raises(EOFError):
        parser.end()

    with pytest.raises(ApiError, match=r"Cannot find session ID; it .*died"):
        api.add_points(session, 0, 0, [[0.5, 0.5]])
    again = api.start_session("gallery/clip.mp4")
    assert api.add_points(again, 0, 0, [[0.5, 0.5]])["frameIndex"] == 0
    assert slow.metrics()["omniops_predictor_restarts_total"] == restarts + 1
    now = slow.processes()
    assert now[0] == worker
    assert now[1] != predictor


@pytest.mark.slow
def test_a_predictor_that_dies_in_the_middle_of_a_click_fails_that_by_name(slow):
    api = slow.api()
    session = api.start_session("gallery/clip.mp4")
    failed = []

    def click():
        with pytest.raises(ApiError) as raised:
            api.add_points(session, 0, 99, [[0.5, 0.5]])
        failed.append(str(raised.value))

    thread = threading.Thread(target=click)
    thread.start()
    time.sleep(0.5)
    assert slow.client().get("/healthy").text == "OK"
    os.kill(slow.processes()[1], signal.SIGKILL)
    thread.join(10)
    assert len(failed) == 1
    assert "died" in failed[0]
    assert api.start_session("gallery/clip.mp4") != session


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_takes_its_predictor_with_it(slow):
    api = slow.api()
    session = api.start_session("gallery/clip.mp4")
    before = slow.processes()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, before)), 10, f"the end of {before}")
    wait_until(slow.processes, 10, "another worker")
    with pytest.raises(ApiError, match="Cannot find session ID; it might have expired"):
        api.add_points(session, 0, 0, [[0.5, 0.5]])
    assert api.add_points(api.start_session("gallery/clip.mp4"), 0, 0, [[0.5, 0.5]])["rleMaskList"]


@pytest.mark.slow
def test_several_workers_are_refused_by_name(serve):
    server = serve("Delayed", "--workers", "2")
    api = server.api()
    for response in (api.post("{ defaultVideo { path } }"), server.client().get("/healthy"), api.post_propagate("x")):
        assert response.status_code == 503
        assert "start gunicorn with --workers 1" in response.text
    assert api.post("{ defaultVideo { path } }").headers["Access-Control-Allow-Origin"] == "http://localhost:7262"


@pytest.fixture
def preloaded(serve):
    return serve("OnAMac", "--preload")


@pytest.mark.slow
@pytest.mark.parametrize("started", ["slow", "preloaded"])
def test_a_mac_s_gpu_is_used_though_gunicorn_forks(request, started):
    """The web process would be killed where it asked for the GPU: it must not."""
    server = request.getfixturevalue(started)
    api = server.api()
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    assert next(api.propagate(session))["frame_index"] == 0
    assert api.ask("{ server { device } }")["server"]["device"] == "mps:0, forked: False"
    assert server.client().get("/metrics").status_code == 200
    assert "RuntimeWarning" not in server.output()
