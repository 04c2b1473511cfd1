"""Pictures and videos for ``omniops segment``, and what it writes."""

import json

import numpy as np
from PIL import Image


def noise(size=(40, 30), seed=0):
    """(H, W, 3) of that width and height."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def write_picture(path, size=(40, 30), seed=0):
    """``noise`` as a file, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(size, seed)).save(path)
    return path


def write_video(path, frames=6, size=(48, 32)):
    """Grey, brighter with each frame, so that frames can be told apart; its index comes first, so that it may end
    early."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def run(omniops, *arguments):
    """The command on the CPU."""
    return omniops("segment", *map(str, arguments), "--device", "cpu")


def read_frames(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def read_json(path):
    return json.loads(path.read_text())


def half(height, width, side):
    """(H, W): the left half, the right one, or nothing."""
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = side == "left"
    mask[:, width // 2 :] = side == "right"
    return mask
