"""Real gunicorn: workers that were forked, on a machine that pretends that its accelerator does not survive that."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest

pytest.importorskip("gunicorn", reason="what is tested: gunicorn from PyPI")

HERE = Path(__file__).parent
WORKERS = 2


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until(is_done, seconds, what):
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class Server:
    def __init__(self, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        # Newer versions otherwise put a socket into the home folder; older ones ignore what they do not know.
        folder.joinpath("gunicorn.conf.py").write_text("control_socket_disable = True\n")
        command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "2", "--timeout", "120"]
        command += ["--workers", str(WORKERS), "--bind", f"127.0.0.1:{self.port}", "--worker-tmp-dir", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMNIOPS_DEVICE": "", "SAM2_DEMO_FORCE_CPU_DEVICE": ""}
        with self.log.open("w") as log:
            # A session of its own, so that it can be killed with its workers whatever becomes of it.
            self.process = subprocess.Popen(
                [*command, *options, "gunicorn_app:app"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def get(self, path):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200, self.log.read_text()
            return json.loads(response.read())
        finally:
            connection.close()

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def of_every_worker(self, path, seconds=100):
        """An answer of each worker, by its process id. Which one answers is the kernel's choice."""
        answers = {}
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(8) as pool:
            while len(answers) < WORKERS:
                assert time.monotonic() < end, f"only {list(answers)} answered: {self.log.read_text()}"
                for answer in pool.map(self.get, [path] * 8):
                    answers[answer["worker"]] = answer
        return answers

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*options):
        servers.append(Server(tmp_path, *options))
        _wait_until(servers[-1].is_up, 60, "gunicorn")
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("options", "ended_by"), [((), signal.SIGTERM), (("--preload",), signal.SIGKILL)])
def test_workers_fall_back_to_the_cpu_and_have_the_gpu_through_a_remote_predictor(serve, options, ended_by):
    server = serve(*options)
    master = server.process.pid

    workers = server.of_every_worker("/device/auto")
    assert {answer["picked"] for answer in workers.values()} == {"cpu"}
    assert all(answer["in_forked_child"] for answer in workers.values())
    for worker in workers:
        # Many requests, in two threads, and one warning.
        warned = re.findall(rf"RuntimeWarning: process {worker} was forked .*; using the CPU", server.log.read_text())
        assert len(warned) == 1
    for worker, answer in server.of_every_worker("/device/mps").items():
        assert answer["error"].startswith(f"no device 'mps' in this process: process {worker} was forked")
        assert "omniops.sam2.remote" in answer["error"]

    remotes = server.of_every_worker("/remote")
    assert set(remotes) == set(workers)
    assert len({answer["process"] for answer in remotes.values()}) == WORKERS
    for worker, answer in remotes.items():
        assert answer["parent"] == worker
        assert answer["picked"] == "mps:0"
        assert answer["process_in_forked_child"] is False
        assert answer["predicted"] == 2.0

    everyone = [master, *workers, *(answer["process"] for answer in remotes.values())]
    assert all(map(_is_alive, everyone))
    if ended_by == signal.SIGKILL:
        server.kill()
    else:
        server.process.terminate()
        server.process.wait(30)
    _wait_until(lambda: not any(map(_is_alive, everyone)), 10, f"the end of {everyone}")
