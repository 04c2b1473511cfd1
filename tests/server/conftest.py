"""What the server's tests share: an application whose predictor computes nothing, and a gallery of a short clip."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from flask.testing import FlaskClient
from server.client import Api
from server.fake_inference import FakeInference
from server.world import POINT, worlds

from omniops.drawing import VideoWriter
from omniops.server.predictors import Predictor
from omniops.server.settings import Settings
from omniops.server.web import create_app

FRAMES, HEIGHT, WIDTH = 10, 24, 32


class Client(FlaskClient):
    """A client as gunicorn's threads would have it; Flask's own says that it has one thread."""

    def open(self, *args, **kwargs):
        kwargs["environ_overrides"] = {"wsgi.multithread": True, **kwargs.get("environ_overrides", {})}
        return super().open(*args, **kwargs)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """An MP4 of 10 frames, 32 x 24."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with VideoWriter(path, fps=24) as writer:
        for t in range(FRAMES):
            writer.write(np.full((HEIGHT, WIDTH, 3), 20 * t, np.uint8))
    return path


@pytest.fixture
def data(tmp_path, clip):
    """The data folder, with clip.mp4 in its gallery."""
    (tmp_path / "data" / "gallery").mkdir(parents=True)
    shutil.copy(clip, tmp_path / "data" / "gallery" / "clip.mp4")
    return tmp_path / "data"


@pytest.fixture
def inference():
    """What answers in the place of a model."""
    return FakeInference(frames=FRAMES, width=WIDTH, height=HEIGHT)


@pytest.fixture
def make_app(data, inference):
    """create_app(Settings(**given)) with the data folder and the fake inference."""
    apps = []

    def make(**options):
        app = create_app(Settings(data=data, **options), [Predictor(lambda: inference, "fake")])
        app.test_client_class = Client
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["omniops"].sessions.shutdown()


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def api(client):
    """The operations, from the official front end's origin."""
    return Api(client)


@pytest.fixture
def make_world():
    """Makes a ``World``, whose sessions end with the test."""
    with worlds() as make:
        yield make


@pytest.fixture
def world(make_world):
    return make_world()


@pytest.fixture
def session(world):
    """One of a world, with an object."""
    session = world.start()
    session.add_points(0, 1, POINT, [1])
    return session
