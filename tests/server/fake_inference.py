"""An Inference without a model: the same methods, answers and errors, masks that are rectangles, in no time.

    from server.fake_inference import FakeInference

Also for a process of its own: ``remote("no model", predictor="server.fake_inference:FakeInference")``.
"""

import functools
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from omniops.sam2 import RemoteError, rle

FEATURE_BYTES = 1000
TRACKED_BYTES = 10
BATCHES = 3
"""Of points, in which everything is looked for."""

if "pytest" not in sys.modules:  # in a process of its own
    from omniops.sam2 import checkpoints

    def _load(model, device, dtype, **options):
        if "missing" in model:
            raise FileNotFoundError(f"there is no checkpoint at /secret/{model}")
        return SimpleNamespace(**options)

    checkpoints.load = _load


def _call(method):
    """What every call does first: it is noted, may be held up, and fails where the process is dead."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        name = method.__name__
        if not self._inside.acquire(blocking=False):
            self.overlaps.append(name)
            raise AssertionError("two calls at once")
        try:
            self.calls.append((name, *args))
            if self.dead:
                raise RemoteError("the process 17 of a remote was killed by SIGKILL. It last wrote: /secret")
            self.before(name, *args)
            time.sleep(self.delay)
            if name in self.errors:
                raise self.errors.pop(name)
            return method(self, *args, **kwargs)
        finally:
            self._inside.release()

    return call


class FakeInference:
    """See above.

    Attributes:
        delay: seconds that each call takes.
        before: called with the method's name and its arguments, at its start.
        dead: set it to have every call raise RemoteError, as after the death of the process.
        errors: {method: exception}, raised once.
        calls: (method, arguments...) of all calls.
        overlaps: methods that were called while another was in progress, which must not be.
    """

    def __init__(self, model=None, frames=10, width=32, height=24, fps=24.0, delay=0.0):
        self.size = (frames, width, height, fps)
        self.delay = delay
        self.before = lambda name, *args: None
        self.dead = False
        self.is_shut = False
        self.errors = {}
        self.calls = []
        self.overlaps = []
        self.sessions = {}
        self._inside = threading.Lock()

    def shutdown(self):
        self.is_shut = True

    def called(self, name):
        """The arguments of every call of a method."""
        return [args for method, *args in list(self.calls) if method == name]

    def kill(self):
        """Where it runs in a process of its own: end that."""
        os.kill(os.getpid(), 9)

    @_call
    def describe(self):
        return {
            "device": "Fake device",
            "device_type": "cpu",
            "dtype": "float32",
            "model": "tiny",
            "image_size": 64,
            "random_weights": True,
        }

    @_call
    def memory(self):
        sessions = {id: self._bytes(session) for id, session in self.sessions.items()}
        return {"allocated": sum(sessions.values()), "total": 10**9, "sessions": sessions}

    @_call
    def open(self, session, path, guided=False):
        if session in self.sessions:
            raise ValueError("There is a session of that id already.")
        if "broken" in path:
            raise ValueError("The file cannot be read as a video or a picture.")
        frames, width, height, fps = self.size
        if Path(path).suffix in (".png", ".jpg"):
            frames, fps = 1, None
        self.sessions[session] = opened = SimpleNamespace(
            frames=frames,
            size=[height, width],
            prompts={},
            tracked={},
            pending=None,
            searches={},
            path=path,
            guided=guided,
        )
        return {"frames": frames, "width": width, "height": height, "fps": fps, "bytes": self._bytes(opened)}

    @_call
    def close(self, session):
        self.sessions.pop(session, None)

    @_call
    def add(self, session, frame, object, points=(), labels=(), box=None, clear=True):
        used = self._used(session, frame)
        self._check(points, labels, box)
        prompt = {"points": [list(point) for point in points], "labels": list(labels), "box": box, "mask": False}
        before = used.prompts.get(object, {}).get(frame)
        if not clear and before:
            prompt = {
                **before,
                "points": before["points"] + prompt["points"],
                "labels": before["labels"] + list(labels),
            }
        used.pending = None
        used.prompts.setdefault(object, {})[frame] = prompt
        return self._masks(used, frame)

    @_call
    def add_mask(self, session, frame, object, mask):
        used = self._used(session, frame)
        if list(mask["size"]) != used.size:
            raise ValueError(f"The mask must be of the size of the video, {used.size} (height, width).")
        used.pending = None
        used.prompts.setdefault(object, {})[frame] = {"points": [], "labels": [], "box": None, "mask": True}
        return self._masks(used, frame)

    @_call
    def clear_frame(self, session, frame, object):
        used = self._used(session, frame)
        if object not in used.prompts:
            raise ValueError(f"Object {object} is unknown in this session.")
        used.pending = None
        used.prompts[object].pop(frame, None)
        return self._masks(used, frame)

    @_call
    def clear_video(self, session):
        used = self._used(session)
        used.prompts, used.tracked, used.pending = {}, {}, None

    @_call
    def remove(self, session, object):
        used = self._used(session)
        used.pending = None
        frames = sorted(used.prompts.pop(object, {}))
        for objects in used.tracked.values():
            objects.discard(object)
        return [(frame, self._masks(used, frame)) for frame in frames] if used.prompts else []

    @_call
    def preview(self, session, frame, points=(), labels=(), box=None):
        used = self._used(session, frame)
        self._check(points, labels, box)
        return self._rectangle(used, 0, frame, 1)

    @_call
    def begin_everything(self, session, frame, points_per_side=16):
        self._used(session, frame).searches[points_per_side] = [frame] * BATCHES
        return points_per_side

    @_call
    def next_everything(self, session, number):
        used = self._used(session)
        frame = used.searches[number].pop()
        if used.searches[number]:
            return None
        mask = self._rectangle(used, 1, frame, 1)
        height, width = used.size
        box = [0, 0, width - 1, height - 1]
        return [{"mask": mask, "predicted_iou": 0.9, "stability_score": 0.8, "area": width * height, "box": box}]

    @_call
    def begin(self, session, start=0):
        used = self._used(session, start)
        if not any(used.prompts.values()):
            raise ValueError("There is nothing to track: show an object first, by points, a box or a mask.")
        used.pending = [*range(start, used.frames), *(range(start, -1, -1) if start else ())]
        return len(used.pending)

    @_call
    def next(self, session):
        used = self._used(session)
        if not used.pending:
            used.pending = None
            return None
        frame = used.pending.pop(0)
        used.tracked[frame] = {object for object, prompts in used.prompts.items() if prompts}
        return frame, self._masks(used, frame)

    @_call
    def stop(self, session):
        self._used(session).pending = None

    @_call
    def prompts(self, session):
        return {
            object: {t: dict(p) for t, p in frames.items()} for object, frames in self._used(session).prompts.items()
        }

    def _used(self, session, frame=0):
        if session not in self.sessions:
            raise KeyError(session)
        used = self.sessions[session]
        if not isinstance(frame, int) or not 0 <= frame < used.frames:
            raise ValueError(f"There is no frame {frame}: the video has frames 0 to {used.frames - 1}.")
        return used

    def _check(self, points, labels, box):
        if len(points) != len(labels):
            raise ValueError(f"There must be as many labels as points, got {len(labels)} and {len(points)}.")
        if not points and box is None:
            raise ValueError("There is no prompt: give a point or a box.")
        for label in labels:
            if label not in (0, 1):
                raise ValueError(f"A label must be 1 for a point of the object or 0 for one that is not, got {label}.")

    def _masks(self, used, frame):
        """Where an object was tracked or prompted, a rectangle that tells the object, the frame and its points."""
        masks = []
        for object, prompts in used.prompts.items():
            prompt = prompts.get(frame)
            size = 1 + len(prompt["points"]) if prompt else int(object in used.tracked.get(frame, ()))
            masks.append((object, self._rectangle(used, object, frame, size)))
        return masks

    def _rectangle(self, used, object, frame, size):
        mask = np.zeros(used.size, bool)
        if size:
            mask[object % used.size[0] :, frame % used.size[1] : frame % used.size[1] + size] = True
        return rle.encode(mask)

    def _bytes(self, session):
        return session.frames * FEATURE_BYTES + TRACKED_BYTES * sum(map(len, session.tracked.values()))
