"""What a process serves in the tests: it has what a remote object meets, and neither a model nor a device."""

import os
import sys
import time

import numpy as np
import torch

from omniops import device


class OddError(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, *, what):
        super().__init__()
        self.what = what

    def __str__(self):
        return self.what


class StandIn:
    """A value that is set, results that stay, generators, values of all kinds, errors."""

    def __init__(self, source="a file", gain=1.0):
        if "missing" in source:
            raise FileNotFoundError(2, "there is no such file", source)
        self.source = source
        self.gain = gain
        self.model = object()
        self.closed = 0
        self.released = 0
        self._value = None

    def process(self):
        return os.getpid(), os.getppid()

    def is_forked(self):
        return device.in_forked_child()

    def set_value(self, value):
        if value is None:
            raise TypeError("value must be a number, got None")
        self._value = np.array(value)

    def reset(self):
        self._value = None

    def scaled(self):
        if self._value is None:
            raise RuntimeError("no value is set")
        return self._value * self.gain

    def echo(self, *values, **named):
        return [*values, named]

    def named(self, name):
        return name

    def doubled(self, array):
        array *= 2  # of its own memory: nothing that the caller sees
        return array

    def open(self, items):
        stand_in = self

        class Opened(dict):
            length = len(items)

            def __del__(self):
                stand_in.released += 1

            def __deepcopy__(self, memo):
                return Opened(items=list(self["items"]))

        return Opened(items=items, generator=(i for i in items))

    def lengthen(self, opened, *, by):
        opened["items"] += by
        return len(opened["items"])

    def walk(self, opened):
        try:
            for i, item in enumerate(opened["items"]):
                if item is None:
                    raise ValueError(f"item {i} is broken")
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

    def close(self, what):
        return f"{what} is closed"

    def sleep(self, seconds):
        time.sleep(seconds)

    def end(self, signal, heir_lives):
        print("famous last words", file=sys.stderr)
        if not os.fork():  # whom the socket is left to
            time.sleep(heir_lives)
            os._exit(0)
        os.kill(os.getpid(), signal)
