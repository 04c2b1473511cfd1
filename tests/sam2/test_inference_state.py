"""The state of a video: what it keeps, as which keys it is read, and its copies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH
from one_thread import one_thread as one_thread
from video_predictor_pair import GREEN, RED, PredictorPair
from video_predictor_pair import clip as clip
from video_predictor_pair import long_clip as long_clip
from video_predictor_pair import models as models
from video_predictor_pair import oracle_fills_holes as oracle_fills_holes

from omniops.sam2 import frame_inference
from omniops.sam2.mask_store import StoredMask
from omniops.sam2.video_predictor import SAM2VideoPredictor


@pytest.mark.slow
def test_what_is_kept_does_not_grow_but_for_pointers(models, long_clip, monkeypatch):
    monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(long_clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    for _ in range(2):  # what is written again takes no more room
        list(predictor.propagate_in_video(state))
    outputs = state.objects[1].output_dict.non_cond_frame_outputs.values()
    assert sum(output.maskmem_features is not None for output in outputs) == 7
    assert sum(isinstance(output.pred_masks, torch.Tensor) for output in outputs) == 7
    assert len(state.frames_with_features) == 8
    assert state.mask_store.num_slots <= 4


def test_state_reads_as_the_official_one(models, clip):
    predictors = PredictorPair(models(), clip)
    predictors.add_new_points_or_box(0, 7, points=[RED], labels=[1])
    for key in ("obj_ids", "num_frames", "video_height", "video_width", "device", "storage_device"):
        assert predictors.state[key] == predictors.expected_state[key]
    assert len(predictors.state["images"]) == len(predictors.expected_state["images"])
    assert torch.equal(predictors.state["images"][4], predictors.expected_state["images"][4])
    assert torch.equal(predictors.state["images"][1:3], predictors.expected_state["images"][1:3])
    predictors.add_new_points_or_box(2, "x", points=[RED, [5, 5]], labels=[1, 0])
    predictors.propagate_in_video()
    for key in ("obj_id_to_idx", "obj_idx_to_id", "frames_tracked_per_obj"):
        assert predictors.state[key] == predictors.expected_state[key]
    points, expected = (state["point_inputs_per_obj"] for state in (predictors.state, predictors.expected_state))
    for i, t in ((0, 0), (1, 2)):
        assert list(points[i]) == list(expected[i]) == [t]
        for name in ("point_coords", "point_labels"):
            torch.testing.assert_close(points[i][t][name], expected[i][t][name])
    with pytest.raises(KeyError, match="num_frames"):
        predictors.state["output_dict_per_obj"]


def test_state_is_a_mapping(models, clip):
    predictors = PredictorPair(models(), clip)
    state = predictors.state
    assert "num_frames" in state
    assert "output_dict_per_obj" not in state
    assert 3 not in state
    assert set(state) - {"frames"} <= set(predictors.expected_state)
    assert set(predictors.expected_state) - set(state) == {
        "cached_features",
        "constants",
        "mask_inputs_per_obj",
        "output_dict_per_obj",
        "temp_output_dict_per_obj",
    }
    assert len(state) == len(list(state)) == len(state.keys()) == len(state.values())
    assert dict(state.items())["num_frames"] == 6
    assert state.get("video_height") == HEIGHT
    assert state.get("output_dict_per_obj", 7) == 7
    assert {**state}["video_width"] == WIDTH
    assert state
    other = predictors.ours.init_state(clip)
    assert state != other
    assert len({state, other}) == 2
    with pytest.raises(TypeError, match="item assignment"):
        state["num_frames"] = 3


def stored_masks(state):
    """The masks of object 1 that are on disk."""
    outputs = state.objects[1].output_dict.non_cond_frame_outputs.values()
    return [output.pred_masks for output in outputs if isinstance(output.pred_masks, StoredMask)]


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_a_copied_state_goes_its_own_way(models, clip, long_clip, monkeypatch, deep):
    """With masks in memory and on disk, and with a prompt that comes after the propagation."""
    if deep:
        monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(long_clip if deep else clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    list(predictor.propagate_in_video(state))
    predictor.add_new_points_or_box(state, 4, "new", box=GREEN)
    twin = copy.deepcopy(state)
    assert twin is not state
    assert twin.frames is state.frames
    assert twin.images is not state.images
    assert dict(twin["obj_id_to_idx"]) == {1: 0, "new": 1}
    stores = [{mask.store for mask in stored_masks(one)} for one in (state, twin)]
    assert list(map(len, stores)) == [deep, deep]
    assert stores[0].isdisjoint(stores[1])  # reading from one, in another thread, moves its file's position
    expected = list(predictor.propagate_in_video(state))
    assert not twin.objects["new"].output_dict.cond_frame_outputs
    predictor.add_new_points_or_box(state, 5, 1, points=[[20, 20]], labels=[0])
    predictor.remove_object(state, "new")
    assert twin["obj_ids"] == [1, "new"]
    assert 5 not in twin["point_inputs_per_obj"][0]
    found = list(predictor.propagate_in_video(twin))
    for (t, ids, masks), (u, others, right) in zip(found, expected, strict=True):
        assert (t, ids) == (u, others)
        assert torch.equal(masks, right)
    predictor.reset_state(twin)
    assert state["obj_ids"] == [1]
    assert bool(stored_masks(state)) == deep
    list(predictor.propagate_in_video(state))


def test_a_state_that_is_copied_while_it_is_propagated(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    coming = predictor.propagate_in_video(state)
    for _ in range(3):
        next(coming)
    twin = copy.deepcopy(state)
    expected = list(coming)
    assert 3 not in twin["frames_tracked_per_obj"][0]
    found = list(predictor.propagate_in_video(twin, start_frame_idx=3))
    assert [t for t, *_ in found] == [t for t, *_ in expected] == [3, 4, 5]
    for (_, _, masks), (_, _, right) in zip(found, expected, strict=True):
        assert torch.equal(masks, right)


def test_a_copied_state_of_a_video_file(models, tmp_path):
    av = pytest.importorskip("av", reason="what writes and reads the video")
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for t in range(3):
            pixels = np.random.default_rng(t).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode())
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(tmp_path / "clip.mkv")
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    held = copy.deepcopy({"held": state, "again": state})
    assert held["held"] is held["again"]
    results = [list(predictor.propagate_in_video(one)) for one in (state, held["held"])]
    for (_, _, masks), (_, _, right) in zip(*results, strict=True):
        assert torch.equal(masks, right)
