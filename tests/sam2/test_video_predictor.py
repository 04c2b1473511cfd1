"""The video predictor against the official package's, call by call, and with prompts and videos of every kind."""

from __future__ import annotations

import copy
import gc
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from clips import HEIGHT, SHARPER, WIDTH, write_clip
from PIL import Image

pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")

from omniops import connected_components
from omniops.device import autocast_dtype
from omniops.sam2 import memory, network, tracking
from omniops.sam2.architectures import cast
from omniops.sam2.checkpoints import from_meta
from omniops.sam2.video_predictor import SAM2VideoPredictor

SIDE = 64
RED, GREEN = [36, 44], [98, 58, 122, 82]  # a point in one object and a box around the other, on frame 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "short", 6)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "long", 11)


@pytest.fixture(scope="module")
def models(twins):
    """The models with weights under which masks differ, and memories matter; and objects come and go where
    something is taken from the scores of their being there."""
    made = {}

    def make(version="2.1", less=0.0):
        if (version, less) not in made:
            official, ours = (copy.deepcopy(each) for each in twins(version=version, image_size=SIDE, seed=3))
            with torch.no_grad():
                for name, parameter in official.named_parameters():
                    for part, factor in SHARPER.items():
                        if part in name:
                            parameter.mul_(factor)
                official.sam_mask_decoder.pred_obj_score_head.layers[2].bias.sub_(less)
            ours.load_state_dict(from_meta(official.state_dict()))
            made[version, less] = official, ours
        return made[version, less]

    return make


class Both:
    """The official predictor and ours: every call goes to both, and what they return must be alike."""

    def __init__(self, models, clip, share=1.0, **options):
        """A share of the pixels must be alike. Less than all where a threshold makes more of the last digits."""
        official, ours = models
        self.official = copy.deepcopy(official)  # whose options are set
        options = {"fill_hole_area": 0, **options}
        for name, value in options.items():
            setattr(self.official, name, value)
        self.ours = SAM2VideoPredictor(ours, **options)
        self.expected_state = self.official.init_state(str(clip))
        self.state = self.ours.init_state(clip)
        self.present, self.absent = 0, 0
        self.share = share

    def __getattr__(self, name):
        def call(*args, **kwargs):
            expected = getattr(self.official, name)(self.expected_state, *args, **kwargs)
            found = getattr(self.ours, name)(self.state, *args, **kwargs)
            if name == "propagate_in_video":
                pairs = list(zip(found, expected, strict=True))
                for each in pairs:
                    self.compare(*each)
                return [each[0] for each in pairs]
            if name == "remove_object":
                assert found[0] == expected[0]
                for (t, masks), (u, reference) in zip(found[1], sorted(expected[1]), strict=True):
                    self.compare((t, found[0], masks), (u, expected[0], reference))
            elif expected is not None:
                self.compare(found, expected)
            return found

        return call

    def compare(self, found, expected):
        frame, ids, masks = found
        assert (frame, list(ids)) == (expected[0], list(expected[1]))
        assert masks.shape == expected[2].shape
        assert masks.dtype == torch.float32
        for mask, reference in zip(masks, expected[2], strict=True):
            absent = reference == memory.NO_OBJECT
            assert torch.equal(mask == memory.NO_OBJECT, absent)
            if absent.all():
                self.absent += 1
                continue
            self.present += 1
            close = (mask - reference).abs() <= 1e-3 * reference[~absent].abs().max()
            assert close.float().mean() >= self.share
            inside, wanted = mask > 0, reference > 0
            assert (inside & wanted).sum() >= 0.999 * (inside | wanted).sum()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Shapes are so small that threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def oracle_fills_holes(monkeypatch):
    """Its extension is not to be had; its own code calls ours in its place."""
    misc = pytest.importorskip("sam2.utils.misc", reason="the oracle: the official package, sam2 from PyPI")
    monkeypatch.setattr(misc, "get_connected_components", connected_components)


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_two_objects_forward_and_backward(models, clip, version):
    both = Both(models(version), clip)
    both.add_new_points_or_box(2, 1, points=[[47, 45]], labels=[1])
    both.add_new_points_or_box(2, "box", box=np.array(GREEN) - [12, 0, 12, 0])
    both.propagate_in_video()
    both.propagate_in_video(start_frame_idx=3, reverse=True)
    assert both.present > 10


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_objects_come_and_go(models, clip, version):
    points = [RED, [5, 5], [110, 70], [70, 20]]
    predictor = SAM2VideoPredictor(models(version)[1])
    state = predictor.init_state(clip)
    for i, point in enumerate(points):
        predictor.add_new_points_or_box(state, 0, i, points=[point], labels=[1])
    list(predictor.propagate_in_video(state))
    logits = [output.object_logits.item() for track in state._tracks.values() for output in track.others.values()]
    both = Both(models(version, less=np.median(logits).item()), clip)
    for i, point in enumerate(points):
        both.add_new_points_or_box(0, i, points=[point], labels=[1])
    both.propagate_in_video()
    assert both.present > 3
    assert both.absent > 3


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_a_mask_of_any_size(models, clip, version):
    both = Both(models(version), clip)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[30:60, 20:50] = True
    both.add_new_mask(0, 1, mask)
    large = torch.zeros(SIDE, SIDE)
    large[70:110, 90:110] = 1
    both.add_new_mask(1, 2, large)
    both.add_new_mask(0, 3, np.zeros((7, 5), np.uint8))  # of an object that is not there
    both.propagate_in_video(max_frame_num_to_track=3)
    both.add_new_mask(3, 1, np.roll(mask, 18, axis=1))
    both.add_new_points_or_box(0, 2, points=[[110, 70]], labels=[1])
    both.propagate_in_video()


def test_several_prompts_of_a_frame(models, clip):
    both = Both(models(), clip)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.add_new_points_or_box(0, 1, points=[[60, 50]], labels=[0], clear_old_points=False)
    both.add_new_points(0, 1, [[0.3, 0.5], [0.9, 0.1]], [1, 0], normalize_coords=False)
    both.add_new_points_or_box(0, 1, box=[15, 25, 55, 65], points=[[40, 40]], labels=[1])
    both.add_new_points_or_box(0, 1, points=[[40, 50], [-9, 300]], labels=np.array([1, -1]), clear_old_points=False)
    both.add_new_mask(0, 1, np.eye(20))
    both.add_new_points_or_box(0, 1, points=torch.tensor([RED]), labels=torch.tensor([1]), clear_old_points=False)
    both.add_new_points_or_box(2, 1, points=[[47, 45]], labels=[1])
    both.propagate_in_video(start_frame_idx=1, max_frame_num_to_track=1)
    both.propagate_in_video()


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_corrections_of_tracked_frames(models, clip, version):
    both = Both(models(version), clip)
    both.add_new_points_or_box(1, 1, points=[RED], labels=[1])
    both.add_new_points_or_box(1, 2, box=GREEN)
    both.propagate_in_video()
    both.add_new_points_or_box(3, 1, points=[[60, 45], [20, 20]], labels=[1, 0])
    both.add_new_points_or_box(3, 1, points=[[55, 40]], labels=[1], clear_old_points=False)
    both.propagate_in_video(start_frame_idx=2)
    both.propagate_in_video(start_frame_idx=2, reverse=True)
    both.add_new_points_or_box(0, 2, points=[[110, 70]], labels=[0])  # tracked backwards
    both.add_new_points_or_box(1, 1, points=[[20, 20]], labels=[0])  # a first prompt, which stays
    both.propagate_in_video()


def test_a_first_prompt_that_is_taken_back_and_given_again(models, clip):
    both = Both(models(), clip)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.add_new_mask(3, 1, np.eye(20))
    both.propagate_in_video()
    both.clear_all_prompts_in_frame(3, 1)
    both.add_new_points_or_box(3, 1, points=[[60, 45]], labels=[1])
    both.propagate_in_video(start_frame_idx=2)


def test_corrections_that_condition_all_frames(models, clip):
    both = Both(models(), clip, add_all_frames_to_correct_as_cond=True)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.propagate_in_video()
    both.add_new_points_or_box(3, 1, points=[[20, 20]], labels=[0])
    both.add_new_points_or_box(0, 1, points=[[20, 20]], labels=[0])
    both.propagate_in_video()


def test_clearing_what_is_around_a_prompt(models, clip, monkeypatch):
    both = Both(models(), clip, clear_non_cond_mem_around_input=True, add_all_frames_to_correct_as_cond=True)

    def clear(state, frame, i):  # which 1.1.0 calls and does not have; as its sister for all objects
        for t in range(frame - 7, frame + 8):
            state["output_dict_per_obj"][i]["non_cond_frame_outputs"].pop(t, None)

    both.official._clear_obj_non_cond_mem_around_input = clear
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.propagate_in_video()
    both.add_new_points_or_box(4, 1, points=[[20, 20]], labels=[0])
    both.propagate_in_video(start_frame_idx=2)
    both.propagate_in_video(start_frame_idx=3, reverse=True)


def test_objects_that_come_later_and_go(models, clip):
    both = Both(models(), clip)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.propagate_in_video(max_frame_num_to_track=2)
    both.add_new_points_or_box(2, "late", points=[[100, 70]], labels=[1])
    both.add_new_points_or_box(0, 3, box=GREEN)
    both.propagate_in_video()
    both.clear_all_prompts_in_frame(0, 1, need_output=False)
    both.clear_all_prompts_in_frame(2, "late")
    both.add_new_points_or_box(0, 1, points=[[40, 50]], labels=[1])
    both.add_new_points_or_box(2, "late", points=[[90, 70]], labels=[1])
    assert both.remove_object(3)[0] == [1, "late"]
    assert both.remove_object("nobody") == ([1, "late"], [])
    both.propagate_in_video()
    both.add_new_points_or_box(4, 3, points=[RED], labels=[1])
    both.clear_all_prompts_in_frame(4, 3)
    assert both.remove_object(3, need_output=False) == ([1, "late"], [])
    both.remove_object(1)
    both.propagate_in_video(start_frame_idx=2)
    assert both.remove_object("late") == ([], [])
    both.add_new_points_or_box(1, 1, points=[RED], labels=[1])
    both.propagate_in_video(max_frame_num_to_track=1)
    both.reset_state()
    assert both.state.obj_ids == []
    both.add_new_points_or_box(5, 1, points=[RED], labels=[1])
    both.propagate_in_video(reverse=True)


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
    both = Both(models(), clip, share=0.999, non_overlap_masks=True)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.add_new_points_or_box(0, 2, points=[[45, 50]], labels=[1])
    tracked = both.propagate_in_video(max_frame_num_to_track=2)
    assert all(((masks > 0).sum(dim=0) <= 1).all() for _, _, masks in tracked)


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_holes_are_filled(models, clip, version):
    counts = []
    for area in (0, 8, 30):
        both = Both(models(version), clip, share=0.99, fill_hole_area=area)
        both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
        both.add_new_points_or_box(0, 1, points=[[20, 20]], labels=[0], clear_old_points=False)
        counts.append([(masks > 0).sum().item() for _, _, masks in both.propagate_in_video(max_frame_num_to_track=2)])
    assert counts[0] != counts[1] != counts[2]
    assert SAM2VideoPredictor(models()[1]).fill_hole_area == 8


def test_what_is_forgotten_is_made_again(models, long_clip, monkeypatch):
    monkeypatch.setattr(tracking, "_RECENT", 7)
    monkeypatch.setattr(tracking, "_FEATURES", 1)
    both = Both(models(less=1.0), long_clip, share=0.99, fill_hole_area=8)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.add_new_mask(1, 2, np.eye(20))
    both.propagate_in_video()
    track = both.state._tracks[1]
    assert [t for t, output in track.others.items() if output.map is None] == [1, 2, 3]
    assert [t for t, output in track.others.items() if isinstance(output.logits, memory.Shelved)] == [1, 2, 3]
    both.add_new_points_or_box(4, 1, points=[[20, 20]], labels=[0])
    both.add_new_points_or_box(2, 2, points=[[20, 20]], labels=[0])
    both.propagate_in_video(start_frame_idx=6, reverse=True)
    both.propagate_in_video(start_frame_idx=8)
    both.clear_all_prompts_in_frame(4, 1)
    assert both.present > 20


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
    segment = memory.segment
    monkeypatch.setattr(memory, "segment", lambda *args: sizes.append(len(args[2])) or segment(*args))
    alone = [masks for _, _, masks in predictor.propagate_in_video(state, start_frame_idx=2, max_frame_num_to_track=0)]
    assert sizes == [2, 2, 1, 1]
    sizes.clear()
    monkeypatch.setattr(tracking, "_AT_ONCE", {})
    batched = [
        masks for _, _, masks in predictor.propagate_in_video(state, start_frame_idx=2, max_frame_num_to_track=0)
    ]
    assert sizes == [5, 1]
    torch.testing.assert_close(batched[0], alone[0], rtol=0, atol=1e-3)


def test_frames_are_encoded_once(models, clip, monkeypatch):
    encoded = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda *args: encoded.append(1) or encode(*args))
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(clip)
    assert not encoded
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    predictor.add_new_points_or_box(state, 0, 2, box=GREEN)
    list(predictor.propagate_in_video(state))
    assert len(encoded) == 6


def test_what_is_kept_does_not_grow_but_for_pointers(models, long_clip, monkeypatch):
    monkeypatch.setattr(tracking, "_RECENT", 7)
    predictor = SAM2VideoPredictor(models()[1])
    state = predictor.init_state(long_clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[RED], labels=[1])
    for _ in range(2):  # what is written again takes no more room
        list(predictor.propagate_in_video(state))
    outputs = state._tracks[1].others.values()
    assert sum(output.map is not None for output in outputs) == 7
    assert sum(isinstance(output.logits, torch.Tensor) for output in outputs) == 7
    assert len(state._features) == 8
    assert state._shelf._count <= 4


def test_a_shelf_gives_back_what_it_was_given():
    shelf = memory.Shelf()
    tensors = [torch.randn(1, 3, 5).to(torch.bfloat16) for _ in range(3)]
    kept = [shelf.put(tensor) for tensor in tensors]
    del kept[1]
    gc.collect()
    kept.append(shelf.put(-tensors[1]))
    for shelved, tensor in zip(kept, [tensors[0], tensors[2], -tensors[1]], strict=True):
        assert torch.equal(shelved.tensor(), tensor)
    assert shelf._count == 3


def test_a_shelf_has_one_dtype_for_all():
    """Else a tensor of more bytes would be written over its neighbour."""
    shelf = memory.Shelf()
    tensors = [torch.randn(1, 3, 5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    for shelved, tensor in zip([shelf.put(tensor) for tensor in tensors], tensors, strict=True):
        assert torch.equal(shelved.tensor(), tensor.float())


def test_state_reads_as_the_official_one(models, clip):
    both = Both(models(), clip)
    both.add_new_points_or_box(0, 7, points=[RED], labels=[1])
    for key in ("obj_ids", "num_frames", "video_height", "video_width", "device", "storage_device"):
        assert both.state[key] == both.expected_state[key]
    assert len(both.state["images"]) == len(both.expected_state["images"])
    assert torch.equal(both.state["images"][4], both.expected_state["images"][4])
    assert torch.equal(both.state["images"][1:3], both.expected_state["images"][1:3])
    both.add_new_points_or_box(2, "x", points=[RED, [5, 5]], labels=[1, 0])
    both.propagate_in_video()
    for key in ("obj_id_to_idx", "obj_idx_to_id", "frames_tracked_per_obj"):
        assert both.state[key] == both.expected_state[key]
    points, expected = (state["point_inputs_per_obj"] for state in (both.state, both.expected_state))
    for i, t in ((0, 0), (1, 2)):
        assert list(points[i]) == list(expected[i]) == [t]
        for name in ("point_coords", "point_labels"):
            torch.testing.assert_close(points[i][t][name], expected[i][t][name])
    with pytest.raises(KeyError, match="num_frames"):
        both.state["output_dict_per_obj"]


def test_state_is_a_mapping(models, clip):
    both = Both(models(), clip)
    state = both.state
    assert "num_frames" in state
    assert "output_dict_per_obj" not in state
    assert 3 not in state
    assert set(state) - {"frames"} <= set(both.expected_state)
    assert set(both.expected_state) - set(state) == {
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
    other = both.ours.init_state(clip)
    assert state != other
    assert len({state, other}) == 2
    with pytest.raises(TypeError, match="item assignment"):
        state["num_frames"] = 3


@pytest.mark.parametrize("deep", [False, True])
def test_a_copied_state_goes_its_own_way(models, clip, long_clip, monkeypatch, deep):
    """From frames in memory and on the shelf, with a prompt that does not count yet."""
    if deep:
        monkeypatch.setattr(tracking, "_RECENT", 7)
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
    shelves = [
        {out.logits._file for out in each._tracks[1].others.values() if isinstance(out.logits, memory.Shelved)}
        for each in (state, twin)
    ]
    assert list(map(len, shelves)) == [deep, deep]
    assert shelves[0].isdisjoint(shelves[1])  # whoever reads one, in another thread, moves its position
    expected = list(predictor.propagate_in_video(state))
    assert not twin._tracks["new"].conditioning
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
    assert any(isinstance(output.logits, memory.Shelved) for output in state._tracks[1].others.values()) == deep
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
    results = [list(predictor.propagate_in_video(each)) for each in (state, held["held"])]
    for (_, _, masks), (_, _, right) in zip(*results, strict=True):
        assert torch.equal(masks, right)


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


@pytest.mark.parametrize(("version", "most"), [("2.1", 2), ("2.0", 3)])
def test_the_nearest_of_many_prompts(models, long_clip, version, most):
    def correct(method):
        for frame in (0, 2, 3, 6, 9):
            method("add_new_mask")(frame, 1, np.eye(30) + np.eye(30, k=frame))
        method("add_new_points_or_box")(4, 2, points=[RED], labels=[1])
        list(method("propagate_in_video")())
        list(method("propagate_in_video")(start_frame_idx=8, reverse=True))
        return method("add_new_points_or_box")(5, 1, points=[[20, 20]], labels=[0])[2]

    limited = correct(partial(getattr, Both(models(version), long_clip, max_cond_frames_in_attn=most)))
    predictor = SAM2VideoPredictor(models(version)[1], fill_hole_area=0)
    state = predictor.init_state(long_clip)
    of_all = correct(lambda name: partial(getattr(predictor, name), state))
    assert not torch.allclose(limited, of_all, atol=1e-2)


def test_memories_of_prompts_as_sure_as_the_model_is(models, clip):
    results = []
    for binary in (True, False):
        both = Both(models(), clip, binarize_mask_from_pts_for_mem_enc=binary)
        both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
        both.add_new_mask(0, 2, np.eye(20))
        both.propagate_in_video()
        _, _, masks = both.add_new_points_or_box(3, 1, points=[[20, 20]], labels=[0])
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
    monkeypatch.setattr(tracking, "_ENCODED_AT_ONCE", {"cpu": at_once})
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
    with pytest.raises(TypeError, match="model must be a Sam2VideoModel, got str"):
        SAM2VideoPredictor("tiny")


def test_from_pretrained_tells_options_apart(models, tmp_path):
    models()[1].save_pretrained(tmp_path)
    predictor = SAM2VideoPredictor.from_pretrained(str(tmp_path), device="cpu", dtype="float32", fill_hole_area=3)
    assert predictor.fill_hole_area == 3
    assert predictor.image_size == SIDE
    assert predictor.device == torch.device("cpu")


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


@pytest.mark.parametrize("size", ["small", "base-plus"])  # of large, test_image_predictor.py compares the encoder
def test_the_other_sizes(twins, clip, size):
    both = Both(twins(size, image_size=SIDE), clip)
    both.add_new_points_or_box(0, 1, points=[RED], labels=[1])
    both.add_new_points_or_box(0, 2, box=GREEN)
    both.propagate_in_video(max_frame_num_to_track=2)


def test_a_model_that_is_in_half_precision_all_over(models):
    model = copy.deepcopy(models()[1]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"model must have float32 where .* got torch.bfloat16 all over: .*load\("):
        SAM2VideoPredictor(model)


def test_what_multiplies_matrices_is_cast_once(twins):
    model = cast(copy.deepcopy(twins(image_size=SIDE)[1]), torch.bfloat16)
    assert model.memory_attention.layers[0].linear1.weight.dtype == torch.bfloat16
    assert model.memory_encoder.projection.bias.dtype == torch.bfloat16
    assert model.memory_attention.layer_norm.weight.dtype == torch.float32
    assert model.no_memory_embedding.dtype == torch.float32


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_frames_encoded_as_one_batch(models, long_clip, monkeypatch, kept):
    monkeypatch.setattr(tracking, "_ENCODED_AT_ONCE", {"cpu": 3})
    monkeypatch.setattr(tracking, "_FEATURES", kept)
    batches, encode = [], network.encode
    monkeypatch.setattr(network, "encode", lambda model, pixels: batches.append(len(pixels)) or encode(model, pixels))
    both = Both(models(), long_clip, share=0.99)
    both.add_new_points_or_box(2, 1, points=[RED], labels=[1])
    both.propagate_in_video()
    # Of the prompt, then of what comes; of few that are kept, again for the prompt's map and for what that displaced.
    assert batches == {1: [1] * 10, 2: [1, 2, 1, 2, 2, 2, 1], 4: [1, 3, 3, 2]}[kept]
    both.propagate_in_video(reverse=True)
