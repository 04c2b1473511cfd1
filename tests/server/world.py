"""Sessions for tests: over predictors that compute nothing, with a clock of their own."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from server.fake_inference import FakeInference

from omniops.server.errors import NotFound
from omniops.server.predictors import Predictor
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

CLIP = Path("clip.mp4")
POINT = [[0.5, 0.5]]


class World:
    """Sessions over predictors that compute nothing, with a clock of their own."""

    def __init__(self, devices=1, **settings):
        self.now = 1000.0
        self.made = [[] for _ in range(devices)]
        self.errors = [[] for _ in range(devices)]
        self.predictors = [Predictor(self._maker(i), f"cuda:{i}") for i in range(devices)]
        self.sessions = Sessions(Settings(**settings), self.predictors, clock=lambda: self.now)

    def _maker(self, i):
        def make():
            if self.errors[i]:
                raise self.errors[i].pop(0)
            self.made[i].append(FakeInference())
            return self.made[i][-1]

        return make

    @property
    def inference(self):
        """That of the first device."""
        return self.made[0][-1]

    def start(self, name="gallery/clip.mp4", **options):
        return self.sessions.start(CLIP, name, **options)


@contextmanager
def worlds():
    """World, whose sessions end with the context."""
    made = []

    def make(*args, **settings):
        made.append(World(*args, **settings))
        return made[-1]

    yield make
    for world in made:
        world.sessions.shutdown()
        assert all(inference.overlaps == [] for device in world.made for inference in device)


def missing(world, id, reason):
    for use in (world.sessions.get, getattr(id, "add_points", None)):
        if use is None:
            continue
        with pytest.raises(NotFound) as raised:
            use(getattr(id, "id", id)) if use == world.sessions.get else use(0, 1, POINT, [1])
        assert raised.value.message == f"Cannot find session ID; it {reason}"
        assert raised.value.status == 404
