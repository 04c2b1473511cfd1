"""Predictors for ``omniops segment`` that are made once, or know what they find."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from segment_files import half

from omniops import sam2
from omniops.cli.segment import model as segment_model
from omniops.cli.segment import video as segment_video
from omniops.sam2.architectures import new
from omniops.sam2.frames import Frames


@pytest.fixture(scope="session")
def model():
    """Of random weights, and pictures of 64 x 64."""
    torch.manual_seed(0)
    return new("tiny", image_size=64)


@pytest.fixture
def loaded(monkeypatch, model):
    """The model, made once."""
    monkeypatch.setattr(segment_model, "load_model", lambda *args: model)
    return model


@pytest.fixture
def never_loaded(monkeypatch):
    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(segment_model, "load_model", load)


@pytest.fixture
def scripted(monkeypatch, loaded):
    """In place of the image predictor: three masks, of which the second is best, or one; and what it was asked."""
    asked = []

    class Scripted:
        device = torch.device("cpu")

        def __init__(self, model, upsampling):
            pass

        def set_image(self, pixels):
            self.pixels = pixels
            asked.append(pixels.copy())

        def predict(self, points, labels, box, multimask_output):
            asked.append((points, labels, box, multimask_output))
            height, width = self.pixels.shape[:2]
            halves = [half(height, width, side) for side in ("none", "left", "right")]
            if not multimask_output:
                return np.stack(halves[2:]), np.array([0.75]), None
            return np.stack(halves), np.array([0.1, 0.9, 0.5]), None

    monkeypatch.setattr(sam2, "SAM2ImagePredictor", Scripted)
    return asked


@pytest.fixture
def tracker(monkeypatch, loaded):
    """In place of the video predictor: the left half for object 1, the right half for others.

    What ``happenings`` has for a frame happens before it.
    """

    class State:
        def __init__(self, frames):
            self.frames = frames

        def predicted_ious(self, frame):
            return {1: 0.5, 2: 0.25}

        def save(self, path):
            path.touch()

        tracked_frames = {1: {}}  # noqa: RUF012

    class Tracker:
        def __init__(self, model, upsampling):
            self.model = model

        def init_state(self, path):
            self.state = State(Frames(path))
            self.numbers = []
            return self.state

        def add_new_points_or_box(self, state, frame, number, points, labels, box):
            self.calls.append((frame, number, points, labels, box))
            self.numbers += [number] if number not in self.numbers else []

        def propagate_in_video(self, state, first, reverse=False):
            self.calls.append((first, reverse))
            order = range(first, len(state.frames)) if not reverse else range(first, -1, -1) if first else ()
            height, width = state.frames.height, state.frames.width
            for frame in order:
                happening = self.happenings.get(frame)
                if isinstance(happening, str):
                    warnings.warn(happening, stacklevel=1)
                    return
                if happening:
                    raise happening
                sides = ["left" if number == 1 else "right" for number in self.numbers]
                masks = np.stack([half(height, width, side) for side in sides])
                yield frame, self.numbers, torch.from_numpy(masks)[:, None].float() - 0.5

    Tracker.calls, Tracker.happenings = [], {}
    monkeypatch.setattr(segment_video, "SAM2VideoPredictor", Tracker)
    return Tracker
