"""What the mask decoder expects of the masks of a video, against what it says in the official package."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH, write_clip
from one_thread import one_thread as one_thread
from video_predictor_pair import GREEN, RED, PredictorPair
from video_predictor_pair import clip as clip
from video_predictor_pair import long_clip as long_clip
from video_predictor_pair import models as models
from video_predictor_pair import oracle_fills_holes as oracle_fills_holes

from omniops.sam2 import frame_inference
from omniops.sam2.architectures import cast
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.modeling.sam2 import NO_OBJ_SCORE
from omniops.sam2.video_predictor import SAM2VideoPredictor


class Recorder:
    """The official predictor's scores, which it drops: of each object on each frame that of its mask, or 0."""

    def __init__(self, official):
        self.found = []
        forward = official._forward_sam_heads

        def recorded(*args, **kwargs):
            result = forward(*args, **kwargs)
            ious, object_score = result[2], result[-1]
            self.found.append(ious.max().item() if object_score > 0 else 0.0)
            return result

        official._forward_sam_heads = recorded


def test_they_are_those_of_the_official_decoder(models, clip):
    predictors = PredictorPair(models(), clip)
    recorder, state = Recorder(predictors.official), predictors.state
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_points_or_box(0, "two", box=GREEN)
    assert list(state.predicted_ious(0)) == [1, "two"]
    assert list(state.predicted_ious(0).values()) == pytest.approx(recorder.found, abs=1e-4)
    assert state.predicted_ious(1) == {}
    del recorder.found[:]
    found = []
    for frame, *_ in predictors.ours.propagate_in_video(state):
        found += state.predicted_ious(frame).values() if frame else []
    list(predictors.official.propagate_in_video(predictors.expected_state))
    assert len(found) == 10
    assert len(set(found)) > 5
    assert found == pytest.approx(recorder.found, abs=1e-4)
    corrected_before = state.predicted_ious(3)
    del recorder.found[:]
    predictors.add_new_points_or_box(3, 1, points=[RED, [5, 5]], labels=[1, 0])
    assert state.predicted_ious(3) == {1: pytest.approx(recorder.found[0], abs=1e-4), "two": corrected_before["two"]}


@pytest.mark.slow
def test_an_object_that_is_not_to_be_seen_has_0(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    points = [RED, [5, 5], [110, 70], [70, 20]]
    for i, point in enumerate(points):
        predictor.add_new_points_or_box(state, 0, i, points=[point], labels=[1])
    list(predictor.propagate_in_video(state))
    logits = [obj.tracked_output(frame).object_score_logits for obj in state.objects.values() for frame in range(1, 6)]
    predictors = PredictorPair(models(less=np.quantile(torch.cat(logits), 0.12).item()), clip)
    recorder, state = Recorder(predictors.official), predictors.state
    for i, point in enumerate(points):
        predictors.add_new_points_or_box(0, i, points=[point], labels=[1])
    del recorder.found[:]
    found = []
    for frame, _, masks in predictors.ours.propagate_in_video(state):
        ious = state.predicted_ious(frame)
        assert [iou > 0 for iou in ious.values()] == [bool((mask != NO_OBJ_SCORE).any()) for mask in masks]
        found += ious.values() if frame else []
    list(predictors.official.propagate_in_video(predictors.expected_state))
    assert found == pytest.approx(recorder.found, abs=1e-4)
    assert 0 < found.count(0.0) < len(found) == 20


def test_a_mask_that_was_given_has_1_and_an_empty_one_0(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    predictor.add_new_mask(state, 1, "empty", mask)
    mask[30:60, 26:56] = True
    predictor.add_new_mask(state, 1, "red", mask)
    assert state.predicted_ious(1) == {"empty": 0.0, "red": 1.0}
    with pytest.raises(ValueError, match="frame_idx must be from 0 to 5, got 6"):
        state.predicted_ious(6)


def test_they_stay_where_memories_do_not_and_in_copies(models, long_clip, monkeypatch):
    monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(long_clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    on_the_way = [state.predicted_ious(frame) for frame, *_ in predictor.propagate_in_video(state)]
    copied = copy.deepcopy(state)
    predictor.remove_object(state, 1)
    assert [copied.predicted_ious(frame) for frame in range(11)] == on_the_way
    assert state.predicted_ious(5) == {}


@pytest.mark.slow
def test_of_a_live_video_they_are_those_of_a_file(models, tmp_path):
    predictor = SAM2VideoPredictor(models()[1])
    states = [predictor.init_state(write_clip(tmp_path / "clip", 16))]
    states.append(predictor.init_state(LiveFrames(iter(states[0].frames), when_full="wait")))
    found = []
    for state in states:
        predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
        found.append([state.predicted_ious(frame) for frame, *_ in predictor.propagate_in_video(state)])
    assert len(found[0]) == 16
    assert found[1] == found[0]


def test_half_precision(models, clip):
    predictor = SAM2VideoPredictor(cast(copy.deepcopy(models()[1]), torch.bfloat16))
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    output = state.objects[1].temp_output_dict.cond_frame_outputs[0]
    assert output.predicted_iou.dtype == torch.float32
    assert 0 < state.predicted_ious(0)[1] <= 1
