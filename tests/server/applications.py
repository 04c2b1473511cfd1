"""Applications whose predictors run in processes of their own, but have no model.

gunicorn 'server.applications:app("Delayed")'
python -m server.applications Delayed PORT THREADS  # as omniops serve does
"""

import os
import sys
import time

from server.fake_inference import FakeInference

from omniops.server import create_app, predictors
from omniops.server.settings import Settings


class Delayed(FakeInference):
    """FRAMES of a video, each of which takes DELAY seconds to track; a prompt of object 99 takes a minute."""

    def __init__(self, model=None, **options):
        super().__init__(model, frames=int(os.environ.get("FRAMES", "10")))
        self._delay = float(os.environ.get("DELAY", "0"))
        self.before = self._wait

    def _wait(self, name, *arguments):
        if name == "next":
            time.sleep(self._delay)
        elif name == "add" and arguments[2] == 99:
            time.sleep(60)

    def describe(self):
        return {**super().describe(), "device": str(os.getpid())}


class Large(Delayed):
    """Of which every mask is of 100 kB: no socket holds many parts of a stream."""

    def _rectangle(self, used, object, frame, size):
        return {"size": used.size, "counts": "0" * 100_000}


class OnAMac(Delayed):
    """On a machine whose GPU does not survive a fork; it tells which device there is in its process."""

    def describe(self):
        import pretended_mac  # noqa: F401 the machine

        from omniops import device

        name = f"{device.pick()}, forked: {device.in_forked_child()}"
        return {**super().describe(), "device": name, "device_type": "mps"}


def app(inference):
    """The environment's settings, with a predictor of that class."""
    if inference == "OnAMac":
        import pretended_mac  # noqa: F401 in the web process too
    predictors._INFERENCE = f"server.applications:{inference}"
    return create_app(Settings.from_environment({**os.environ, "OMNIOPS_MODEL": "no model"}))


if __name__ == "__main__":
    from omniops.server import serving

    inference, port, threads = sys.argv[1:]
    patience = Settings.from_environment().send_timeout
    with serving.listen("127.0.0.1", int(port)) as bound:
        serving.serve(lambda: app(inference), bound, threads=int(threads), patience=patience)
