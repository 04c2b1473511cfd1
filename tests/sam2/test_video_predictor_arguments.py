"""The arguments of the video predictor and its methods: what they take, and what they say of others."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from one_thread import one_thread as one_thread
from video_predictor_pair import RED, SIDE
from video_predictor_pair import clip as clip
from video_predictor_pair import long_clip as long_clip
from video_predictor_pair import models as models
from video_predictor_pair import oracle_fills_holes as oracle_fills_holes

from omniops.sam2.architectures import cast
from omniops.sam2.video_predictor import SAM2VideoPredictor


def test_numpy_integers_are_integers(models, clip):
    predictor = SAM2VideoPredictor(models()[1], fill_hole_area=np.int64(8), max_cond_frames_in_attn=np.int32(2))
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, np.int64(1), np.int64(3), points=np.array([RED]), labels=np.array([1]))
    tracked = list(predictor.propagate_in_video(state, np.int64(1), np.int16(2)))
    assert [(type(frame), frame) for frame, *_ in tracked] == [(int, 1), (int, 2), (int, 3)]
    predictor.clear_all_prompts_in_frame(state, np.uint8(1), 3)
    with pytest.raises(ValueError, match="fill_hole_area must not be negative, got -1"):
        SAM2VideoPredictor(models()[1], fill_hole_area=-1)
    with pytest.raises(TypeError, match="fill_hole_area must be an integer, got float"):
        SAM2VideoPredictor(models()[1], fill_hole_area=8.0)
    with pytest.raises(ValueError, match="max_cond_frames_in_attn must be -1 or at least 2, got 1"):
        SAM2VideoPredictor(models()[1], max_cond_frames_in_attn=1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"frame_idx": 6}, ValueError, "frame_idx must be from 0 to 5, got 6"),
        ({"frame_idx": -1}, ValueError, "frame_idx must be from 0 to 5, got -1"),
        ({"frame_idx": 1.5}, TypeError, "frame_idx must be an integer, got float"),
        ({"obj_id": [1]}, TypeError, "obj_id must be a number or a name, got list"),
        ({"points": None}, ValueError, "points and labels must be given together"),
        ({"labels": None}, ValueError, "points and labels must be given together"),
        ({"points": None, "labels": None}, ValueError, "there is no prompt"),
        ({"points": [], "labels": []}, ValueError, "there is no prompt"),
        ({"points": np.zeros((0, 2)), "labels": np.zeros(0)}, ValueError, "there is no prompt"),
        ({"points": [[1, 2, 3]]}, ValueError, r"points must be \(P, 2\), got \(1, 3\)"),
        ({"points": [1, 2]}, ValueError, r"points must be \(P, 2\), got \(2,\)"),
        ({"points": np.zeros((2, 1, 2))}, ValueError, r"points must be \(P, 2\), got \(2, 1, 2\)"),
        ({"points": "here"}, TypeError, "points must be an array of numbers, got str"),
        ({"points": [[np.nan, 1]]}, ValueError, "points and box must be finite"),
        ({"labels": [1, 0]}, ValueError, r"labels must be \(1,\) as points say, got \(2,\)"),
        ({"labels": [4]}, ValueError, r"labels must be 1 .* got \[4\]"),
        ({"labels": [0.5]}, ValueError, r"labels must be 1 .* got \[0.5\]"),
        ({"box": [1, 2, 3]}, ValueError, r"box must be x0, y0, x1, y1, got the shape \(3,\)"),
        ({"box": [50, 2, 3, 40]}, ValueError, "box must be x0, y0, x1, y1 with x0 <= x1"),
        ({"box": [0, 0, np.inf, 9]}, ValueError, "points and box must be finite"),
        ({"box": [0, 0, 9, 9], "clear_old_points": False}, ValueError, "box needs clear_old_points=True"),
        ({"inference_state": {}}, TypeError, "inference_state must be what init_state"),
    ],
)
def test_prompts_that_are_wrong(models, clip, arguments, error, words):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    right = {"inference_state": state, "frame_idx": 0, "obj_id": 1, "points": [RED], "labels": [1]}
    with pytest.raises(error, match=words):
        predictor.add_new_points_or_box(**{**right, **arguments})
    assert state.obj_ids == []


def test_other_arguments_that_are_wrong(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    with pytest.raises(ValueError, match="there is no object to propagate"):
        next(predictor.propagate_in_video(state))
    for shape in ((3, 4, 5), (0, 4), (4,)):
        with pytest.raises(ValueError, match=r"mask must be \(H, W\)"):
            predictor.add_new_mask(state, 0, 1, np.ones(shape))
    with pytest.raises(TypeError, match="mask must be an array of numbers"):
        predictor.add_new_mask(state, 0, 1, None)
    with pytest.raises(ValueError, match="frame_idx must be from 0 to 5, got 9"):
        predictor.add_new_mask(state, 9, 1, np.ones((4, 4)))
    assert state.obj_ids == []
    predictor.add_new_mask(state, 0, 1, np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"obj_id 2 is unknown: the objects are \[1\]"):
        predictor.clear_all_prompts_in_frame(state, 0, 2)
    with pytest.raises(ValueError, match=r"obj_id 2 is unknown: the objects are \[1\]"):
        predictor.remove_object(state, 2, strict=True)
    with pytest.raises(ValueError, match="start_frame_idx must be from 0 to 5, got 6"):
        next(predictor.propagate_in_video(state, start_frame_idx=6))
    with pytest.raises(ValueError, match="max_frame_num_to_track must not be negative, got -1"):
        next(predictor.propagate_in_video(state, max_frame_num_to_track=-1))
    with pytest.raises(TypeError, match="max_frame_num_to_track must be an integer, got float"):
        next(predictor.propagate_in_video(state, max_frame_num_to_track=2.0))
    predictor.clear_all_prompts_in_frame(state, 0, 1)
    with pytest.raises(ValueError, match="obj_id 1 has no prompt"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(TypeError, match="model must be a SAM2Base, got str"):
        SAM2VideoPredictor("tiny")


def test_from_pretrained_tells_options_apart(models, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": models()[0].state_dict()}, path)
    predictor = SAM2VideoPredictor.from_pretrained(
        str(path), device="cpu", dtype="float32", image_size=SIDE, fill_hole_area=3
    )
    assert predictor.fill_hole_area == 3
    assert predictor.image_size == SIDE
    assert predictor.device == torch.device("cpu")


def test_a_model_that_is_in_half_precision_all_over(models):
    model = copy.deepcopy(models()[1]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"model must have float32 where .* got torch.bfloat16 all over: .*load\("):
        SAM2VideoPredictor(model)


def test_what_multiplies_matrices_is_cast_once(twins):
    model = cast(copy.deepcopy(twins(image_size=SIDE)[1]), torch.bfloat16)
    assert model.memory_attention.layers[0].linear1.weight.dtype == torch.bfloat16
    assert model.memory_encoder.out_proj.bias.dtype == torch.bfloat16
    assert model.memory_attention.norm.weight.dtype == torch.float32
    assert model.no_mem_embed.dtype == torch.float32
