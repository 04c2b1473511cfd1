"""A server in processes of its own, and a client that reaches it over HTTP as ``client.Api`` wants one.

with Running(command, folder) as server:
    api = server.api()
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path

from server.client import Api
from server.waiting import wait_until

TESTS = Path(__file__).parents[1]
GUNICORN = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_alive(pid):
    """Whether a process runs; one that has ended and whose parent has not asked for that does not."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "Z" not in _ps("-o", "stat=", "-p", str(pid))
    return False


def descendants(pid):
    """The processes that a process started, directly or not, those that were started first before the others."""
    parents = [tuple(map(int, line.split())) for line in _ps("-A", "-o", "pid=,ppid=").splitlines()]
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents if parent == ancestor]
    return found[1:]


def resident(pid):
    """The bytes of a process that are in memory."""
    return int(_ps("-o", "rss=", "-p", str(pid))) * 1024


def _ps(*options):
    return subprocess.run(["ps", *options], capture_output=True, text=True).stdout


class Running:
    """A command that serves on a port of 127.0.0.1.

    Args:
        command: what to start; ``{port}`` in it is the port.
        folder: where it runs, and where its output goes.
        environment: more variables.
    """

    def __init__(self, command, folder, environment=None):
        self.port = free_port()
        self.folder = folder
        self.log = folder / "log"
        (folder / "gunicorn.conf.py").write_text("control_socket_disable = True\n")  # else it is in the home folder
        # Not PYTHONPATH's other folders, nor what would set the server up.
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("OMNIOPS_", "SAM2_"))}
        paths = os.pathsep.join(map(str, (TESTS, TESTS / "sam2")))
        keep |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word).replace("{port}", str(self.port)) for word in command],
                cwd=folder,
                env={**keep, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        try:
            wait_until(self.is_up, 60, f"the server: {self.output()}")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error):
        self.kill()

    def output(self):
        return self.log.read_text()

    def is_up(self):
        assert self.process.poll() is None, self.output()
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self, **options):
        return HttpClient(self.port, **options)

    def api(self):
        return Api(self.client())

    def metrics(self):
        """The figures by name."""
        lines = self.client().get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def processes(self):
        """The worker and the processes of the predictors."""
        return descendants(self.process.pid)

    def end(self, by=signal.SIGTERM, seconds=20):
        """The exit status, after a signal."""
        self.process.send_signal(by)
        return self.process.wait(seconds)

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


class Response:
    """What Flask's test client answers, as far as the tests ask: the body is read when it is asked for."""

    def __init__(self, connection, response):
        self._connection = connection
        self._response = response
        self.status_code = response.status
        self.headers = response.headers
        self.response = iter(lambda: response.read1(2**16), b"")
        self._data = None

    @property
    def data(self):
        if self._data is None:
            with closing(self):
                self._data = self._response.read()
        return self._data

    @property
    def text(self):
        return self.data.decode()

    def close(self):
        self._response.close()
        self._connection.close()


class HttpClient:
    """Each request has a connection of its own. ``receive_bytes``: of the socket's buffer."""

    def __init__(self, port, timeout=60, receive_bytes=None):
        self.port = port
        self.timeout = timeout
        self.receive_bytes = receive_bytes

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, path, json=None, data=None, headers=None, buffered=True):
        if data is not None:
            kind, body = _form(data)
        else:
            kind, body = "application/json", _json(json)
        return self.request("POST", path, body, {"Content-Type": kind, **(headers or {})})

    def request(self, method, path, body=None, headers=None):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        if self.receive_bytes is not None:
            connection.sock = socket.socket()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_bytes)
            connection.sock.settimeout(self.timeout)
            connection.sock.connect(("127.0.0.1", self.port))
        connection.request(method, path, body, headers or {})
        return Response(connection, connection.getresponse())


def _json(value):
    return json.dumps(value).encode()


def _form(fields):
    """multipart/form-data: (data, file name, content type) for a file."""
    boundary = "a-boundary-of-the-tests"
    body = b""
    for name, value in fields.items():
        more, data, kind = "", value, ""
        if isinstance(value, tuple):
            data, file_name, content_type = value
            more, kind = f'; filename="{file_name}"', f"Content-Type: {content_type}\r\n"
        data = data.read() if isinstance(data, io.IOBase) else data
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n{kind}\r\n'
        body += head.encode() + (data if isinstance(data, bytes) else str(data).encode()) + b"\r\n"
    return f"multipart/form-data; boundary={boundary}", body + f"--{boundary}--\r\n".encode()
