"""States of videos in files: what goes on from one is what would have gone on without it, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import HEIGHT, SHARPER, WIDTH, write_clip
from one_thread import one_thread as one_thread
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omniops.sam2 import frame_inference
from omniops.sam2.architectures import cast
from omniops.sam2.checkpoints import load
from omniops.sam2.frame_inference import FrameInference
from omniops.sam2.frames import Frames
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.mask_store import StoredMask
from omniops.sam2.video_predictor import SAM2VideoPredictor

COUNT, LAST = 13, 9
POINT = {"points": [[36, 44]], "labels": [1]}
BOX = {"box": [98, 58, 122, 82]}


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def predictor(model):
    return SAM2VideoPredictor(model)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Frames(write_clip(tmp_path_factory.mktemp("clips") / "clip", COUNT))


@pytest.fixture(autouse=True)
def few_recent_frames(monkeypatch):
    """So that masks of a short clip go to the store."""
    monkeypatch.setattr(frame_inference, "NUM_RECENT_FRAMES", 7)


def track_two(predictor, clip, last=LAST, **options):
    """Two objects from the first frame on up to that one."""
    state = predictor.init_state(clip, **options)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    predictor.add_new_points_or_box(state, 0, ("b", 2.5), **BOX)
    frames = [t for t, *_ in predictor.propagate_in_video(state, max_frame_num_to_track=last)]
    assert frames == list(range(last + 1))
    return state


def reloaded(predictor, state, path, video=None, **options):
    state.save(path)
    return predictor.load_state(path, state.frames if video is None else video, **options)


def assert_same(found, expected):
    """The same bits of what methods return, in which there is something to see."""
    found, expected = list(found), list(expected)
    assert [(t, ids) for t, ids, _ in found] == [(t, ids) for t, ids, _ in expected]
    for (_, ids, masks), (*_, others) in zip(found, expected, strict=True):
        assert torch.equal(masks, others)
        assert all(len(mask.unique()) > 100 for mask in masks[: len(ids)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_bit_for_bit_in_the_middle_of_a_propagation(model, clip, tmp_path, dtype):
    predictor = SAM2VideoPredictor(cast(copy.deepcopy(model), dtype))
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    predictor.add_new_points_or_box(state, 2, ("b", 2.5), **BOX)
    masks = predictor.propagate_in_video(state)
    for t, *_ in masks:
        if t == LAST:
            break
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    stored = [
        isinstance(o.pred_masks, StoredMask) for o in other.objects[1].output_dict.non_cond_frame_outputs.values()
    ]
    assert stored == [t <= LAST - 7 for t in range(1, LAST + 1)]
    assert other.obj_ids == [1, ("b", 2.5)]
    expected = list(masks)
    assert_same(predictor.propagate_in_video(other, LAST + 1), expected)
    assert other.mask_store.dtype == dtype
    for t in range(COUNT):
        assert_same([predictor.masks_on_frame(other, t)], [predictor.masks_on_frame(state, t)])
        assert other.predicted_ious(t) == state.predicted_ious(t)
    another = track_two(predictor, clip, 3)
    assert not torch.equal(next(predictor.propagate_in_video(another, LAST + 1))[2], expected[0][2])  # memories matter


def test_what_was_tracked_is_told(predictor, clip, tmp_path):
    state = track_two(predictor, clip, 2)
    list(predictor.propagate_in_video(state, 1, reverse=True))
    predictor.add_new_points_or_box(state, 5, "late", **POINT)
    other = reloaded(predictor, state, tmp_path / "state")
    tracked = {0: True, 1: True, 2: False}
    assert other.tracked_frames == state.tracked_frames == {1: tracked, ("b", 2.5): tracked, "late": {}}
    assert list(other.tracked_frames[1]) == [0, 1, 2]
    assert "tracked_frames" not in set(other)
    assert dict(other.items()).keys() == dict(state.items()).keys()


def test_objects_are_corrected_added_and_removed_as_before(predictor, clip, tmp_path):
    state = track_two(predictor, clip)
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
    on_both("add_new_mask", 4, ("b", 2.5), np.eye(40))
    on_both("propagate_in_video", 0)
    on_both("clear_all_prompts_in_frame", 0, "new")
    on_both("remove_object", ("b", 2.5))
    on_both("clear_all_prompts_in_frame", 1, 1)
    on_both("propagate_in_video", COUNT - 1, reverse=True)
    assert other.obj_ids == [1, "new"]


def test_in_reverse(predictor, clip, tmp_path):
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, COUNT - 2, 1, **POINT)
    list(predictor.propagate_in_video(state, COUNT - 2, 8, reverse=True))
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert min(other.tracked_frames[1]) == 3
    assert all(other.tracked_frames[1].values())
    remaining = [list(predictor.propagate_in_video(each, 2, reverse=True)) for each in (other, state)]
    assert len(remaining[0]) == 3
    assert_same(*remaining)


def test_prompts_that_were_not_propagated_yet(predictor, clip, tmp_path):
    state = track_two(predictor, clip, 3)
    predictor.add_new_points_or_box(state, 2, 1, points=[[60, 20]], labels=[0])
    predictor.add_new_mask(state, 6, "new", np.eye(30))
    predictor.remove_object(state, ("b", 2.5))
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert other.objects[1].point_inputs.keys() == {0, 2}
    assert torch.equal(predictor.masks_on_frame(other, 6)[2], predictor.masks_on_frame(state, 6)[2])
    assert_same(predictor.propagate_in_video(other, 0), predictor.propagate_in_video(state, 0))


def test_conditioning_frames_keep_their_order(model, clip, tmp_path):
    """Memories are attended to in the order in which they came."""
    predictor = SAM2VideoPredictor(model, add_all_frames_to_correct_as_cond=True)
    state = predictor.init_state(clip)
    for t in (8, 3, 5):
        predictor.add_new_points_or_box(state, t, 1, points=[[20 + 6 * t, 44]], labels=[1])
    list(predictor.propagate_in_video(state, 0, 1))
    other = reloaded(predictor, state, tmp_path / "state.safetensors")
    assert list(other.objects[1].output_dict.cond_frame_outputs) == [8, 3, 5]
    assert_same(predictor.propagate_in_video(other, 2), predictor.propagate_in_video(state, 2))


def test_a_state_without_objects(predictor, clip, tmp_path):
    other = reloaded(predictor, predictor.init_state(clip), tmp_path / "state.safetensors")
    assert other.obj_ids == []
    predictor.add_new_points_or_box(other, 0, 1, **POINT)
    assert other.obj_ids == [1]


def test_copies_are_saved_and_loaded_states_copied(predictor, clip, tmp_path):
    state = track_two(predictor, clip)
    other = copy.deepcopy(reloaded(predictor, copy.deepcopy(state), tmp_path / "state.safetensors"))
    os.remove(tmp_path / "state.safetensors")
    assert_same(predictor.propagate_in_video(other, LAST + 1), predictor.propagate_in_video(state, LAST + 1))


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
    state = track_two(half, clip)
    state.save(tmp_path / "state.safetensors")
    predictor = SAM2VideoPredictor(model)
    other = predictor.load_state(tmp_path / "state.safetensors", clip)
    frame, ids, masks = next(predictor.propagate_in_video(other, LAST + 1))
    assert (frame, ids) == (LAST + 1, [1, ("b", 2.5)])
    assert masks.isfinite().all()
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
        assert batches == ([[5, 6, 7, 8]] if each is other else []) + [[9, 10, 11, 12]]
        assert each.frames_with_features == other.frames_with_features
    assert_same(*found)
    monkeypatch.undo()  # as on a device that takes less at once
    alone = predictor.load_state(tmp_path / "state.safetensors", clip)
    assert alone.frames_with_features == [0]


def live(first, last=COUNT, folder=None):
    """The frames of the clip from one on."""
    return (np.asarray(Image.open(folder / f"{t}.jpg")) for t in range(first, last))


def test_a_live_video_goes_on_with_the_next_frames(predictor, clip, tmp_path):
    folder = clip.path
    state = predictor.init_state(live(0, folder=folder))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    list(predictor.propagate_in_video(state, max_frame_num_to_track=5))
    predictor.add_new_points_or_box(state, 5, 1, points=[[60, 20]], labels=[0])
    predictor.add_new_points_or_box(state, 4, "b", **BOX)  # whose memory is yet to be encoded
    other = reloaded(predictor, state, tmp_path / "state.safetensors", live(6, folder=folder))
    assert (other.num_frames, other.frames.kept) == (6, range(6))
    assert np.array_equal(other.frames[3], clip[3])
    found = list(predictor.propagate_in_video(other))
    assert [t for t, *_ in found] == list(range(6, COUNT))
    assert_same(found, predictor.propagate_in_video(state))
    assert other.num_frames == COUNT
    results = [predictor.add_new_points_or_box(each, 5, "late", **POINT) for each in (other, state)]
    assert torch.equal(results[0][2], results[1][2])


def test_a_live_video_that_no_propagation_has_begun(predictor, clip, tmp_path):
    state = predictor.init_state(live(0, folder=clip.path))
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    other = reloaded(
        predictor,
        state,
        tmp_path / "state",
        LiveFrames(live(1, folder=clip.path), when_full="drop_oldest", buffer_size=20),
    )
    found = list(predictor.propagate_in_video(other))
    assert [t for t, *_ in found] == list(range(COUNT))
    assert_same(found, predictor.propagate_in_video(state))


def test_only_the_last_frames_of_a_live_video_are_in_the_file(predictor, clip, tmp_path):
    frames = [clip[t % COUNT] for t in range(40)]
    state = predictor.init_state(iter(frames))
    sizes = {}
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    for t, *_ in predictor.propagate_in_video(state):
        if t in (20, 30):
            state.save(tmp_path / f"{t}")
            sizes[t] = (tmp_path / f"{t}").stat().st_size
    assert abs(sizes[30] - sizes[20]) < 1000
    other = predictor.load_state(tmp_path / "30", iter(frames[31:]))
    assert other.frames.kept == range(15, 31)
    assert [t for t, *_ in predictor.propagate_in_video(other)] == list(range(31, 40))


def test_live_videos_that_cannot_go_on(predictor, clip, tmp_path):
    path = tmp_path / "state.safetensors"
    predictor.init_state(live(0, folder=clip.path)).save(path)
    with pytest.raises(ValueError, match="is the state of a live video, and video is a file or folder"):
        predictor.load_state(path, clip)
    with pytest.raises(ValueError, match=f"of {WIDTH} x {HEIGHT} pixels, and video has 8 x 6 pixels"):
        predictor.load_state(path, [np.zeros((6, 8, 3), np.uint8)])
    taken = LiveFrames(live(0, folder=clip.path))
    taken.take()
    with pytest.raises(ValueError, match="must be new, but 2 of its frames are taken"):
        predictor.load_state(path, taken)
    predictor.init_state(clip).save(path)
    with pytest.raises(ValueError, match="is the state of a file or folder, and video is a live video"):
        predictor.load_state(path, live(0, folder=clip.path))


@pytest.fixture(scope="module")
def saved(predictor, clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "state.safetensors"
    state = track_two(predictor, clip, 2)
    predictor.add_new_points_or_box(state, 1, 1, points=[[60, 20], [3, 4]], labels=[0, 1])
    state.objects[1].offload_old_outputs(0, state.mask_store, torch.float32)
    state.save(path)
    return path


def test_another_video_is_refused(predictor, saved, tmp_path):
    for count, size in ((COUNT + 1, (WIDTH, HEIGHT)), (COUNT, (64, 48))):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for t in range(count):
            Image.new("RGB", size).save(folder / f"{t}.png")
        expected = (
            rf"a video of {WIDTH} x {HEIGHT} pixels and {COUNT} frames, and video has {size[0]} x {size[1]} pixels and "
            rf"{count} frames"
        )
        with pytest.raises(ValueError, match=expected):
            predictor.load_state(saved, folder)


def test_another_model_is_refused(model, predictor, clip, saved):
    def refusal(other):
        with pytest.raises(ValueError, match="was saved with another model than this predictor has: ") as error:
            SAM2VideoPredictor(other).load_state(saved, clip)
        return str(error.value).partition("has: ")[2]

    larger = load("tiny", "cpu", "float32", image_size=96, random_weights=True)
    assert refusal(larger).startswith("image_size 64 and not 96, weights ")
    other = copy.deepcopy(model)
    other.max_obj_ptrs_in_encoder = 8
    assert refusal(other) == "max_obj_ptrs_in_encoder 16 and not 8"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.sam_mask_decoder.transformer.layers[0].norm1.weight[3] += 0.5
    assert refusal(other).startswith("weights ")
    half = cast(copy.deepcopy(model), torch.bfloat16)
    assert SAM2VideoPredictor(half).load_state(saved, clip).obj_ids == [1, ("b", 2.5)]


def test_another_size_is_named(saved, clip, uninitialised):
    with uninitialised:
        other = load("small", "cpu", "float32", image_size=64, random_weights=True)
    with pytest.raises(ValueError, match="size 'tiny' and not 'small'"):
        SAM2VideoPredictor(other).load_state(saved, clip)


def rewritten(path, out, change):
    """The file with its metadata, its description in them and its tensors changed by a function."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, text = load_file(path), metadata["state"]
    content = json.loads(text)
    change(metadata, content, tensors)
    if metadata["state"] == text:
        metadata["state"] = json.dumps(content)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, metadata)
    return out


def test_it_is_a_plain_safetensors_file(predictor, clip, saved, tmp_path):
    out = rewritten(saved, tmp_path / "again", lambda *_: None)
    states = [predictor.load_state(path, clip) for path in (saved, out)]
    assert_same(*(predictor.propagate_in_video(state, 0) for state in states))


def test_files_that_are_none_are_refused(predictor, clip, saved, tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no file at .*state\.safetensors"):
        predictor.load_state(path, clip)
    for content in (b"", b"x" * 7, b"hello, this is no file of tensors", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or a damaged one"):
            predictor.load_state(path, clip)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is no state of a video: expected is a file that state\.save\(path\) wrote"):
        predictor.load_state(path, clip)
    rewritten(saved, path, lambda metadata, *_: metadata.update(version="2"))
    with pytest.raises(ValueError, match="in version '2' of the format, and this omniops reads version '1'"):
        predictor.load_state(path, clip)


def test_truncated_files_are_refused(predictor, clip, saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "state.safetensors"
    for length in (8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
            predictor.load_state(path, clip)


DAMAGE = {
    "a description that is no JSON": (lambda m, c, t: m.update(state="{"), "no JSON"),
    "deep nesting": (lambda m, c, t: m.update(state="[" * 100000), "nested too deeply"),
    "not a number": (lambda m, c, t: c["objects"][0].update(id=float("nan")), "the number NaN"),
    "objects": (lambda m, c, t: c.update(objects={}), "objects must be a list"),
    "two of one id": (lambda m, c, t: c["objects"][1].update(id=1.0), "two objects have the id 1.0"),
    "a frame out of range": (
        lambda m, c, t: c["objects"][0]["frames_tracked"].append(COUNT),
        f"frames_tracked has {COUNT}, which is no frame",
    ),
    "a frame twice": (lambda m, c, t: c["objects"][0]["frames_tracked"].append(0), "a frame more than once"),
    "a recent frame without output": (lambda m, c, t: c["objects"][0].update(recent_frames=[7]), "recent_frames has 7"),
    "an odd size": (lambda m, c, t: c.update(height="1"), "height must be from 1 to"),
    "more frames than counted": (lambda m, c, t: c.update(num_frames=10**30), "num_frames must be from 1 to"),
    "huge counts": (lambda m, c, t: c["objects"][0].update(num_points=[2**31, 1]), "0.point_coords must be"),
    "a batch without the frame": (lambda m, c, t: c.update(batches=[[0, [1]]]), "batches has 0"),
    "an empty batch": (lambda m, c, t: c.update(batches=[[0, []]]), "batches has 0"),
    "points that are not finite": (lambda m, c, t: t["0.point_coords"].fill_(float("inf")), "points must be finite"),
    "labels": (lambda m, c, t: t["0.point_labels"].fill_(4), "labels from -1 to 3"),
    "a tensor too many": (lambda m, c, t: t.update(more=torch.zeros(1)), "the tensors more belong to nothing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_hostile_files_are_refused(predictor, clip, saved, tmp_path, what):
    damage, message = DAMAGE[what]

    path = rewritten(saved, tmp_path / "state.safetensors", damage)
    with pytest.raises(ValueError, match=f"is a damaged state of a video: .*{message}"):
        predictor.load_state(path, clip)


def test_tensors_of_other_names_shapes_and_types_are_refused(predictor, clip, saved, tmp_path):
    names = load_file(saved).keys()
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {
        "point_coords",
        "point_labels",
        "obj_ptr",
        "object_score_logits",
        "predicted_iou",
        "pred_masks",
        "stored_masks",
        "maskmem_features",
    }
    for name in [next(name for name in sorted(names) if name.endswith(kind)) for kind in sorted(kinds)]:
        for change in (
            lambda tensors, name: tensors.pop(name),
            lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
            lambda tensors, name: tensors.update({name: tensors[name][..., :0]}),
            lambda tensors, name: tensors.update({name: tensors[name][None]}),
            lambda tensors, name: tensors.update({name: tensors[name].double()}),
        ):
            path = rewritten(saved, tmp_path / "state.safetensors", lambda m, c, t, f=change, n=name: f(t, n))
            with pytest.raises(ValueError, match=f"damaged state of a video: the tensor {name} (must be|is missing)"):
                predictor.load_state(path, clip)


HOSTILE = (-1, COUNT, 2**70, 1.5, "1", None, True, [], [-1], [0, 0], [2**70], {}, [[0, [0]]])


def places(value, path=()):
    """Where in JSON something can be changed."""
    yield from [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def test_whatever_the_description_says_the_network_takes_it_or_it_is_refused(predictor, clip, saved, tmp_path):
    with safe_open(saved, "pt") as file:
        content = json.loads(file.metadata()["state"])
    draws = random.Random(0)
    of_objects = [path for path in places(content) if path[0] != "model" and path[:2] != ("objects", 1)]
    refused = 0
    for path in draws.sample(of_objects, 40):

        def change(metadata, content, tensors, path=path):
            for key in path[:-1]:
                content = content[key]
            content[path[-1]] = draws.choice(HOSTILE)

        hostile = rewritten(saved, tmp_path / "state.safetensors", change)
        try:
            state = predictor.load_state(hostile, clip)
        except ValueError:
            refused += 1
            continue
        obj_id = state.obj_ids[0]
        predictor.add_new_points_or_box(state, 2, obj_id, **POINT)
        predictor.clear_all_prompts_in_frame(state, 1, obj_id)
        list(predictor.propagate_in_video(state, 3, 1))
        list(predictor.propagate_in_video(state, 3, 1, reverse=True))
        predictor.remove_object(state, obj_id)
    assert 20 < refused < 40


def test_a_save_that_is_interrupted_leaves_the_old_file(predictor, clip, saved, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved.read_bytes())
    state = track_two(predictor, clip, 1)
    for module, name in ((os, "fsync"), (os, "replace"), (torch.Tensor, "cpu")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                state.save(path)
        assert path.read_bytes() == saved.read_bytes()
        assert os.listdir(tmp_path) == ["state.safetensors"]
    state.save(path)
    assert predictor.load_state(path, clip).tracked_frames == state.tracked_frames
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_where_a_state_cannot_be_saved(predictor, clip, tmp_path):
    state = predictor.init_state(clip)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere in which state could be"):
        state.save(tmp_path / "nowhere" / "state")
    with pytest.raises(IsADirectoryError, match="path must be of a file, got the folder"):
        state.save(str(tmp_path))
    with pytest.raises(TypeError):
        state.save(3)


def test_ids_of_objects(predictor, clip, tmp_path):
    state = predictor.init_state(clip)
    ids = [7, -(2**70), '\u00e9 "x"', 2.5, None, False, (), (1, ("a", None)), np.int64(3)]
    predictor.add_new_points_or_box(state, 0, 7, **POINT)
    for obj_id in ids[1:]:
        state.set_object(obj_id, state.objects[7].copy())
    found = reloaded(predictor, state, tmp_path / "state").obj_ids
    assert found == ids
    assert [type(obj_id) for obj_id in found[:-1]] == [type(obj_id) for obj_id in ids[:-1]]
    for obj_id in (Path("a"), float("nan"), frozenset({1}), b"a", torch.tensor(1)):
        other = predictor.init_state(clip)
        other.set_object(obj_id, state.objects[7].copy())
        with pytest.raises(TypeError, match=r"obj_id .* cannot be written to a file: an id there must be a number"):
            other.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["state"]


def test_how_large_a_file_is(predictor, clip, tmp_path):
    """As docs/sam2.md says of 1024: for a frame and object the mask, 4 * (S / 4) ** 2 bytes, and about 1 KiB."""
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    sizes = {}
    for t, *_ in predictor.propagate_in_video(state):
        state.save(tmp_path / "state")
        sizes[t] = (tmp_path / "state").stat().st_size
    mask = 4 * (64 // 4) ** 2
    for t in range(9, COUNT - 1):  # whose memories take the place of others
        assert mask + 1032 <= sizes[t + 1] - sizes[t] <= mask + 1032 + 50
    memories = 8 * 2 * 64 * (64 // 16) ** 2
    assert sizes[COUNT - 1] <= COUNT * (mask + 1032 + 50) + memories + 4000


def test_safetensors_is_asked_for_by_name(predictor, clip, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors .*: pip install 'omniops\[sam2\]'"):
        predictor.load_state(saved, clip)
