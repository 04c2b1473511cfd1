"""The video predictor against the official package's, call by call, and with prompts and videos of every kind."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH, write_clip
from one_thread import one_thread as one_thread
from PIL import Image
from video_predictor_pair import GREEN, RED, SIDE, PredictorPair
from video_predictor_pair import clip as clip
from video_predictor_pair import long_clip as long_clip
from video_predictor_pair import models as models
from video_predictor_pair import oracle_fills_holes as oracle_fills_holes

from omniops.device import autocast_dtype
from omniops.sam2 import frame_inference
from omniops.sam2.architectures import cast
from omniops.sam2.mask_store import StoredMask
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.video_predictor import SAM2VideoPredictor


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_two_objects_forward_and_backward(models, clip, version):
    predictors = PredictorPair(models(version), clip)
    predictors.add_new_points_or_box(2, 1, points=[[47, 45]], labels=[1])
    predictors.add_new_points_or_box(2, "box", box=np.array(GREEN) - [12, 0, 12, 0])
    predictors.propagate_in_video()
    predictors.propagate_in_video(start_frame_idx=3, reverse=True)
    assert predictors.present > 10


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_objects_come_and_go(models, clip, version):
    points = [RED, [5, 5], [110, 70], [70, 20]]
    predictor = SAM2VideoPredictor(models(version)[1])
    state = predictor.init_state(clip)
    for i, point in enumerate(points):
        predictor.add_new_points_or_box(state, 0, i, points=[point], labels=[1])
    list(predictor.propagate_in_video(state))
    outputs = [output for obj in state.objects.values() for output in obj.output_dict.non_cond_frame_outputs.values()]
    logits = [output.object_score_logits.item() for output in outputs]
    predictors = PredictorPair(models(version, less=np.median(logits).item()), clip)
    for i, point in enumerate(points):
        predictors.add_new_points_or_box(0, i, points=[point], labels=[1])
    predictors.propagate_in_video()
    assert predictors.present > 3
    assert predictors.absent > 3


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_a_mask_of_any_size(models, clip, version):
    predictors = PredictorPair(models(version), clip)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[30:60, 20:50] = True
    predictors.add_new_mask(0, 1, mask)
    large = torch.zeros(SIDE, SIDE)
    large[70:110, 90:110] = 1
    predictors.add_new_mask(1, 2, large)
    predictors.add_new_mask(0, 3, np.zeros((7, 5), np.uint8))  # of an object that is not there
    predictors.propagate_in_video(max_frame_num_to_track=3)
    predictors.add_new_mask(3, 1, np.roll(mask, 18, axis=1))
    predictors.add_new_points_or_box(0, 2, points=[[110, 70]], labels=[1])
    predictors.propagate_in_video()


def test_several_prompts_of_a_frame(models, clip):
    predictors = PredictorPair(models(), clip)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_points_or_box(0, 1, points=[[60, 50]], labels=[0], clear_old_points=False)
    predictors.add_new_points(0, 1, [[0.3, 0.5], [0.9, 0.1]], [1, 0], normalize_coords=False)
    predictors.add_new_points_or_box(0, 1, box=[15, 25, 55, 65], points=[[40, 40]], labels=[1])
    predictors.add_new_points_or_box(
        0, 1, points=[[40, 50], [-9, 300]], labels=np.array([1, -1]), clear_old_points=False
    )
    predictors.add_new_mask(0, 1, np.eye(20))
    predictors.add_new_points_or_box(0, 1, points=torch.tensor([RED]), labels=torch.tensor([1]), clear_old_points=False)
    predictors.add_new_points_or_box(2, 1, points=[[47, 45]], labels=[1])
    predictors.propagate_in_video(start_frame_idx=1, max_frame_num_to_track=1)
    predictors.propagate_in_video()


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_corrections_of_tracked_frames(models, clip, version):
    predictors = PredictorPair(models(version), clip)
    predictors.add_new_points_or_box(1, 1, points=[RED], labels=[1])
    predictors.add_new_points_or_box(1, 2, box=GREEN)
    predictors.propagate_in_video()
    predictors.add_new_points_or_box(3, 1, points=[[60, 45], [20, 20]], labels=[1, 0])
    predictors.add_new_points_or_box(3, 1, points=[[55, 40]], labels=[1], clear_old_points=False)
    predictors.propagate_in_video(start_frame_idx=2)
    predictors.propagate_in_video(start_frame_idx=2, reverse=True)
    predictors.add_new_points_or_box(0, 2, points=[[110, 70]], labels=[0])  # tracked backwards
    predictors.add_new_points_or_box(1, 1, points=[[20, 20]], labels=[0])  # a first prompt, which stays
    predictors.propagate_in_video()


def test_a_first_prompt_that_is_taken_back_and_given_again(models, clip):
    predictors = PredictorPair(models(), clip)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_mask(3, 1, np.eye(20))
    predictors.propagate_in_video()
    predictors.clear_all_prompts_in_frame(3, 1)
    predictors.add_new_points_or_box(3, 1, points=[[60, 45]], labels=[1])
    predictors.propagate_in_video(start_frame_idx=2)


def test_corrections_that_condition_all_frames(models, clip):
    predictors = PredictorPair(models(), clip, add_all_frames_to_correct_as_cond=True)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.propagate_in_video()
    predictors.add_new_points_or_box(3, 1, points=[[20, 20]], labels=[0])
    predictors.add_new_points_or_box(0, 1, points=[[20, 20]], labels=[0])
    predictors.propagate_in_video()


def test_clearing_what_is_around_a_prompt(models, clip, monkeypatch):
    predictors = PredictorPair(
        models(), clip, clear_non_cond_mem_around_input=True, add_all_frames_to_correct_as_cond=True
    )

    def clear(state, frame, i):  # which 1.1.0 calls and does not have; as its sister for all objects
        for t in range(frame - 7, frame + 8):
            state["output_dict_per_obj"][i]["non_cond_frame_outputs"].pop(t, None)

    predictors.official._clear_obj_non_cond_mem_around_input = clear
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.propagate_in_video()
    predictors.add_new_points_or_box(4, 1, points=[[20, 20]], labels=[0])
    predictors.propagate_in_video(start_frame_idx=2)
    predictors.propagate_in_video(start_frame_idx=3, reverse=True)


@pytest.mark.slow
def test_objects_that_come_later_and_go(models, clip):
    predictors = PredictorPair(models(), clip)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.propagate_in_video(max_frame_num_to_track=2)
    predictors.add_new_points_or_box(2, "late", points=[[100, 70]], labels=[1])
    predictors.add_new_points_or_box(0, 3, box=GREEN)
    predictors.propagate_in_video()
    predictors.clear_all_prompts_in_frame(0, 1, need_output=False)
    predictors.clear_all_prompts_in_frame(2, "late")
    predictors.add_new_points_or_box(0, 1, points=[[40, 50]], labels=[1])
    predictors.add_new_points_or_box(2, "late", points=[[90, 70]], labels=[1])
    assert predictors.remove_object(3)[0] == [1, "late"]
    assert predictors.remove_object("nobody") == ([1, "late"], [])
    predictors.propagate_in_video()
    predictors.add_new_points_or_box(4, 3, points=[RED], labels=[1])
    predictors.clear_all_prompts_in_frame(4, 3)
    assert predictors.remove_object(3, need_output=False) == ([1, "late"], [])
    predictors.remove_object(1)
    predictors.propagate_in_video(start_frame_idx=2)
    assert predictors.remove_object("late") == ([], [])
    predictors.add_new_points_or_box(1, 1, points=[RED], labels=[1])
    predictors.propagate_in_video(max_frame_num_to_track=1)
    predictors.reset_state()
    assert predictors.state.obj_ids == []
    predictors.add_new_points_or_box(5, 1, points=[RED], labels=[1])
    predictors.propagate_in_video(reverse=True)


def test_a_new_beginning_on_a_tracked_frame(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state, fresh = predictor.init_state(clip), predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    list(predictor.propagate_in_video(state, max_frame_num_to_track=2))
    predictor.clear_all_prompts_in_frame(state, 0, 1)
    predictor.add_new_mask(state, 1, 1, np.eye(20))
    predictor.add_new_mask(fresh, 1, 1, np.eye(20))
    for found, expected in zip(predictor.propagate_in_video(state), predictor.propagate_in_video(fresh), strict=True):
        assert found[0] == expected[0]
        if found[0] == 1:
            assert torch.equal(found[2], expected[2])


def test_masks_that_do_not_overlap(models, clip):
    predictors = PredictorPair(models(), clip, share=0.999, non_overlap_masks=True)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_points_or_box(0, 2, points=[[45, 50]], labels=[1])
    tracked = predictors.propagate_in_video(max_frame_num_to_track=2)
    assert all(((masks > 0).sum(dim=0) <= 1).all() for _, _, masks in tracked)


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_holes_are_filled(models, clip, version):
    counts = []
    for area in (0, 8, 30):
        predictors = PredictorPair(models(version), clip, share=0.99, fill_hole_area=area)
        predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
        predictors.add_new_points_or_box(0, 1, points=[[20, 20]], labels=[0], clear_old_points=False)
        counts.append(
            [(masks > 0).sum().item() for _, _, masks in predictors.propagate_in_video(max_frame_num_to_track=2)]
        )
    assert counts[0] != counts[1] != counts[2]
    assert SAM2VideoPredictor(models()[1]).fill_hole_area == 8


@pytest.mark.slow
def test_memories_that_were_released_are_encoded_again(models, long_clip, monkeypatch):
    monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)
    monkeypatch.setattr(frame_inference, "MAX_CACHED_FEATURES", 1)
    predictors = PredictorPair(models(less=1.0), long_clip, share=0.99, fill_hole_area=8)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_mask(1, 2, np.eye(20))
    predictors.propagate_in_video()
    outputs = predictors.state.objects[1].output_dict.non_cond_frame_outputs
    assert [t for t, output in outputs.items() if output.maskmem_features is None] == [1, 2, 3]
    assert [t for t, output in outputs.items() if isinstance(output.pred_masks, StoredMask)] == [1, 2, 3]
    predictors.add_new_points_or_box(4, 1, points=[[20, 20]], labels=[0])
    predictors.add_new_points_or_box(2, 2, points=[[20, 20]], labels=[0])
    predictors.propagate_in_video(start_frame_idx=6, reverse=True)
    predictors.propagate_in_video(start_frame_idx=8)
    predictors.clear_all_prompts_in_frame(4, 1)
    assert predictors.present > 20


def test_a_video_of_one_frame(models, tmp_path):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(write_clip(tmp_path / "one", 1))
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    assert [frame for frame, _, _ in predictor.propagate_in_video(state)] == [0]
    assert list(predictor.propagate_in_video(state, reverse=True)) == []
    _, _, masks = predictor.add_new_points_or_box(state, 0, 1, points=[[60, 50]], labels=[0])
    assert masks.isfinite().all()  # the official predictor divides by zero here


def test_a_frame_of_one_pixel(models, tmp_path):
    Image.new("L", (1, 1), 200).save(tmp_path / "0.png")
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(tmp_path)
    _, _, masks = predictor.add_new_mask(state, 0, 1, [[1]])
    assert masks.shape == (1, 1, 1, 1)
    assert masks > 0


def test_objects_run_as_one_batch(models, clip, monkeypatch):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    for i in range(5):
        predictor.add_new_points_or_box(state, 0, i, points=[[35, 45 + i]], labels=[1])
    predictor.add_new_points_or_box(state, 1, "late", points=[RED], labels=[1])
    sizes = []
    forward = SAM2Base.forward_sam_heads
    monkeypatch.setattr(SAM2Base, "forward_sam_heads", lambda *args: sizes.append(len(args[2])) or forward(*args))
    alone = [masks for _, _, masks in predictor.propagate_in_video(state, start_frame_idx=2, max_frame_num_to_track=0)]
    assert sizes == [2, 2, 1, 1]
    sizes.clear()
    monkeypatch.setattr(frame_inference, "OBJECTS_PER_BATCH", {})
    batched = [
        masks for _, _, masks in predictor.propagate_in_video(state, start_frame_idx=2, max_frame_num_to_track=0)
    ]
    assert sizes == [5, 1]
    torch.testing.assert_close(batched[0], alone[0], rtol=0, atol=1e-3)


def test_frames_are_encoded_once(models, clip, monkeypatch):
    encoded = []
    encode = SAM2Base.forward_image
    monkeypatch.setattr(SAM2Base, "forward_image", lambda *args: encoded.append(1) or encode(*args))
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    assert not encoded
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    predictor.add_new_points_or_box(state, 0, 2, box=GREEN)
    list(predictor.propagate_in_video(state))
    assert len(encoded) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("version", "max_cond_frames"), [("2.1", 2), ("2.0", 3)])
def test_the_nearest_of_many_prompts(models, long_clip, version, max_cond_frames):
    def correct(method):
        for frame in (0, 2, 3, 6, 9):
            method("add_new_mask")(frame, 1, np.eye(30) + np.eye(30, k=frame))
        method("add_new_points_or_box")(4, 2, points=[RED], labels=[1])
        list(method("propagate_in_video")())
        list(method("propagate_in_video")(start_frame_idx=8, reverse=True))
        return method("add_new_points_or_box")(5, 1, points=[[20, 20]], labels=[0])[2]

    limited = correct(
        partial(getattr, PredictorPair(models(version), long_clip, max_cond_frames_in_attn=max_cond_frames))
    )
    predictor = SAM2VideoPredictor(models(version)[1], fill_hole_area=0)
    state = predictor.init_state(long_clip)
    of_all = correct(lambda name: partial(getattr(predictor, name), state))
    assert not torch.allclose(limited, of_all, atol=1e-2)


def test_memories_of_prompts_as_sure_as_the_model_is(models, clip):
    results = []
    for binary in (True, False):
        predictors = PredictorPair(models(), clip, binarize_mask_from_pts_for_mem_enc=binary)
        predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
        predictors.add_new_mask(0, 2, np.eye(20))
        predictors.propagate_in_video()
        _, _, masks = predictors.add_new_points_or_box(3, 1, points=[[20, 20]], labels=[0])
        results.append(masks)
    assert not torch.allclose(*results, atol=1e-2)


def test_breaking_off_and_going_on(models, clip):
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip, offload_video_to_cpu=True, offload_state_to_cpu=True, async_loading_frames=True)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    expected = [masks for _, _, masks in predictor.propagate_in_video(state)]
    for frame, _, _ in predictor.propagate_in_video(state):
        if frame == 2:
            break
    found = [(frame, masks) for frame, _, masks in predictor.propagate_in_video(state, start_frame_idx=2)]
    assert [frame for frame, _ in found] == [2, 3, 4, 5]
    torch.testing.assert_close(torch.cat([masks for _, masks in found]), torch.cat(expected[2:]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_frame_that_cannot_be_read_ends_the_masks(models, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(frame_inference, "FRAMES_PER_BATCH", {"cpu": at_once})
    folder = write_clip(tmp_path / "clip", 5)
    data = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(data[: len(data) // 2])
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(folder)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    with pytest.warns(UserWarning, match=r"the masks end before frame 3 of 5: .*3\.jpg"):
        assert [frame for frame, _, _ in predictor.propagate_in_video(state)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"3\.jpg"):
        predictor.add_new_points_or_box(state, 3, 1, points=[RED], labels=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [frame for frame, _, _ in predictor.propagate_in_video(state, max_frame_num_to_track=2)] == [0, 1, 2]


def tracked(model, clip):
    """The masks of two objects on three frames."""
    predictor = SAM2VideoPredictor(model)
    state = predictor.init_state(clip)
    predictor.add_new_mask(state, 0, 1, np.eye(20))
    predictor.add_new_points_or_box(state, 0, 2, points=[RED], labels=[1])
    return [masks for _, _, masks in predictor.propagate_in_video(state, max_frame_num_to_track=2)]


ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
ELSEWHERE = [("cpu", torch.bfloat16, 0.95), ("cpu", torch.float16, 0.95)]
if ACCELERATOR is not None:
    ELSEWHERE += [(ACCELERATOR, torch.float32, 0.99), (ACCELERATOR, autocast_dtype(ACCELERATOR), 0.95)]


@pytest.mark.parametrize(("device", "dtype", "share"), ELSEWHERE, ids=str)
def test_the_same_objects_on_other_devices_and_in_half_precision(twins, clip, device, dtype, share):
    """Of so many pixels at least. Sharper weights would make more of the last digits."""
    _, model = twins(image_size=SIDE, seed=3)
    found = tracked(cast(copy.deepcopy(model), dtype).to(device), clip)
    for masks, expected in zip(found, tracked(model, clip), strict=True):
        assert 0.1 < (expected > 0).float().mean() < 0.9
        assert masks.dtype == torch.float32
        assert masks.device.type == torch.device(device).type
        assert ((masks.cpu() > 0) == (expected > 0)).float().mean() > share


def test_a_model_on_the_cpu_leaves_accelerators_alone(models, clip, monkeypatch):
    """A forked process, which the CPU is there for, must not ask Metal or CUDA for anything."""

    def asked(*args, **kwargs):
        raise AssertionError("an accelerator was asked")

    for name in ("is_pinned", "pin_memory"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    for name in ("current_accelerator", "is_available", "device_count"):
        monkeypatch.setattr(torch.accelerator, name, asked)
    assert len(tracked(models()[1], clip)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base-plus"])  # modeling/test_modules.py compares the encoder of large
def test_the_other_sizes(twins, clip, size):
    predictors = PredictorPair(twins(size, image_size=SIDE), clip)
    predictors.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    predictors.add_new_points_or_box(0, 2, box=GREEN)
    predictors.propagate_in_video(max_frame_num_to_track=2)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_frames_encoded_as_one_batch(models, long_clip, monkeypatch, kept):
    monkeypatch.setattr(frame_inference, "FRAMES_PER_BATCH", {"cpu": 3})
    monkeypatch.setattr(frame_inference, "MAX_CACHED_FEATURES", kept)
    batches, encode = [], SAM2Base.forward_image
    monkeypatch.setattr(
        SAM2Base, "forward_image", lambda model, images: batches.append(len(images)) or encode(model, images)
    )
    predictors = PredictorPair(models(), long_clip, share=0.99)
    predictors.add_new_points_or_box(2, 1, points=[RED], labels=[1])
    predictors.propagate_in_video()
    # The prompt's frame, then the next ones. Where few features are kept, frames are encoded again for memories.
    assert batches == {1: [1] * 10, 2: [1, 2, 1, 2, 2, 2, 1], 4: [1, 3, 3, 2]}[kept]
    predictors.propagate_in_video(reverse=True)
