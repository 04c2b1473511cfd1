"""States of videos in files: what goes on from one is what would have gone on without it, bit for bit."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH
from one_thread import one_thread as one_thread
from saved_clip import BOX, COUNT, LAST, POINT, SECOND, assert_same, reloaded, track_two
from saved_clip import clip as clip
from saved_clip import few_recent_frames as few_recent_frames
from saved_clip import model as model
from saved_clip import predictor as predictor
from saved_clip import state as state
from saved_clip import tracked as tracked

from omniops.sam2 import frame_inference
from omniops.sam2.architectures import cast
from omniops.sam2.frame_inference import FrameInference
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.mask_store import StoredMask
from omniops.sam2.video_predictor import SAM2VideoPredictor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_bit_for_bit_in_the_middle_of_a_propagation(model, clip, tmp_path, dtype):
    predictor = SAM2VideoPredictor(cast(copy.deepcopy(model), dtype))
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    predictor.add_new_points_or_box(state, 2, SECOND, **BOX)
    masks = predictor.propagate_in_video(state)
    for t, *_ in masks:
        if t == LAST:
            break
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    stored = [
        isinstance(o.pred_masks, StoredMask) for o in other.objects[1].output_dict.non_cond_frame_outputs.values()
    ]
    assert stored == [t <= LAST - 7 for t in range(1, LAST + 1)]
    assert other.obj_ids == [1, SECOND]
    expected = list(masks)
    assert_same(predictor.propagate_in_video(other, LAST + 1), expected)
    assert other.mask_store.dtype == dtype
    for t in range(COUNT):
        assert_same([predictor.masks_on_frame(other, t)], [predictor.masks_on_frame(state, t)])
        assert other.predicted_ious(t) == state.predicted_ious(t)
    predictor.reset_state(other)
    predictor.add_new_points_or_box(other, 0, 1, **POINT)
    predictor.add_new_points_or_box(other, 2, SECOND, **BOX)
    without_memories = next(predictor.propagate_in_video(other, LAST + 1))
    assert not torch.equal(without_memories[2], expected[0][2])


def test_what_was_tracked_is_told(predictor, clip, tmp_path):
    state = track_two(predictor, clip, 2)
    list(predictor.propagate_in_video(state, 1, reverse=True))
    predictor.add_new_points_or_box(state, 5, "late", **POINT)
    other = reloaded(predictor, state, tmp_path / "state")
    tracked = {0: True, 1: True, 2: False}
    assert other.tracked_frames == state.tracked_frames == {1: tracked, SECOND: tracked, "late": {}}
    assert list(other.tracked_frames[1]) == [0, 1, 2]
    assert "tracked_frames" not in set(other)
    assert dict(other.items()).keys() == dict(state.items()).keys()


def test_objects_are_corrected_added_and_removed_as_before(predictor, state, tmp_path):
    other = reloaded(predictor, state, tmp_path / "state.safetensors")

    def on_both(method, *args, **kwargs):
        results = [getattr(predictor, method)(each, *args, **kwargs) for each in (other, state)]
        if method == "propagate_in_video":
            assert_same(*results)
        elif method == "remove_object":
            assert results[0][0] == results[1][0]
            assert all(torch.equal(a[1], b[1]) for a, b in zip(results[0][1], results[1][1], strict=True))
        else:
            assert results[0][:2] == results[1][:2]
            assert torch.equal(results[0][2], results[1][2])

    on_both("add_new_points_or_box", 1, 1, points=[[60, 20]], labels=[0])  # of which the mask is in the store
    on_both("add_new_points_or_box", 0, 1, points=[[40, 40]], labels=[1], clear_old_points=False)
    on_both("add_new_points_or_box", LAST, "new", points=[[70, 50]], labels=[1])
    on_both("add_new_mask", 4, SECOND, np.eye(40))
    on_both("propagate_in_video", 1, 4)
    on_both("clear_all_prompts_in_frame", 0, "new")
    on_both("remove_object", SECOND)
    on_both("clear_all_prompts_in_frame", 1, 1)
    on_both("propagate_in_video", LAST, 2, reverse=True)
    assert other.obj_ids == [1, "new"]


def test_in_reverse(predictor, clip, tmp_path):
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, COUNT - 2, 1, **POINT)
    list(predictor.propagate_in_video(state, COUNT - 2, 8, reverse=True))
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert other.tracked_frames == {1: dict.fromkeys(range(COUNT - 2, 1, -1), True)}
    remaining = [list(predictor.propagate_in_video(each, 1, reverse=True)) for each in (other, state)]
    assert [t for t, *_ in remaining[0]] == [1, 0]
    assert_same(*remaining)


def test_prompts_that_were_not_propagated_yet(predictor, clip, tmp_path):
    state = track_two(predictor, clip, 3)
    predictor.add_new_points_or_box(state, 2, 1, points=[[60, 20]], labels=[0])
    predictor.add_new_mask(state, 6, "new", np.eye(30))
    predictor.remove_object(state, SECOND)
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert other.objects[1].point_inputs.keys() == {0, 2}
    assert torch.equal(predictor.masks_on_frame(other, 6)[2], predictor.masks_on_frame(state, 6)[2])
    assert_same(predictor.propagate_in_video(other, 2, 5), predictor.propagate_in_video(state, 2, 5))


def test_conditioning_frames_keep_their_order(model, clip, tmp_path):
    """Memories are attended to in the order in which they came."""
    predictor = SAM2VideoPredictor(model, add_all_frames_to_correct_as_cond=True)
    state = predictor.init_state(clip)
    for t in (8, 3, 5):
        predictor.add_new_points_or_box(state, t, 1, points=[[20 + 6 * t, 44]], labels=[1])
    list(predictor.propagate_in_video(state, 0, 1))
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert list(other.objects[1].output_dict.cond_frame_outputs) == [8, 3, 5]
    assert_same(predictor.propagate_in_video(other, 2, 4), predictor.propagate_in_video(state, 2, 4))


def test_a_state_without_objects(predictor, clip, tmp_path):
    other = reloaded(predictor, predictor.init_state(clip), tmp_path / "state.safetensors")
    assert other.obj_ids == []
    predictor.add_new_points_or_box(other, 0, 1, **POINT)
    assert other.obj_ids == [1]


def test_copies_are_saved_and_loaded_states_copied(predictor, state, tmp_path):
    other = copy.deepcopy(reloaded(predictor, copy.deepcopy(state), tmp_path / "state.safetensors"))
    os.remove(tmp_path / "state.safetensors")
    assert other.model is state.model is predictor.model
    assert_same(predictor.propagate_in_video(other, LAST + 1, 1), predictor.propagate_in_video(state, LAST + 1, 1))


def test_options_of_init_state_are_taken(predictor, clip, tmp_path):
    state = track_two(predictor, clip, 1, offload_state_to_cpu=True)
    path = tmp_path / "state.safetensors"
    assert not reloaded(predictor, state, path).offload_state_to_cpu
    other = reloaded(predictor, state, path, offload_state_to_cpu=True, offload_video_to_cpu=True)
    assert (other.offload_state_to_cpu, other.offload_video_to_cpu) == (True, True)
    with pytest.raises(TypeError, match="frames"):
        predictor.load_state(path, clip, frames=3)


def test_another_dtype_goes_on(model, clip, tmp_path):
    """As from a GPU to a CPU: not with the same bits."""
    half = SAM2VideoPredictor(cast(copy.deepcopy(model), torch.bfloat16))
    state = track_two(half, clip, LAST)
    state.save(tmp_path / "state.safetensors")
    predictor = SAM2VideoPredictor(model)
    other = predictor.load_state(tmp_path / "state.safetensors", clip)
    ((frame, ids, masks),) = predictor.propagate_in_video(other, LAST + 1, 0)
    assert (frame, ids) == (LAST + 1, [1, SECOND])
    ((*_, expected),) = half.propagate_in_video(state, LAST + 1, 0)
    torch.testing.assert_close(masks, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert other.mask_store.dtype == torch.float32
    predictor.add_new_points_or_box(other, 1, 1, points=[[60, 20]], labels=[0])


def test_frames_are_encoded_in_the_batches_of_before(predictor, clip, tmp_path, monkeypatch):
    """In others the last bits of features may differ."""
    monkeypatch.setitem(frame_inference.FRAMES_PER_BATCH, "cpu", 4)
    batches, encode = [], FrameInference._encode
    monkeypatch.setattr(
        FrameInference, "_encode", lambda self, images: batches.append(list(images)) or encode(self, images)
    )
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    masks = predictor.propagate_in_video(state)
    assert [next(masks)[0] for _ in range(6)] == [0, 1, 2, 3, 4, 5]  # and of 6 to 8 the features
    masks.close()
    assert batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert other.frames_with_features == state.frames_with_features
    assert other.nbytes < state.nbytes / 2
    found = []
    for each in (other, state):
        del batches[:]
        masks = predictor.propagate_in_video(each, 6)
        found.append([next(masks) for _ in range(4)])
        masks.close()
        assert batches == ([[5, 6, 7, 8]] if each is other else []) + [[9, 10, 11]]
        assert each.frames_with_features == other.frames_with_features
    assert_same(*found)
    monkeypatch.undo()  # as on a device that takes less at once
    alone = predictor.load_state(tmp_path / "state.safetensors", clip)
    assert alone.frames_with_features == [0]


def live(clip, first=0):
    """The frames of the clip from one on, as they come."""
    return (clip[t] for t in range(first, COUNT))


@pytest.mark.slow
def test_a_live_video_goes_on_with_the_next_frames(predictor, clip, tmp_path):
    """Those that are kept can still be corrected, and a memory that is yet to be encoded is."""
    state = predictor.init_state(live(clip))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    list(predictor.propagate_in_video(state, max_frame_num_to_track=5))
    predictor.add_new_points_or_box(state, 5, 1, points=[[60, 20]], labels=[0])
    predictor.add_new_points_or_box(state, 4, "b", **BOX)
    other = reloaded(predictor, state, tmp_path / "state.safetensors", live(clip, 6))
    assert (other.num_frames, other.frames.kept) == (6, range(6))
    assert np.array_equal(other.frames[3], clip[3])
    found = list(predictor.propagate_in_video(other))
    assert [t for t, *_ in found] == list(range(6, COUNT))
    assert_same(found, predictor.propagate_in_video(state))
    assert other.num_frames == COUNT
    results = [predictor.add_new_points_or_box(each, 5, "late", **POINT) for each in (other, state)]
    assert torch.equal(results[0][2], results[1][2])


def test_a_live_video_that_no_propagation_has_begun(predictor, clip, tmp_path):
    state = predictor.init_state(live(clip))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    other = reloaded(
        predictor,
        state,
        tmp_path / "state",
        LiveFrames(live(clip, 1), when_full="drop_oldest", buffer_size=20),
    )
    found = list(predictor.propagate_in_video(other, max_frame_num_to_track=3))
    assert [t for t, *_ in found] == [0, 1, 2, 3]
    assert_same(found, predictor.propagate_in_video(state, max_frame_num_to_track=3))


@pytest.mark.slow
def test_only_the_last_frames_of_a_live_video_are_in_the_file(predictor, clip, tmp_path):
    frames = [clip[t % COUNT] for t in range(25)]
    state = predictor.init_state(iter(frames))
    sizes = {}
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    for t, *_ in predictor.propagate_in_video(state):
        if t in (17, 22):
            state.save(tmp_path / f"{t}")
            sizes[t] = (tmp_path / f"{t}").stat().st_size
    assert abs(sizes[22] - sizes[17]) < 100
    other = predictor.load_state(tmp_path / "22", iter(frames[23:]))
    assert other.frames.kept == range(7, 23)
    assert [t for t, *_ in predictor.propagate_in_video(other)] == [23, 24]


def test_live_videos_that_cannot_go_on(predictor, clip, tmp_path):
    path = tmp_path / "state.safetensors"
    predictor.init_state(live(clip)).save(path)
    with pytest.raises(ValueError, match="is the state of a live video, and video is a file or folder"):
        predictor.load_state(path, clip)
    with pytest.raises(ValueError, match=f"of {WIDTH} x {HEIGHT} pixels, and video has 8 x 6 pixels"):
        predictor.load_state(path, [np.zeros((6, 8, 3), np.uint8)])
    taken = LiveFrames(live(clip))
    taken.take()
    with pytest.raises(ValueError, match="must be new, but 2 of its frames are taken"):
        predictor.load_state(path, taken)
    predictor.init_state(clip).save(path)
    with pytest.raises(ValueError, match="is the state of a file or folder, and video is a live video"):
        predictor.load_state(path, live(clip))
