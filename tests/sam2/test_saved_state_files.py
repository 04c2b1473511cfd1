"""Files of states: what is refused of them, how they are written, and how large they are."""

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
from clips import HEIGHT, WIDTH
from one_thread import one_thread as one_thread
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_clip import COUNT, POINT, SECOND, assert_same, reloaded, track_two
from saved_clip import clip as clip
from saved_clip import few_recent_frames as few_recent_frames
from saved_clip import model as model
from saved_clip import predictor as predictor

from omniops.sam2.architectures import cast
from omniops.sam2.checkpoints import load
from omniops.sam2.video_predictor import SAM2VideoPredictor


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
    assert SAM2VideoPredictor(half).load_state(saved, clip).obj_ids == [1, SECOND]


def test_a_live_video_is_not_begun_where_the_file_is_refused(predictor, tmp_path):
    def frames():
        raise AssertionError
        yield

    path = tmp_path / "state"
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="no safetensors file"):
        predictor.load_state(path, frames())


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
    assert_same(*(predictor.propagate_in_video(state, 2, 1) for state in states))


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
    "a deep id": (lambda m, c, t: m.update(state='{"a": ' + "[" * 900 + "]" * 900 + "}"), "nested too deeply"),
    "digits": (lambda m, c, t: m.update(state='{"a": ' + "9" * 5000 + "}"), "4300"),
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
    "a batch without the frame": (lambda m, c, t: c["batches"][0].update(frame=0, batch=[1]), "frame has 0"),
    "an empty batch": (lambda m, c, t: c["batches"][0].update(frame=0, batch=[]), "frame has 0"),
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


HOSTILE = (-1, COUNT, 2**70, 1.5, "1", None, True, [], [-1], [0, 0], [2**70], {}, [{"frame": []}])


def places(value, path=()):
    """Where in JSON something can be changed."""
    yield from [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@pytest.mark.slow
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
