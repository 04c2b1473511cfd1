"""Fixtures of tests of states in files: a clip, and a predictor that has followed two objects in a part of it."""

from __future__ import annotations

import copy

import pytest
import torch
from clips import SHARPER, write_clip

from omniops.sam2 import frame_inference
from omniops.sam2.checkpoints import load
from omniops.sam2.frames import Frames
from omniops.sam2.video_predictor import SAM2VideoPredictor

COUNT, LAST = 12, 8
"""How many frames the clip has, and up to which of them the objects were followed."""
POINT = {"points": [[36, 44]], "labels": [1]}
BOX = {"box": [98, 58, 122, 82]}
SECOND = ("b", 2.5)
"""The id of the second object; the first is 1."""


@pytest.fixture(scope="session")
def model():
    """Under whose weights memories and pointers change masks visibly."""
    model = load("tiny", "cpu", "float32", image_size=64, random_weights=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in SHARPER.items():
                if part in name:
                    parameter.mul_(factor)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(20)
    return model


@pytest.fixture(scope="session")
def predictor(model):
    return SAM2VideoPredictor(model)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return Frames(write_clip(tmp_path_factory.mktemp("clips") / "clip", COUNT))


@pytest.fixture(autouse=True)
def few_recent_frames(monkeypatch):
    """So that masks of a short clip go to the store."""
    monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)


def track_two(predictor, clip, last, **options):
    """Two objects from the first frame on up to that one."""
    state = predictor.init_state(clip, **options)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    predictor.add_new_points_or_box(state, 0, SECOND, **BOX)
    frames = [t for t, *_ in predictor.propagate_in_video(state, max_frame_num_to_track=last)]
    assert frames == list(range(last + 1))
    return state


@pytest.fixture(scope="module")
def tracked(predictor, clip):
    """A state in which two objects are followed so far, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)
        return track_two(predictor, clip, LAST)


@pytest.fixture
def state(tracked):
    return copy.deepcopy(tracked)


def reloaded(predictor, state, path, video=None, **options):
    """The state after it was saved and loaded."""
    state.save(path)
    loaded = predictor.load_state(path, state.frames if video is None else video, **options)
    assert [kept(obj) for obj in loaded.objects.values()] == [kept(obj) for obj in state.objects.values()]
    return loaded


def kept(obj):
    """What is kept of an object, but for the tensors."""
    return (
        list(obj.point_inputs),
        obj.prompt_frames,
        obj.frames_tracked,
        list(obj.recent_frames),
        [
            (t, output.has_prompt, type(output.pred_masks), output.maskmem_features is None)
            for output_dict in (obj.output_dict, obj.temp_output_dict)
            for outputs in (output_dict.cond_frame_outputs, output_dict.non_cond_frame_outputs)
            for t, output in outputs.items()
        ],
    )


def assert_same(found, expected):
    """The same bits of what methods return, in which there is something to see."""
    found, expected = list(found), list(expected)
    assert [(t, ids) for t, ids, _ in found] == [(t, ids) for t, ids, _ in expected]
    for (*_, masks), (*_, others) in zip(found, expected, strict=True):
        assert torch.equal(masks, others)
        assert all(len(mask.unique()) > 100 for mask in masks)
