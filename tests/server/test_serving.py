"""How the application is served: addresses, folders, and waitress, which serves it on Windows."""

import logging
import os
import signal
import socket

import pytest
from server.client import Api, frames
from server.fake_inference import FakeInference
from server.running import HttpClient

from omniops.server import create_app, serving, startup
from omniops.server.errors import ServerError
from omniops.server.predictors import Predictor, StartError
from omniops.server.settings import Settings


@pytest.fixture(autouse=True)
def _logging():
    """Each test's own: what serves sets it up for its process."""
    log = logging.getLogger("omniops.server")
    before = log.propagate, log.handlers
    yield
    log.propagate, log.handlers = before


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False), ("::1", True), ("::", False)],
)
def test_only_this_machine_reaches_loopback(host, is_loopback):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with serving.listen(host, 0) as bound:
        assert bound.getsockname()[1] > 0
        assert serving.is_loopback(bound) is is_loopback
        with pytest.raises(startup.ServingError, match=r"cannot listen on .*: Address already in use") as raised:
            serving.listen(host, bound.getsockname()[1])
        assert raised.value.status == 2


def test_a_temporary_folder_is_removed_by_who_made_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    context = serving.data_folder(None)
    folder = context.__enter__()
    (folder / "file").write_text("")
    assert folder.stat().st_mode & 0o077 == 0  # what people upload is nobody else's
    child = os.fork()
    if not child:  # a worker of gunicorn, which leaves through the same lines
        context.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    context.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_given_folder_is_made_and_kept(tmp_path):
    with serving.data_folder(tmp_path / "new" / "folder") as folder:
        assert folder == (tmp_path / "new" / "folder").resolve()
    assert list(folder.iterdir()) == []


def _serve(settings, make, on_ready):
    """By waitress, in this thread."""
    with serving.listen("127.0.0.1", 0) as bound:
        serving._serve_by_waitress(
            lambda: create_app(settings, predictors=[Predictor(make)]), bound, None, 4, on_ready(bound)
        )


def test_waitress_serves_until_ctrl_c(data):
    pytest.importorskip("waitress", reason="what is tested: waitress from PyPI, which serves on Windows")
    answers = []

    def on_ready(bound):
        port = bound.getsockname()[1]

        def ask(ready):
            try:
                answers.append(ready.devices[0]["device"])
                api = Api(HttpClient(port))
                session = api.start_session("gallery/clip.mp4")
                api.add_points(session, 0, 0, [[0.5, 0.5]])
                response = api.post_propagate(session)
                tracked = frames(response.headers["Content-Type"], response.response)
                answers.append([frame["frame_index"] for frame in tracked])
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        return ask

    _serve(Settings(data=data), FakeInference, on_ready)
    assert answers == ["Fake device", list(range(10))]


def test_waitress_ends_where_the_model_cannot_be_loaded(data):
    pytest.importorskip("waitress", reason="what is tested: waitress from PyPI, which serves on Windows")

    def fail():
        raise FileNotFoundError(2, "No such file or directory", "a.pt")

    with pytest.raises(startup.ServingError, match=r"^a\.pt: No such file or directory$") as raised:
        _serve(Settings(data=data), fail, lambda bound: lambda ready: None)
    assert raised.value.status == 2


def test_what_is_logged_is_a_line_and_a_trace_where_nobody_foresaw_it(capsys):
    handler = startup.log_lines()
    log = logging.getLogger("omniops.server.predictors")
    log.error("The predictor on cpu died", exc_info=ValueError("why\nmore"))
    assert capsys.readouterr().err == ""  # until it is ready, the command ends, and tells itself
    handler.is_ready = True
    log.error("The predictor on cpu died", exc_info=ValueError("why\nmore"))
    assert capsys.readouterr().err == "omniops: The predictor on cpu died: why\n"
    log.error("A request failed", exc_info=ZeroDivisionError("division"))
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("omniops: A request failed: division", "ZeroDivisionError: division")
    log.info("nothing to see")
    assert capsys.readouterr().err == ""


def test_the_reason_of_a_model_that_cannot_be_loaded_is_its_own():
    error = StartError("The model cannot be loaded")
    error.__cause__ = ServerError("in words")
    error.__cause__.__cause__ = ValueError("a.pt is no checkpoint")
    assert startup.failure(error) == ("a.pt is no checkpoint", 1)


def test_gunicorn_does_not_tell_of_clients_that_stall():
    record = logging.makeLogRecord({"exc_info": (TimeoutError, TimeoutError(), None)})
    assert not startup._is_no_stall(record)
    assert startup._is_no_stall(logging.makeLogRecord({"exc_info": (OSError, OSError(), None)}))
    assert startup._is_no_stall(logging.makeLogRecord({}))
