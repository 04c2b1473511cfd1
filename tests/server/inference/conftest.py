"""A session, named a, in an ``Inference`` of random weights."""

import pytest
from clips import write_clip
from one_thread import one_thread as one_thread
from server.inference.sessions import FRAMES


@pytest.fixture(scope="module")
def model():
    from omniops import sam2

    model = sam2.load("tiny", "cpu", "float32", image_size=64, random_weights=True)
    cache_features(model.image_encoder.trunk)
    return model


def cache_features(trunk):
    """Have the trunk compute the features of an image once: the tests ask for those of the same few frames."""
    forward, features = trunk.forward, {}

    def cached_forward(images):
        key = tuple(images.shape), images.numpy().tobytes()
        if key not in features:
            features[key] = forward(images)
        return tuple(feature.clone() for feature in features[key])

    trunk.forward = cached_forward


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip", FRAMES))


@pytest.fixture
def inference(model, clip):
    from omniops.server.inference import Inference

    sessions = Inference(model)
    sessions.open("a", clip)
    return sessions
