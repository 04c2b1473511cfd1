"""A predictor without a model, for the tests of omniops.sam2.remote. For the predictor's process."""

import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

from omniops import device
from omniops.sam2 import checkpoints


def load(model, device, dtype, **options):
    """In the place of omniops.sam2.load."""
    if "missing" in model:
        raise FileNotFoundError(2, "there is no checkpoint", model)
    return SimpleNamespace(name=model, device=device, dtype=dtype, options=options)


if "pytest" not in sys.modules:  # the tests' own process, which comes here for the class of an error alone
    checkpoints.load = load


class OddError(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, *, what):
        super().__init__()
        self.what = what

    def __str__(self):
        return self.what


class Predictor:
    """What remote has to do with of a predictor: an image, states, generators, values of all kinds, errors."""

    def __init__(self, model, gain=1.0):
        self.model = model
        self.gain = gain
        self.closed = 0
        self.dropped = 0
        self._image = None

    def made_with(self):
        return self.model.name, self.model.device, self.model.dtype, self.model.options

    def process(self):
        return os.getpid(), os.getppid()

    def picked(self):
        return device.pick(), device.in_forked_child()

    def set_image(self, image):
        if image is None:
            raise TypeError("image must be an array, got None")
        self._image = np.array(image)

    def predict(self):
        if self._image is None:
            raise RuntimeError("no image is set")
        return self._image * self.gain

    def echo(self, *values, **named):
        return [*values, named]

    def doubled(self, array):
        array *= 2  # of its own memory: nothing that the caller sees
        return array

    def init_state(self, video):
        predictor = self

        class State(dict):
            frames = len(video)

            def __del__(self):
                predictor.dropped += 1

        return State(video=video, generator=(i for i in video))

    def lengthen(self, state, *, by):
        state["video"] += by
        return len(state["video"])

    def propagate(self, state):
        try:
            for i, frame in enumerate(state["video"]):
                if frame is None:
                    raise ValueError(f"frame {i} is broken")
                yield i, os.getpid(), torch.full((2, 3), float(i))
        finally:
            self.closed += 1

    def unknown(self):
        return object()

    def fail(self, kind):
        if kind == "file":
            os.stat("/nowhere/at all")
        if kind == "odd":
            raise OddError(what="oddly")
        if kind == "exit":
            sys.exit("enough")
        raise torch.OutOfMemoryError("out of memory", 17)

    def sleep(self, seconds):
        time.sleep(seconds)

    def end(self, signal, heir_lives):
        print("famous last words", file=sys.stderr)
        if not os.fork():  # whom the socket is left to
            time.sleep(heir_lives)
            os._exit(0)
        os.kill(os.getpid(), signal)


class OnAMac(Predictor):
    """The same, in a process that believes that it has Metal."""

    def picked(self):
        import pretended_mac  # noqa: F401

        return super().picked()
