"""Memory that a session of the server takes, beside what the official demo server takes for the same video.

    python benchmarks/server_memory.py [--frames 240] [--size 1280x720] [--image-size 1024] [--tracked 10]
                                       [--sessions 2] [--out FILE]

Random weights of the tiny model, in this process, on the CPU. Sessions are opened one after the other on one H.264
clip; in each an object is clicked, and some frames are tracked. What the process holds in memory after each is read
from the system, and what ``Inference.memory()`` says of each session stands beside it. The official server's figure is
arithmetic: it keeps every frame as float32, 3 x image_size x image_size.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
from pathlib import Path

import av
import numpy as np
import torch

from omniops import device as devices
from omniops import sam2
from omniops.server.inference import Inference

MIB = 2**20


def write_video(path: Path, frames: int, width: int, height: int) -> None:
    """A disc that moves over blocks of noise."""
    blocks = np.random.default_rng(0).integers(0, 255, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    background = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            picture = background.copy()
            centre = width * (0.2 + 0.6 * t / frames)
            picture[(x - centre) ** 2 + (y - height / 2) ** 2 < (height / 6) ** 2] = [220, 40, 30]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return devices.memory("cpu").allocated or 0


def measured(inference: Inference, path: Path, sessions: int, tracked: int) -> list[dict[str, float]]:
    """Of each session in MiB: how the process grew with it, and what it is said to take once all are open."""
    grown = []
    for i in range(sessions):
        start_bytes = resident()
        opened = inference.open(str(i), str(path))
        opened_bytes = resident()
        inference.add(str(i), 0, 1, points=[[0.2, 0.5]], labels=[1])
        clicked_bytes = resident()
        inference.begin(str(i), 0)
        for _ in range(min(tracked, opened["frames"])):
            inference.next(str(i))
        inference.stop(str(i))
        tracked_bytes = resident()
        grown.append(
            {
                "opened": (opened_bytes - start_bytes) / MIB,
                "clicked": (clicked_bytes - opened_bytes) / MIB,
                "tracked": (tracked_bytes - clicked_bytes) / MIB,
                "in_all": (tracked_bytes - start_bytes) / MIB,
                "own_figure_when_used": inference.memory()["sessions"][str(i)] / MIB,
            }
        )
    for i, own in enumerate(inference.memory()["sessions"].values()):
        grown[i]["own_figure_at_the_end"] = own / MIB
    return grown


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--tracked", type=int, default=10, help="frames that are tracked in each session")
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    inference = Inference(sam2.load("tiny", "cpu", "float32", image_size=options.image_size, random_weights=True))
    with tempfile.TemporaryDirectory() as folder:
        warming, path = Path(folder) / "warming.mp4", Path(folder) / "video.mp4"
        write_video(warming, 4, width, height)
        write_video(path, options.frames, width, height)
        measured(inference, warming, 1, 4)  # what the first use of the model takes is no session's
        inference.close("0")
        model = resident()
        sessions = measured(inference, path, options.sessions, options.tracked)
        open_ones = resident()
        for i in range(options.sessions):
            inference.close(str(i))
        closed = resident()
    result = {
        "frames": options.frames,
        "size": options.size,
        "image_size": options.image_size,
        "tracked": options.tracked,
        "machine": devices.title(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "process_before_mib": model / MIB,
        "sessions_mib": sessions,
        "all_sessions_mib": (open_ones - model) / MIB,
        "left_when_closed_mib": (closed - model) / MIB,
        "official_frames_of_one_session_mib": options.frames * 3 * options.image_size**2 * 4 / MIB,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
