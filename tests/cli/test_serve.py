"""omniops serve: from start to end, and every error by name."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPSConnection

import pytest
from server.running import Running, is_alive, wait_until

pytest.importorskip("flask", reason="what is tested: flask, of the extra server")

SERVE = [sys.executable, "-c", "from omniops.cli import main; main()", "serve"]
SMALL = ["--random-weights", "--image-size", "64", "--device", "cpu"]


@pytest.fixture
def certificate(tmp_path):
    """cert.pem and key.pem, of this machine's own name."""
    return _certificate(tmp_path, "cert")


def _certificate(folder, name):
    files = folder / f"{name}.pem", folder / f"{name}-key.pem"
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-out", files[0], "-keyout", files[1]],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"openssl made no certificate: {done.stderr}")
    return files


def _line(server, beginning, seconds=60):
    """A line of the output that begins so, waited for."""
    found = wait_until(lambda: re.search(f"^{re.escape(beginning)}.*$", server.output(), re.M), seconds, beginning)
    return found[0]


@pytest.mark.slow
def test_a_sample_clip_is_served_until_sigterm(tmp_path):
    with Running([*SERVE, *SMALL, "--port", "{port}"], tmp_path) as server:
        assert _line(server, "SAM 2") == f"SAM 2 is served at http://127.0.0.1:{server.port} - Ctrl-C ends it"
        ready = _line(server, "ready: ")
        assert "SAM 2 tiny at 64 x 64" in ready
        assert "random weights: its masks mean nothing" in server.output()
        api = server.api()
        video = api.default_video()
        assert video["path"] == "gallery/discs.mp4"
        assert video["url"] == f"http://127.0.0.1:{server.port}/gallery/discs.mp4"
        session = api.start_session(video["path"])
        api.add_points(session, 0, 0, [[110 / 640, 120 / 360]])
        assert next(iter(api.propagate(session)))["frame_index"] == 0
        assert "<title>" in server.client().get("/").text

        (folder,) = tmp_path.glob("omniops-serve-*")
        assert (folder / "gallery" / "discs.mp4").is_file()
        processes = [server.process.pid, *server.processes()]
        assert len(processes) == 3
        assert server.end() == 0
        wait_until(lambda: not any(map(is_alive, processes)), 10, f"the end of {processes}")
        assert not folder.exists()
        assert "Traceback" not in server.output()
        assert "[ERROR]" not in server.output()


@pytest.mark.slow
def test_a_folder_is_served_over_https_with_a_token_until_ctrl_c(tmp_path, certificate):
    from omniops.server.sample import write_sample

    gallery = tmp_path / "official" / "gallery"
    gallery.mkdir(parents=True)
    write_sample(gallery / "mine.mp4")
    cert, key = certificate
    options = ["--host", "0.0.0.0", "--token", "a-token", "--certfile", cert, "--keyfile", key, "--data", "kept"]
    with Running([*SERVE, "official", *SMALL, *options, "--port", "{port}"], tmp_path) as server:
        assert _line(server, "SAM 2").startswith(f"SAM 2 is served at https://localhost:{server.port} ")
        context = ssl.create_default_context(cafile=cert)

        def ask(path, body=None, **headers):
            connection = HTTPSConnection("localhost", server.port, timeout=60, context=context)
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

        assert ask("/healthy") == (200, "OK")
        assert ask("/gallery/mine.mp4")[0] == 401
        query = json.dumps({"query": "{ defaultVideo { path url } }"}).encode()
        types = {"Content-Type": "application/json"}
        assert ask("/graphql", query, **types)[0] == 401
        status, answer = ask("/graphql", query, **types, Authorization="Bearer a-token")
        video = {"path": "gallery/mine.mp4", "url": f"https://localhost:{server.port}/gallery/mine.mp4"}
        assert (status, json.loads(answer)) == (200, {"data": {"defaultVideo": video}})
        # The one who speaks no TLS is not served, and disturbs nobody.
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(b"GET /healthy HTTP/1.1\r\n\r\n")
            plain.settimeout(10)
            with suppress(ConnectionResetError):
                assert b"OK" not in plain.recv(1000)
        assert ask("/healthy") == (200, "OK")
        processes = [server.process.pid, *server.processes()]
        # As a terminal does: to the command and its worker. The predictor's process is of another group.
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(20) == 0
        wait_until(lambda: not any(map(is_alive, processes)), 10, f"the end of {processes}")
        assert (tmp_path / "kept").is_dir()
        assert not list(tmp_path.glob("omniops-serve-*"))
        assert "Traceback" not in server.output()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_command_by_name(tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"no checkpoint")
    done = subprocess.run(
        [*SERVE, "--model", "damaged.pt", "--device", "cpu", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("omniops: error: ")
    assert "damaged.pt is no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("omniops-serve-*"))


@pytest.mark.slow
def test_a_client_that_stops_in_the_middle_of_a_request_does_not_keep_its_thread(tmp_path):
    environment = {"OMNIOPS_SEND_TIMEOUT": "1"}
    with Running([*SERVE, *SMALL, "--port", "{port}", "--threads", "2"], tmp_path, environment) as server:
        _line(server, "ready: ")
        stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for connection in stalled:
            connection.sendall(b"GET /healthy HTTP/1.1\r\nHost: local")
        start = time.monotonic()
        assert server.client(timeout=20).get("/healthy").text == "OK"
        assert time.monotonic() - start < 8
        for connection in stalled:
            connection.close()
        assert server.end() == 0
        assert "Traceback" not in server.output()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "no such folder: missing"),
        (["file.txt"], "file.txt is no folder: give the one that it is in"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 serves other machines: give a --token that the page asks for"),
        (["--token", "a", "--insecure"], "--token and --insecure contradict each other"),
        (["--token", ""], "token must not be empty"),
        (["--token", "a\nb"], "--token must be of printable ASCII characters"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid is no address of this machine"),
        (["--host", "192.0.2.1", "--token", "a"], "cannot listen on 192.0.2.1, port 0: "),
        (["--origin", "example.org"], "--origin must be as https://example.org"),
        (["--keyfile", "file.txt"], "--keyfile without --certfile"),
        (["--certfile", "missing.pem"], "no such file: missing.pem"),
        (["--certfile", "file.txt"], "file.txt: no certificate with its key, in PEM form"),
        (["--data", "file.txt"], "cannot write to file.txt: "),
        (["--model", "missing.pt"], "there is no checkpoint at missing.pt"),
        (["--random-weights", "--model", "file.txt"], "random weights are of a size, --model tiny, small, base-plus"),
        (["--image-size", "100"], "--image-size must be a positive multiple of 32, got 100"),
        (["--device", ","], "device must name at least one device"),
    ],
)
def test_wrong_use_is_named(fails, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("a file")
    assert words in fails("serve", "--port", "0", *arguments, status=2)


def test_a_port_in_use_is_named(fails):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in fails(
            "serve", "--port", port, status=2
        )


def test_a_variable_that_is_wrong_is_named(fails, monkeypatch):
    monkeypatch.setenv("OMNIOPS_MAX_SESSIONS", "many")
    assert "OMNIOPS_MAX_SESSIONS: 'many' is not a number" in fails("serve", status=2)


def test_certificates_that_do_not_fit_are_named(fails, tmp_path, certificate):
    cert, key = certificate
    _, others = _certificate(tmp_path, "others")
    line = fails("serve", "--port", "0", "--certfile", str(cert), "--keyfile", str(others), status=2)
    assert line.endswith(f"{cert} and {others} do not belong together: the key is another certificate's")
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:a", "-out", locked], check=True, capture_output=True
    )
    line = fails("serve", "--port", "0", "--certfile", str(cert), "--keyfile", str(locked), status=2)
    assert line.endswith(f"the key in {locked} is encrypted: it has to be stored without")


@pytest.mark.parametrize("module", ["flask", "strawberry", "gunicorn"])
def test_a_missing_package_is_named_before_the_work(fails, monkeypatch, module):
    from omniops.cli import common

    found = common.find_spec
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == module else found(name))
    package = {"strawberry": "strawberry-graphql"}.get(module, module)
    line = fails("serve", status=1)
    assert line.endswith(f"the server needs {package}, which is not installed: pip install 'omniops[server]'")


@pytest.mark.parametrize(
    ("host", "port", "https", "expected"),
    [
        ("127.0.0.1", 1, False, "http://127.0.0.1:1"),
        ("0.0.0.0", 1, True, "https://localhost:1"),
        ("::", 2, False, "http://localhost:2"),
        ("::1", 3, False, "http://[::1]:3"),
        ("[::1]", 3, False, "http://[::1]:3"),
        ("name", 4, True, "https://name:4"),
    ],
)
def test_the_address_is_one_that_a_browser_takes(host, port, https, expected):
    from omniops.cli.serve.command import _address

    assert _address(host, port, https) == expected


def test_options_come_before_the_environment_and_that_before_defaults(monkeypatch):
    from omniops.cli.serve.command import _settings

    monkeypatch.setenv("OMNIOPS_MAX_SESSIONS", "5")
    monkeypatch.setenv("OMNIOPS_MAX_STREAMS", "6")
    monkeypatch.setenv("MODEL_SIZE", "large")
    settings = _settings({"max_streams": 7})
    assert (settings.max_sessions, settings.max_streams, settings.model) == (5, 7, "tiny")
    assert settings.api_url == ""
    monkeypatch.setenv("OMNIOPS_MODEL", "small")
    assert _settings({}).model == "small"
    assert _settings({"model": "large"}).model == "large"
