"""A session, named a, in an ``Inference`` of random weights."""

import pytest
from clips import write_clip
from server.inference.sessions import FRAMES


@pytest.fixture(scope="module")
def model():
    from omniops import sam2

    return sam2.load("tiny", "cpu", "float32", image_size=64, random_weights=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip", FRAMES))


@pytest.fixture
def inference(model, clip):
    from omniops.server.inference import Inference

    made = Inference(model)
    made.open("a", clip)
    return made
