"""What tests with threads share: nothing sleeps for a while in the hope that something has come about."""

import sys
import threading
import time
from contextlib import contextmanager

SECONDS = 20.0  # after which a test fails rather than hangs


def wait_until(is_met, seconds=SECONDS, what="it"):
    """What ``is_met()`` returns, once that is true."""
    end = time.monotonic() + seconds
    pause = 0.001
    while not (result := is_met()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return result


class Thread(threading.Thread):
    """Runs a function at once; ``result()`` waits for what it returns or raises."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self._work = function, args
        self._value = self._error = None
        self.start()

    def run(self):
        function, args = self._work
        try:
            self._value = function(*args)
        except BaseException as error:
            self._error = error

    def result(self):
        self.join(SECONDS)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


class Gate:
    """Holds a call of a FakeInference up: set as its ``before``, it stops the method's next call until it is opened."""

    def __init__(self, inference, method):
        self._method = method
        self._entered = threading.Event()
        self._go = threading.Event()
        self._inference = inference
        inference.before = self

    def __call__(self, name, *args):
        if name == self._method and not self._go.is_set():
            self._entered.set()
            assert self._go.wait(SECONDS)

    def wait(self):
        """Until the call is in progress."""
        assert self._entered.wait(SECONDS)

    def open(self):
        self._go.set()
        self._inference.before = lambda name, *args: None


@contextmanager
def held(inference, method):
    """A Gate, which is open at the end."""
    gate = Gate(inference, method)
    try:
        yield gate
    finally:
        gate.open()


@contextmanager
def hasty():
    """Within it threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def wait_for_background(sessions):
    """Until what was put off to the background is done."""
    done = threading.Event()
    sessions.later(done.set)
    assert done.wait(SECONDS)
