"""Sessions in the predictor's process: the masks of SAM2VideoPredictor in COCO's RLE."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH
from server.inference.sessions import EMPTY, FRAMES, POINT, everything, tracked

from omniops import fill_holes, sam2
from omniops.sam2 import architectures, rle
from omniops.sam2.frames import Frames
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.transforms import to_tensor
from omniops.sam2.upsampling import guided
from omniops.sam2.video_predictor import SAM2VideoPredictor
from omniops.server.inference import Inference


@pytest.fixture
def predictor(model):
    return SAM2VideoPredictor(model, add_all_frames_to_correct_as_cond=True)


def coco(logits):
    """As pycocotools writes (N, 1, H, W)."""
    mask_tools = pytest.importorskip("pycocotools.mask", reason="the oracle: pycocotools")
    masks = np.asfortranarray((logits[:, 0] > 0).numpy().astype(np.uint8).transpose(1, 2, 0))
    return [{"size": mask["size"], "counts": mask["counts"].decode()} for mask in mask_tools.encode(masks)]


def require_plain(value):
    """Raise for what is more than numbers, texts, lists, tuples and dictionaries."""
    assert type(value) in (int, float, bool, str, list, tuple, dict, type(None)), type(value)
    if isinstance(value, (list, tuple, dict)):
        for item in itertools.chain(value, value.values() if isinstance(value, dict) else ()):
            require_plain(item)


def test_answers_are_plain_data(inference):
    answers = [
        inference.describe(),
        inference.add("a", 0, 1, [POINT], [1]),
        inference.add_mask("a", 1, 2, EMPTY),
        inference.preview("a", 0, [POINT], [1]),
        everything(inference, "a", 0, 2),
        inference.begin("a", 1),
        inference.next("a"),
        inference.prompts("a"),
        inference.memory(),
        inference.clear_frame("a", 0, 1),
        inference.remove("a", 1),
        inference.clear_video("a"),
        inference.stop("a"),
    ]
    for answer in answers:
        require_plain(answer)


def test_it_runs_in_a_process_of_its_own(model, clip, inference, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process
    with sam2.remote(
        "tiny",
        predictor="omniops.server.inference:Inference",
        device="cpu",
        dtype="float32",
        image_size=64,
        random_weights=True,
    ) as remote:
        assert remote.describe() == inference.describe()
        assert remote.open("a", clip) == {"frames": FRAMES, "width": WIDTH, "height": HEIGHT, "fps": None, "bytes": 0}
        assert remote.add("a", 0, 1, points=[POINT], labels=[1]) == inference.add("a", 0, 1, [POINT], [1])
        assert tracked(remote, start=2) == tracked(inference, start=2)
        with pytest.raises(KeyError, match="b"):
            remote.begin("b", 0)
        with pytest.raises(ValueError, match=r"There is no frame 6: the video has frames 0 to 5\."):
            remote.begin("a", FRAMES)


def test_what_it_is(inference):
    description = inference.describe()
    assert description.pop("device")
    assert description == {
        "device_type": "cpu",
        "dtype": "float32",
        "model": "tiny",
        "image_size": 64,
        "random_weights": True,
    }


@pytest.mark.parametrize("size", ["small", "base-plus", "large"])
def test_the_size_of_the_model_is_described(model, size):
    other = copy.copy(model)  # its configuration alone: larger ones take seconds to build
    trunk = copy.copy(model.image_encoder.trunk)
    trunk.size = architectures.SIZES[size]
    other._modules = {**model._modules, "image_encoder": SimpleNamespace(trunk=trunk)}
    assert Inference(other).describe()["model"] == size


def test_random_weights_are_the_same_each_time_and_draw_none_of_the_callers(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = sam2.load("tiny", "cpu", "float32", image_size=64, random_weights=True)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"one of tiny, small, base-plus, large, got 'sam2\.1_hiera_tiny\.pt'"):
        sam2.load("sam2.1_hiera_tiny.pt", random_weights=True)


# Masks.


def test_masks_are_those_of_the_predictor(inference, predictor, clip):
    state = predictor.init_state(clip)
    pixels = [[POINT[0] * WIDTH, POINT[1] * HEIGHT]]
    logits = predictor.add_new_points_or_box(state, 1, 7, pixels, [1])[2]
    assert inference.add("a", 1, 7, [POINT], [1]) == [(7, coco(logits)[0])]
    assert inference.preview("a", 1, [POINT], [1]) == coco(logits)[0]
    box = [0.5, 0.25, 0.75, 0.75]
    logits = predictor.add_new_points_or_box(state, 1, 3, box=box, normalize_coords=False)[2]
    assert inference.add("a", 1, 3, box=box) == [*zip((7, 3), coco(logits), strict=True)]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:50, 30:70] = True
    logits = predictor.add_new_mask(state, 4, 3, mask)[2]
    assert inference.add_mask("a", 4, 3, rle.encode(mask)) == [*zip((7, 3), coco(logits), strict=True)]

    forward, back = predictor.propagate_in_video(state, 2), predictor.propagate_in_video(state, 2, reverse=True)
    expected = [(t, [*zip(ids, coco(logits), strict=True)]) for t, ids, logits in itertools.chain(forward, back)]
    assert [t for t, _ in expected] == [2, 3, 4, 5, 2, 1, 0]  # the order of the official server
    found = tracked(inference, start=2)
    assert found == expected
    assert len({masks[0][1]["counts"] for _, masks in found}) > 3  # they are of different frames


def test_from_the_first_frame_there_is_no_way_back(inference):
    inference.add("a", 0, 1, [POINT], [1])
    assert [t for t, _ in tracked(inference)] == [0, 1, 2, 3, 4, 5]
    assert [t for t, _ in tracked(inference, start=5)] == [5, 5, 4, 3, 2, 1, 0]


def test_without_corrections_masks_are_those_of_the_official_settings(inference, model, clip):
    predictor = SAM2VideoPredictor(model)
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, [POINT], [1], normalize_coords=False)
    inference.add("a", 0, 1, [POINT], [1])
    assert tracked(inference) == [(t, [(1, coco(logits)[0])]) for t, _, logits in predictor.propagate_in_video(state)]


def test_a_correction_still_counts_when_the_video_is_tracked_again(inference):
    inference.add("a", 0, 1, [POINT], [1])
    before = dict(tracked(inference))
    corrected = inference.add("a", 3, 1, [[0.6, 0.6]], [1])
    assert corrected != before[3]
    after = dict(tracked(inference))
    assert after[3] == corrected
    assert after[0] == before[0]
    assert after[4] != before[4]


def test_points_may_join_those_before(inference, model, clip):
    points, labels = [POINT, [0.5, 0.6], [0.7, 0.2]], [1, 1, 0]
    inference.add("a", 0, 1, box=[0.1, 0.2, 0.8, 0.9])
    inference.add("a", 0, 1, points[:1], labels[:1], clear=False)
    extended = inference.add("a", 0, 1, points[1:], labels[1:], clear=False)
    assert inference.prompts("a") == {
        1: {0: {"points": points, "labels": labels, "box": [0.1, 0.2, 0.8, 0.9], "mask": False}}
    }
    predictor = SAM2VideoPredictor(model)
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, box=[0.1, 0.2, 0.8, 0.9], normalize_coords=False)
    for some in (slice(0, 1), slice(1, 3)):
        logits = predictor.add_new_points_or_box(
            state, 0, 1, points[some], labels[some], clear_old_points=False, normalize_coords=False
        )[2]
    assert extended == [(1, coco(logits)[0])]
    replaced = inference.add("a", 0, 1, [POINT], [1])
    assert replaced != extended
    assert inference.prompts("a")[1][0] == {"points": [POINT], "labels": [1], "box": None, "mask": False}


def test_a_mask_repoints_points(inference):
    inference.add("a", 0, 1, [POINT], [1])
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:45, :70] = True
    _, found = inference.add_mask("a", 0, 1, rle.encode(mask))[0]
    assert (rle.decode(found) != mask).mean() < 0.05  # but for its edge: it went through a small picture
    assert inference.prompts("a")[1][0] == {"points": [], "labels": [], "box": None, "mask": True}


def test_every_object_has_a_mask_in_every_answer(inference):
    inference.add("a", 0, 5, [POINT], [1])
    first, second = inference.add("a", 3, 2, [POINT], [1])
    assert (first, second[0]) == ((5, EMPTY), 2)
    assert second[1] != EMPTY
    assert [object for object, _ in inference.add("a", 1, 9, [POINT], [1])] == [5, 2, 9]
    assert all([object for object, _ in masks] == [5, 2, 9] for _, masks in tracked(inference))


def test_guided_masks_follow_the_frames(inference, model, clip):
    inference.open("guided", clip, guided=True)
    predictor = inference.sessions["guided"].predictor
    found = {session: inference.add(session, 1, 1, [POINT], [1])[0][1] for session in ("a", "guided")}
    assert inference.preview("guided", 1, [POINT], [1]) == found["guided"]
    state = inference.sessions["guided"].state
    low = fill_holes(state.objects[1].latest_output(1, is_cond=True).pred_masks, predictor.fill_hole_area)
    guide = to_tensor(Frames(clip)[1], torch.device("cpu"))
    assert found["guided"] == coco(guided(low, guide, (HEIGHT, WIDTH)))[0]
    assert found["guided"] != found["a"]
    assert [t for t, _ in tracked(inference, "guided")] == [*range(FRAMES)]
    # The low-resolution masks are the same in both.
    tracked(inference)
    states = [inference.sessions[session].state for session in ("a", "guided")]
    assert torch.equal(*(state.objects[1].tracked_output(4).pred_masks for state in states))


def test_a_preview_changes_nothing(inference, clip):
    inference.open("b", clip)
    for session in ("a", "b"):
        inference.add(session, 0, 1, [POINT], [1])
    before = inference.prompts("a")
    assert inference.preview("a", 0, [[0.8, 0.6]], [1]) != inference.preview("a", 0, [[0.1, 0.6]], [1])
    assert inference.preview("a", 0, box=[0.1, 0.2, 0.4, 0.6])["size"] == [HEIGHT, WIDTH]
    assert inference.prompts("a") == before
    inference.begin("a", 0)
    found = [inference.next("a")]
    inference.preview("a", 4, [POINT], [1])  # while it is tracked, which goes on
    found += iter(lambda: inference.next("a"), None)
    assert found == tracked(inference, "b")


def test_everything_is_what_the_generator_finds(inference, model, clip):
    generator = SAM2AutomaticMaskGenerator(
        model, 4, pred_iou_thresh=0, stability_score_thresh=0, output_mode="coco_rle"
    )
    expected = generator.generate(Frames(clip)[2])
    found = everything(inference, "a", 2, 4)
    assert found
    assert [record["mask"] for record in found] == [record["segmentation"] for record in expected]
    for record in found:
        mask = rle.decode(record["mask"])
        rows, columns = np.nonzero(mask)
        assert record["area"] == mask.sum()
        assert record["box"] == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert 0 <= record["stability_score"] <= 1
    assert inference.prompts("a") == {}


def test_everything_is_looked_for_batch_by_batch_beside_other_work(inference, clip):
    alone = everything(inference, "a", 2, 8)
    inference.add("a", 0, 1, [POINT], [1])
    inference.open("b", clip)
    inference.begin("a", 0)
    first = inference.begin_everything("a", 2, 8)
    second = inference.begin_everything("b", 3, 8)
    answers = []
    for _ in range(4):  # of 16 points each
        answers.append(inference.next_everything("a", first))
        inference.next_everything("b", second)
        inference.next("a")
        inference.preview("b", 3, [POINT], [1])
    assert answers == [None] * 4
    assert inference.next_everything("a", first) == alone
    with pytest.raises(ValueError, match=r"^This search for everything is over\.$"):
        inference.next_everything("a", first)
    inference.close("b")
    with pytest.raises(KeyError):
        inference.next_everything("b", second)


# Prompts that are taken back.


def test_an_object_without_prompts_is_left_out(inference, clip):
    inference.add("a", 0, 1, [POINT], [1])
    inference.add("a", 0, 2, [[0.7, 0.7]], [1])
    inference.open("b", clip)
    inference.add("b", 0, 2, [[0.7, 0.7]], [1])
    assert inference.clear_frame("a", 0, 1)[0] == (1, EMPTY)
    assert inference.prompts("a") == {1: {}, 2: inference.prompts("b")[2]}
    alone = tracked(inference, "b")
    assert tracked(inference) == [(t, [(1, EMPTY), *masks]) for t, masks in alone]
    # It is shown again, and is where it was in the order.
    again = inference.add("a", 3, 1, [POINT], [1])
    assert [object for object, _ in again] == [1, 2]
    assert again[0][1] != EMPTY
    found = dict(tracked(inference))
    assert all(masks[0][1] != EMPTY for masks in found.values())
    assert {t: masks[1] for t, masks in found.items()} == {t: masks[0] for t, masks in alone}


def test_with_no_prompt_left_there_is_nothing_to_track(inference):
    for prepare in (lambda: None, lambda: inference.clear_frame("a", 0, 1), lambda: inference.clear_video("a")):
        prepare()
        with pytest.raises(ValueError, match="There is nothing to track: show an object first"):
            inference.begin("a", 0)
        assert inference.next("a") is None
        inference.add("a", 0, 1, [POINT], [1])
        assert inference.begin("a", 0) == FRAMES


def test_a_mask_that_was_tracked_stays_until_the_next_tracking(inference):
    inference.add("a", 0, 1, [POINT], [1])
    inference.add("a", 0, 2, [[0.7, 0.7]], [1])
    before = dict(tracked(inference))
    assert inference.clear_frame("a", 0, 1) == before[0]
    assert inference.clear_frame("a", 4, 1) == before[4]  # where it had no prompt
    assert inference.add("a", 2, 2, [[0.7, 0.7]], [1])[0] == before[2][0]
    after = tracked(inference)
    assert all(masks[0] == (1, EMPTY) for _, masks in after)
    # And it has none on any frame from here on.
    assert inference.clear_frame("a", 4, 1)[0] == (1, EMPTY)
    assert inference.add("a", 5, 2, [[0.7, 0.7]], [1])[0] == (1, EMPTY)


def test_a_removed_object_leaves_the_ids_of_the_others(inference, clip):
    inference.add("a", 0, 3, [POINT], [1])
    inference.add("a", 0, 4, [[0.7, 0.7]], [1])
    inference.add("a", 2, 3, [POINT], [1])
    inference.add("a", 3, 9, [POINT], [1])
    of_9 = inference.clear_frame("a", 3, 4)[2]
    of_4 = inference.clear_frame("a", 0, 9)[1]
    assert inference.remove("a", 3) == [(0, [of_4, (9, EMPTY)]), (2, [(4, EMPTY), (9, EMPTY)])]
    assert of_9[1] != EMPTY
    assert inference.remove("a", 3) == []
    assert inference.remove("a", 77) == []
    assert list(inference.prompts("a")) == [4, 9]
    inference.open("b", clip)
    inference.add("b", 0, 4, [[0.7, 0.7]], [1])
    inference.add("b", 3, 9, [POINT], [1])
    assert tracked(inference) == tracked(inference, "b")
    assert [object for object, _ in inference.add("a", 0, 3, [POINT], [1])] == [4, 9, 3]  # behind them, when it is new
    assert [inference.remove("a", object) != [] for object in (3, 9, 4)] == [True, True, False]


def test_a_cleared_object_can_be_removed(inference):
    inference.add("a", 0, 1, [POINT], [1])
    inference.add("a", 0, 2, [POINT], [1])
    inference.clear_frame("a", 0, 1)
    tracked(inference)
    assert inference.remove("a", 1) == []
    assert list(inference.prompts("a")) == [2]


def test_start_over(inference):
    first = inference.add("a", 0, 1, [POINT], [1])
    tracked(inference)
    inference.clear_video("a")
    assert inference.prompts("a") == {}
    assert inference.add("a", 0, 8, [POINT], [1]) == [(8, first[0][1])]
    assert inference.add("a", 3, 9, [POINT], [1])[0] == (8, EMPTY)


def test_a_change_ends_the_propagation_and_what_was_tracked_stays(inference):
    inference.add("a", 0, 1, [POINT], [1])
    expected = dict(tracked(inference))
    inference.begin("a", 0)
    for t in range(3):
        assert inference.next("a") == (t, expected[t])
    inference.stop("a")
    assert inference.next("a") is None
    assert inference.clear_frame("a", 2, 1) == expected[2]
    for change in (
        lambda: inference.add("a", 0, 1, [POINT], [1]),
        lambda: inference.add_mask("a", 5, 2, EMPTY),
        lambda: inference.clear_frame("a", 5, 2),
        lambda: inference.remove("a", 2),
        lambda: inference.clear_video("a"),
    ):
        inference.begin("a", 0)
        inference.next("a")
        change()
        assert inference.next("a") is None
    inference.add("a", 0, 1, [POINT], [1])
    inference.begin("a", 0)
    inference.begin("a", 4)
    assert inference.next("a")[0] == 4
