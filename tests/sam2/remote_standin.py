"""A predictor without a model, for the tests of omniops.sam2.remote. For the predictor's process."""

import os
import sys
from types import SimpleNamespace

import numpy as np

from omniops import device
from omniops.sam2 import checkpoints


def load(model, device, dtype, **options):
    """In the place of omniops.sam2.load."""
    return SimpleNamespace(name=model, device=device, dtype=dtype, options=options)


if "pytest" not in sys.modules:  # the tests' own process, where a test puts it there for itself
    checkpoints.load = load


class Predictor:
    """What web workers ask of a predictor, and of the process that it is in."""

    def __init__(self, model, gain=1.0):
        self.model = model
        self.gain = gain
        self._image = None

    def made_with(self):
        return self.model.name, self.model.device, self.model.dtype, self.model.options

    def process(self):
        return os.getpid(), os.getppid()

    def picked(self):
        return device.pick(), device.in_forked_child()

    def set_image(self, image):
        self._image = np.array(image)

    def predict(self):
        return self._image * self.gain


class OnAMac(Predictor):
    """The same, in a process that believes that it has Metal."""

    def picked(self):
        import pretended_mac  # noqa: F401

        return super().picked()
