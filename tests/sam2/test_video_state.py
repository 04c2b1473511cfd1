"""States of the video predictor that share frames, previews, what they take of memory, and guided masks."""

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH, write_clip
from one_thread import one_thread as one_thread

from omniops import fill_holes
from omniops.sam2.checkpoints import load
from omniops.sam2.frame_inference import FrameInference
from omniops.sam2.frames import Frames
from omniops.sam2.transforms import to_tensor
from omniops.sam2.upsampling import guided
from omniops.sam2.video_predictor import SAM2VideoPredictor

POINT = [[36, 44]]


@pytest.fixture(scope="module")
def predictor():
    return SAM2VideoPredictor(load("tiny", "cpu", "float32", image_size=64, random_weights=True))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip", 4)


def test_states_share_frames(predictor, clip):
    frames = Frames(clip)
    states = [predictor.init_state(frames), predictor.init_state(frames)]
    assert states[0].frames is states[1].frames is frames
    of_each = [predictor.add_new_points_or_box(state, 1, 1, POINT, [1])[2] for state in states]
    assert torch.equal(*of_each)
    states[0].read_from(Frames(clip))
    assert states[0].frames is not frames
    masks = [[masks for *_, masks in predictor.propagate_in_video(state)] for state in states]
    assert all(torch.equal(*pair) for pair in zip(*masks, strict=True))


def test_a_preview_is_the_mask_of_a_new_object(predictor, clip):
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 1, "other", box=[10, 20, 60, 70])
    bytes_before = state.nbytes
    previews = [
        predictor.preview(state, 1, POINT, [1]),
        predictor.preview(state, 1, [[36 / WIDTH, 44 / HEIGHT]], [1], normalize_coords=False),
        predictor.preview(state, 1, box=[5, 5, 50, 50]),
    ]
    assert (state.obj_ids, state.nbytes) == (["other"], bytes_before)
    assert previews[0].shape == (1, 1, HEIGHT, WIDTH)
    expected = predictor.add_new_points_or_box(state, 1, "new", POINT, [1])[2][1:]
    torch.testing.assert_close(previews[1], previews[0])
    assert torch.equal(previews[0], expected)
    assert not torch.equal(previews[2], expected)
    with pytest.raises(ValueError, match="frame_idx must be from 0 to 3, got 4"):
        predictor.preview(state, 4, POINT, [1])
    with pytest.raises(ValueError, match="there is no prompt"):
        predictor.preview(state, 0)


def test_what_is_known_of_a_frame(predictor, clip):
    state = predictor.init_state(clip)
    added = predictor.add_new_points_or_box(state, 1, 1, POINT, [1])
    assert torch.equal(predictor.masks_on_frame(state, 1)[2], added[2])
    assert predictor.masks_on_frame(state, 2)[2].unique().tolist() == [-1024]
    for frame, ids, masks in predictor.propagate_in_video(state):
        known = predictor.masks_on_frame(state, frame)
        assert known[:2] == (frame, ids)
        assert torch.equal(known[2], masks)
    with pytest.raises(ValueError, match="frame_idx must be from 0 to 3"):
        predictor.masks_on_frame(state, -1)


def test_features_are_released(predictor, clip):
    state = predictor.init_state(clip)
    assert state.nbytes == 0
    for frame in range(3):
        predictor.preview(state, frame, POINT, [1])
    three = state.nbytes
    state.release_features(keep=1)
    assert state.frames_with_features == [2]
    assert state.nbytes * 3 == three
    state.release_features()
    assert state.nbytes == 0
    predictor.preview(state, 1, POINT, [1])
    assert state.nbytes * 3 == three


def test_frames_decoded_ahead_are_not_kept(predictor, clip):
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, POINT, [1])
    masks = predictor.propagate_in_video(state)
    next(masks)
    assert state.images.num_prefetched
    masks.close()
    assert not state.images.num_prefetched
    assert len(list(predictor.propagate_in_video(state))) == 4
    assert not state.images.num_prefetched


def test_guided_masks(predictor, clip):
    with_guide = SAM2VideoPredictor(predictor.model, upsampling="guided")
    states = [either.init_state(clip) for either in (predictor, with_guide)]
    for either, state in zip((predictor, with_guide), states, strict=True):
        for obj_id in (1, 2):
            either.add_new_points_or_box(state, 0, obj_id, [[36 + 20 * obj_id, 44]], [1])
        list(either.propagate_in_video(state))
    frames = Frames(clip)
    for frame in range(4):
        outputs = [obj.tracked_output(frame) for obj in states[0].objects.values()]
        low = fill_holes(torch.cat([output.pred_masks for output in outputs]), predictor.fill_hole_area)
        expected = guided(low, to_tensor(frames[frame], torch.device("cpu")), (HEIGHT, WIDTH))
        assert torch.equal(with_guide.masks_on_frame(states[1], frame)[2], expected)
    with pytest.raises(ValueError, match="upsampling must be bilinear or guided, got 'nearest'"):
        SAM2VideoPredictor(predictor.model, upsampling="nearest")


def test_an_error_leaves_the_object_as_it_was(predictor, clip, monkeypatch):
    state = predictor.init_state(clip)
    before = predictor.add_new_points_or_box(state, 0, 1, POINT, [1])[2]
    with monkeypatch.context() as patch:
        patch.setattr(FrameInference, "get_orig_video_res_output", lambda *_: 1 / 0)
        for obj_id in (1, 2):
            with pytest.raises(ZeroDivisionError):
                predictor.add_new_points_or_box(state, 0, obj_id, [[90, 20]], [1])
            with pytest.raises(ZeroDivisionError):
                predictor.add_new_mask(state, 1, obj_id, np.ones((4, 4)))
    assert state.obj_ids == [1]
    assert list(state.objects[1].point_inputs) == [0]
    assert state.objects[1].prompt_frames == {0}
    assert torch.equal(predictor.masks_on_frame(state, 0)[2], before)
    assert predictor.masks_on_frame(state, 1)[2].unique().tolist() == [-1024]
