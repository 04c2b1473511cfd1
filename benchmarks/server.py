"""How long a click waits while somebody else's video is tracked: ``omniops serve`` beside the official server's design.

People click without a pause, each in a session of their own, on the first frame of a video; in one more session the
video is tracked. It is measured from the first part of that to the last. The official server's code is not used: beside
ours runs ``one_lock_server.py``, which has its design (one lock, held for a whole propagation; frames as float32) and
the predictor of the official package, ``sam2`` from PyPI. Both have the tiny model with random weights and the same
number of threads.

python benchmarks/server.py --json docs/benchmarks/server.json
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops.cli import errors
from omniops.cli.common import CommandError, output, progress
from omniops.cli.outputs import OverwriteOption, require_new, write_json
from omniops.cli.segment.options import require_image_size
from omniops.drawing import VideoWriter
from omniops.environment import machine, versions
from omniops.formatting import digits
from omniops.server.sample import FPS, frame

OURS, ONE_LOCK = "omniops serve", "one lock, the official design"
PATIENCE = 900
"""Seconds that an answer may take."""
_CLICK = """mutation Page($input: AddPointsInput!) {
  addPoints(input: $input) { frameIndex rleMaskList { objectId rleMask { counts size } } }
}"""
_START = "mutation Page($input: StartSessionInput!) { startSession(input: $input) { sessionId } }"


@dataclass
class Result:
    """Of one server with some sessions; times in seconds, bytes of memory. None where there is nothing to tell."""

    server: str
    sessions: int
    """Of people who click; one more is tracked."""
    clicks: int
    """Answered while it was tracked."""
    clicks_per_second: float
    wait_median: float | None
    """Of clicks begun while it was tracked."""
    wait_95: float | None
    frames_per_second: float
    tracked_in: float
    idle_median: float
    """The wait of one person's click while nothing is tracked."""
    bytes_a_session: float
    """What the server's processes grew by, for each session, before anything was tracked; on Linux."""
    gpu_bytes_a_session: float | None
    """What the GPU's memory in use grew by, in the same time; on CUDA."""


class Server:
    """A server in processes of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def post(self, query: str, **inputs: Any) -> Any:
        """What an operation answers."""
        body = json.dumps({"query": query, "variables": {"input": inputs}})
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request("POST", "/graphql", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200 or "errors" in answer:
            raise CommandError(f"the server answered {response.status}: {answer}", status=1)
        return next(iter(answer["data"].values()))

    def memory(self) -> int:
        """The bytes of its processes that are in memory."""
        table = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                table[int(folder.name)] = int(lines["PPid"]), int(lines.get("VmRSS", "0 kB").split()[0])
        family = [self.process.pid]
        for parent in family:
            family += [pid for pid, (of, _) in table.items() if of == parent]
        return sum(table[pid][1] for pid in family if pid in table) * 1024


def gpu_memory(device: str) -> int | None:
    """The bytes in use of the first NVIDIA GPU, by all programs; None where none is measured."""
    if not device.startswith("cuda"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20


def main(
    sessions: Annotated[str, typer.Option("--sessions", metavar="N,N,...", help="How many people click.")] = "1,4,16",
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=2, help="Of the video that is tracked.", show_default="48 on the CPU, else 240"),
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="The side of the square that the model sees.")] = 1024,
    device: Annotated[str, typer.Option("--device", metavar="D", help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of PyTorch in each server.")] = os.cpu_count() or 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure how long clicks wait while a video is tracked, beside the official server's design."""
    require_new([json_file], overwrite)
    require_image_size(image_size)
    counts = [int(count) for count in sessions.split(",")]
    frames = frames or (48 if device == "cpu" else 240)
    for package in ("sam2", "pycocotools", "gunicorn", "flask"):
        if find_spec(package) is None:
            raise CommandError(f"{package} is not installed: pip install {package}", status=1)
    results = []
    with tempfile.TemporaryDirectory() as name, progress() as bar:
        folder = Path(name)
        write_clips(folder, max(counts) + 1, frames)
        task = bar.add_task("", total=2 * len(counts))
        for kind in (OURS, ONE_LOCK):
            for count in counts:
                bar.update(task, description=f"{kind}, {count} sessions")
                errors.say(f"{kind}, {count} clicking")
                with running(kind, folder, device, image_size, threads) as server:
                    results.append(measure(kind, server, count, frames, device))
                errors.say(f"{results[-1]}")
                bar.advance(task)
    show(results)
    if json_file is not None:
        content = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "versions": versions(),
            "device": device,
            "image_size": image_size,
            "frames": frames,
            "threads": threads,
            "results": [asdict(result) for result in results],
        }
        write_json(json_file, content, overwrite, indent=1)


def write_clips(folder: Path, count: int, frames: int) -> None:
    """As many videos in gallery/, each a file of its own, and the frames of each as JPEG files in frames/."""
    from PIL import Image

    (folder / "gallery").mkdir()
    pictures = [frame(index) for index in range(frames)]
    with VideoWriter(folder / "gallery" / "0.mp4", fps=FPS) as writer:
        for picture in pictures:
            writer.write(picture)
    (folder / "frames" / "0").mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "frames" / "0" / f"{index:05}.jpg", quality=95)
    for number in range(1, count):
        shutil.copy(folder / "gallery" / "0.mp4", folder / "gallery" / f"{number}.mp4")
        (folder / "frames" / str(number)).symlink_to(folder / "frames" / "0")


@contextmanager
def running(kind: str, folder: Path, device: str, image_size: int, threads: int) -> Iterator[Server]:
    """The server, once it answers and its model is loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if kind == OURS:
        command = ["-c", "from omniops.cli import main; main()", "serve", str(folder), "--random-weights"]
        command += ["--image-size", str(image_size), "--device", device, "--port", str(port)]
    else:
        command = ["-m", "gunicorn", "--worker-class", "gthread", "--workers", "1", "--threads", "2", "--timeout", "0"]
        command += ["--pythonpath", str(Path(__file__).parent), "--bind", f"127.0.0.1:{port}", "one_lock_server:app()"]
        environment |= {"CLIPS": str(folder / "frames"), "IMAGE_SIZE": str(image_size), "DEVICE": device}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
        server = Server(process, port)
        try:
            wait(server, folder / "log", "ready: " if kind == OURS else "")
            yield server
        except BaseException:
            errors.say((folder / "log").read_text()[-2000:])
            raise
        finally:
            process.terminate()
            process.wait(60)


def wait(server: Server, log: Path, line: str) -> None:
    """Until it answers, and its output has a line that begins so."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", server.port, timeout=300)
            connection.request("GET", "/healthy")
            connection.getresponse().read()
            if f"\n{line}" in f"\n{log.read_text()}":
                return
        time.sleep(0.2)
    raise CommandError("the server did not start", status=1)


def start(server: Server, person: int) -> str:
    """A session of someone's own video."""
    session: str = server.post(_START, path=f"gallery/{person}.mp4")["sessionId"]
    return session


def click(server: Server, session: str, position: float = 0.3) -> float:
    """Seconds until a click is answered."""
    begun = time.monotonic()
    points = {"points": [[position, 1 - position]], "labels": [1], "clearOldPoints": True}
    server.post(_CLICK, sessionId=session, frameIndex=0, objectId=0, **points)
    return time.monotonic() - begun


def click_while_tracking(
    server: Server, tracked_session: str, sessions: Sequence[str]
) -> tuple[list[float], list[tuple[float, float]]]:
    """Track a video in one session, and meanwhile click in the others without a pause.

    Returns:
        When each frame of the tracking came, and of each click when it began and how long it waited.
    """
    begun, over = threading.Event(), threading.Event()
    arrivals: list[float] = []
    waits: list[tuple[float, float]] = []

    def track() -> None:
        try:
            arrivals.extend(frame_arrivals(server, tracked_session, begun))
        finally:
            begun.set()
            over.set()

    def keep_clicking(session: str) -> None:
        begun.wait()
        position = 0.1
        while not over.is_set():
            clicked = time.monotonic()
            position = 0.1 + (position + 0.07) % 0.8
            waits.append((clicked, click(server, session, position)))

    with ThreadPoolExecutor(len(sessions) + 1) as pool:
        for future in [pool.submit(track), *(pool.submit(keep_clicking, session) for session in sessions)]:
            future.result()
    return arrivals, waits


def measure(kind: str, server: Server, count: int, frames: int, device: str) -> Result:
    """Have people click while a video is tracked."""
    tracked_session, sessions = start(server, 0), []
    click(server, tracked_session)  # what is made once
    before, gpu_before = server.memory(), gpu_memory(device)
    for person in range(1, count + 1):
        sessions.append(start(server, person))
        click(server, sessions[-1])
    grown, gpu = (server.memory() - before) / count, gpu_memory(device)
    idle = statistics.median(click(server, sessions[0], 0.1 + 0.02 * number) for number in range(10))

    arrivals, waits = click_while_tracking(server, tracked_session, sessions)
    seconds = arrivals[-1] - arrivals[0]
    in_time = [wait for clicked, wait in waits if clicked + wait <= arrivals[-1]]
    ordered = sorted(wait for _, wait in waits)
    return Result(
        server=kind,
        sessions=count,
        clicks=len(in_time),
        clicks_per_second=len(in_time) / seconds,
        wait_median=statistics.median(ordered) if ordered else None,
        wait_95=ordered[int(0.95 * (len(ordered) - 1))] if ordered else None,
        frames_per_second=(frames - 1) / seconds,
        tracked_in=seconds,
        idle_median=idle,
        bytes_a_session=grown,
        gpu_bytes_a_session=None if gpu is None or gpu_before is None else (gpu - gpu_before) / count,
    )


def frame_arrivals(server: Server, session: str, begun: threading.Event) -> Iterator[float]:
    """When each frame of a propagation came; the first sets ``begun``."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = json.dumps({"session_id": session, "start_frame_index": 0})
    connection.request("POST", "/propagate_in_video", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
        if line == b"\r\n":
            response.read(length)
            begun.set()
            yield time.monotonic()


def show(results: Sequence[Result]) -> None:
    """The table."""
    table = Table(
        "server",
        "clicking",
        "clicks/s",
        "wait of a click: median",
        "95 %",
        "if nothing is tracked",
        "frames/s",
        "memory a session",
        "of the GPU",
        box=SIMPLE_HEAD,
    )
    for result in results:
        waits = ["" if wait is None else f"{digits(wait)} s" for wait in (result.wait_median, result.wait_95)]
        table.add_row(
            result.server,
            str(result.sessions),
            digits(result.clicks_per_second),
            *waits,
            f"{digits(result.idle_median)} s",
            digits(result.frames_per_second),
            f"{result.bytes_a_session / 2**20:.0f} MiB",
            "" if result.gpu_bytes_a_session is None else f"{result.gpu_bytes_a_session / 2**20:.0f} MiB",
        )
    output().print(table)


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
