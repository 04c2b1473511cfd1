"""Sessions in the predictor's process: the masks of SAM2VideoPredictor in COCO's RLE, and what errors leave behind."""

import copy
import functools
import gc
import itertools

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH, write_clip
from PIL import Image

pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")

from omniops import sam2
from omniops.sam2 import architectures, memory, rle
from omniops.sam2.frames import Frames
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.pictures import planes
from omniops.sam2.upsampling import guided
from omniops.sam2.video_predictor import SAM2VideoPredictor
from omniops.server import inference as module
from omniops.server.inference import Inference

FRAMES = 6
EMPTY = {"size": [HEIGHT, WIDTH], "counts": rle.compressed(np.array([HEIGHT * WIDTH]))}
POINT = [0.25, 0.5]


@pytest.fixture(scope="module")
def model():
    return sam2.load("tiny", "cpu", "float32", image_size=64, random_weights=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip", FRAMES))


@pytest.fixture
def inference(model, clip):
    made = Inference(model)
    made.open("a", clip)
    return made


@pytest.fixture
def predictor(model):
    return SAM2VideoPredictor(model, add_all_frames_to_correct_as_cond=True)


def tracked(inference, session="a", start=0):
    count = inference.begin(session, start)
    found = list(iter(lambda: inference.next(session), None))
    assert len(found) == count
    return found


def everything(inference, session, frame, side):
    number = inference.begin_everything(session, frame, side)
    while (found := inference.next_everything(session, number)) is None:
        pass
    return found


def coco(logits):
    """As pycocotools writes (N, 1, H, W)."""
    mask_tools = pytest.importorskip("pycocotools.mask", reason="the oracle: pycocotools")
    masks = np.asfortranarray((logits[:, 0] > 0).numpy().astype(np.uint8).transpose(1, 2, 0))
    return [{"size": each["size"], "counts": each["counts"].decode()} for each in mask_tools.encode(masks)]


def require_plain(value):
    """Raise for what is more than numbers, texts, lists, tuples and dictionaries."""
    assert type(value) in (int, float, bool, str, list, tuple, dict, type(None)), type(value)
    if isinstance(value, (list, tuple, dict)):
        for each in itertools.chain(value, value.values() if isinstance(value, dict) else ()):
            require_plain(each)


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


def test_it_runs_in_a_process_of_its_own(model, clip, inference):
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
    told = inference.describe()
    assert told.pop("device")
    assert told == {
        "device_type": "cpu",
        "dtype": "float32",
        "model": "tiny",
        "image_size": 64,
        "random_weights": True,
    }


@pytest.mark.parametrize("size", ["small", "base-plus", "large"])
def test_the_size_of_the_model_is_told(model, size):
    other = copy.copy(model)  # its configuration alone: larger ones take seconds to build
    other.config = architectures._config(architectures.SIZES[size], "2.1", 64)
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
    places, labels = [POINT, [0.5, 0.6], [0.7, 0.2]], [1, 1, 0]
    inference.add("a", 0, 1, box=[0.1, 0.2, 0.8, 0.9])
    inference.add("a", 0, 1, places[:1], labels[:1], clear=False)
    joined = inference.add("a", 0, 1, places[1:], labels[1:], clear=False)
    assert inference.prompts("a") == {
        1: {0: {"points": places, "labels": labels, "box": [0.1, 0.2, 0.8, 0.9], "mask": False}}
    }
    predictor = SAM2VideoPredictor(model)
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, box=[0.1, 0.2, 0.8, 0.9], normalize_coords=False)
    for some in (slice(0, 1), slice(1, 3)):
        logits = predictor.add_new_points_or_box(
            state, 0, 1, places[some], labels[some], clear_old_points=False, normalize_coords=False
        )[2]
    assert joined == [(1, coco(logits)[0])]
    replaced = inference.add("a", 0, 1, [POINT], [1])
    assert replaced != joined
    assert inference.prompts("a")[1][0] == {"points": [POINT], "labels": [1], "box": None, "mask": False}


def test_a_mask_replaces_points(inference):
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
    predictor = inference._sessions["guided"].predictor
    found = {session: inference.add(session, 1, 1, [POINT], [1])[0][1] for session in ("a", "guided")}
    assert inference.preview("guided", 1, [POINT], [1]) == found["guided"]
    state = inference._sessions["guided"].state
    low = predictor._mask(state._tracks[1].new_conditioning[1])
    guide = planes(Frames(clip)[1], torch.device("cpu"))
    assert found["guided"] == coco(guided(low, guide, (HEIGHT, WIDTH)))[0]
    assert found["guided"] != found["a"]
    assert [t for t, _ in tracked(inference, "guided")] == [*range(FRAMES)]
    # What is remembered of frames is the same in both.
    tracked(inference)
    of_both = [inference._sessions[session].state._tracks[1].others[4].logits for session in ("a", "guided")]
    assert torch.equal(*of_both)


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
    assert [each["mask"] for each in found] == [each["segmentation"] for each in expected]
    for each in found:
        mask = rle.decode(each["mask"])
        rows, columns = np.nonzero(mask)
        assert each["area"] == mask.sum()
        assert each["box"] == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert 0 <= each["stability_score"] <= 1
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


# Errors.

WRONG = {
    "a frame behind the last": ((FRAMES, 1, [POINT], [1]), r"There is no frame 6: the video has frames 0 to 5\."),
    "a frame before the first": ((-1, 1, [POINT], [1]), r"There is no frame -1"),
    "half a frame": ((0.5, 1, [POINT], [1]), r"The frame must be a whole number, got 0\.5\."),
    "an object that is no number": ((0, "one", [POINT], [1]), r"The object must be a whole number, got 'one'\."),
    "label 7": ((0, 1, [POINT], [7]), r"A label must be 1 .* or 0 .*, got 7\."),
    "half a label": ((0, 1, [POINT], [0.5]), r"A label must be a whole number"),
    "no points": ((0, 1, [], []), r"There is no prompt: give a point or a box\."),
    "no label": ((0, 1, [POINT], []), r"as many labels as points, got 0 and 1"),
    "NaN": ((0, 1, [[float("nan"), 0.5]], [1]), r"A point must be 2 fractions .* from 0 to 1, got \[nan, 0\.5\]"),
    "infinity": ((0, 1, [[0.5, float("inf")]], [1]), "A point must be 2 fractions"),
    "a point to the right": ((0, 1, [[1.001, 0.5]], [1]), "A point must be 2 fractions"),
    "a point above": ((0, 1, [[0.5, -0.001]], [1]), "A point must be 2 fractions"),
    "a point of one number": ((0, 1, [[0.5]], [1]), "A point must be 2 fractions"),
    "a point of texts": ((0, 1, [["0", "0"]], [1]), "A point must be 2 fractions"),
    "too many points": ((0, 1, [POINT] * 501, [1] * 501), "at most 500 points on a frame, got 501"),
    "a box out of the frame": ((0, 1, [], [], [0, 0, 1, 1.5]), "A box must be 4 fractions"),
    "a box of three numbers": ((0, 1, [], [], [0, 0, 1]), "A box must be 4 fractions"),
    "a box the wrong way round": ((0, 1, [], [], [0.9, 0, 0.1, 1]), "A box must be left, top, right, bottom"),
    "a box with old points": ((0, 1, [], [], [0, 0, 1, 1], False), "A box comes before all points"),
    "too many points with old ones": ((0, 1, [POINT] * 500, [1] * 500, None, False), "at most 500 points"),
}


def test_faulty_clicks_leave_no_trace(twins_of_session):
    """Neither of an object that is known nor of a new one."""
    inference = twins_of_session.inference
    for arguments, words in WRONG.values():
        frame, object, *rest = arguments
        for each in (1, 2) if object == 1 and len(rest) < 4 else (object,):
            click = functools.partial(inference.add, "a", frame, each, *rest)
            twins_of_session.require_failure(click, ValueError, words)
    twins_of_session.require_alike()


MASKS = {
    "another size": {"size": [WIDTH, HEIGHT], "counts": EMPTY["counts"]},
    "no size": {"counts": EMPTY["counts"]},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "too few counts": {"size": [HEIGHT, WIDTH], "counts": [5]},
    "no string of COCO's": {"size": [HEIGHT, WIDTH], "counts": "ÿ"},
    "counts of texts": {"size": [HEIGHT, WIDTH], "counts": ["a"]},
    "counts of more than 64 bits": {"size": [HEIGHT, WIDTH], "counts": [2**70]},
    "a number": 5,
    "a size of a number": {"size": 5, "counts": EMPTY["counts"]},
}


def test_faulty_masks_leave_no_trace(twins_of_session):
    inference = twins_of_session.inference
    words = r"The (mask must be of the size of the video, \[90, 140\]|counts of the mask are not COCO's)"
    for mask in MASKS.values():
        for object in (1, 2):
            show = functools.partial(inference.add_mask, "a", 0, object, mask)
            twins_of_session.require_failure(show, ValueError, words)
    twins_of_session.require_alike()


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.add("a", 2, 1, [POINT], [1]),
        lambda made: made.add("a", 2, 2, [POINT], [1]),
        lambda made: made.add_mask("a", 0, 1, EMPTY),
        lambda made: made.add_mask("a", 0, 2, EMPTY),
        lambda made: made.clear_frame("a", 0, 1),
        lambda made: made.remove("a", 1),
    ],
    ids=["add to a known object", "add a new one", "mask of a known object", "mask of a new one", "clear", "remove"],
)
def test_a_failure_of_the_model_leaves_no_trace(twins_of_session, monkeypatch, call):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    inference = twins_of_session.inference
    for place in (rle, "runs"), (SAM2VideoPredictor, "_resized"):
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail)
            twins_of_session.require_failure(functools.partial(call, inference), RuntimeError, "out of memory")
    monkeypatch.setattr(memory, "segment", fail)
    click = functools.partial(inference.add, "a", 4, 3, [POINT], [1])
    twins_of_session.require_failure(click, RuntimeError, "out of memory")
    monkeypatch.undo()
    twins_of_session.require_alike()


class Twins:
    """Two sessions, a and b, alike. What fails in a must leave it so."""

    def __init__(self, inference, clip):
        self.inference = inference
        inference.open("b", clip)
        for session in ("a", "b"):
            inference.add(session, 0, 1, [POINT], [1])
            inference.add(session, 3, 5, [[0.6, 0.4]], [1])
            tracked(inference, session)
        inference.preview("a", 5, [POINT], [1])

    def require_failure(self, call, error, words):
        with pytest.raises(error, match=words):
            call()
        assert self.inference.prompts("a") == self.inference.prompts("b")

    def require_alike(self):
        for session in ("a", "b"):
            self.inference._sessions[session].state.release_features()
        assert self.inference._sessions["a"].state.nbytes == self.inference._sessions["b"].state.nbytes
        assert self.inference.clear_frame("a", 2, 5) == self.inference.clear_frame("b", 2, 5)
        assert tracked(self.inference, "a", 4) == tracked(self.inference, "b", 4)


@pytest.fixture
def twins_of_session(inference, clip):
    return Twins(inference, clip)


def test_a_faulty_click_is_none_on_a_new_session(inference):
    for arguments, words in WRONG.values():
        if len(arguments) < 6:
            with pytest.raises(ValueError, match=words):
                inference.add("a", *arguments)
    assert inference.prompts("a") == {}
    with pytest.raises(ValueError, match="nothing to track"):
        inference.begin("a", 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.add("no", 0, 1, [POINT], [1]),
        lambda made: made.add_mask("no", 0, 1, EMPTY),
        lambda made: made.clear_frame("no", 0, 1),
        lambda made: made.clear_video("no"),
        lambda made: made.remove("no", 1),
        lambda made: made.preview("no", 0, [POINT], [1]),
        lambda made: made.begin_everything("no", 0, 2),
        lambda made: made.begin("no", 0),
        lambda made: made.next("no"),
        lambda made: made.stop("no"),
        lambda made: made.prompts("no"),
    ],
)
def test_an_unknown_session_is_named(inference, call):
    with pytest.raises(KeyError) as raised:
        call(inference)
    assert raised.value.args == ("no",)
    inference.close("no")
    assert list(inference.memory()["sessions"]) == ["a"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda made: made.clear_frame("a", FRAMES, 1), "There is no frame 6"),
        (lambda made: made.clear_frame("a", 0, 9), r"Object 9 is unknown in this session\."),
        (lambda made: made.preview("a", 0), "There is no prompt"),
        (lambda made: made.preview("a", FRAMES, [POINT], [1]), "There is no frame 6"),
        (lambda made: made.begin_everything("a", FRAMES, 2), "There is no frame 6"),
        (lambda made: made.begin_everything("a", 0, 0), "along a side must be from 1 to 64, got 0"),
        (lambda made: made.begin_everything("a", 0, 65), "along a side must be from 1 to 64, got 65"),
        (lambda made: made.begin_everything("a", 0, "4"), "along a side must be a whole number"),
        (lambda made: made.begin("a", FRAMES), "There is no frame 6"),
        (lambda made: made.begin("a", None), "The frame must be a whole number, got None"),
        (lambda made: made.open("a", "elsewhere"), "There is a session of that id already"),
    ],
)
def test_wrong_arguments_are_named(inference, call, words):
    inference.add("a", 0, 1, [POINT], [1])
    with pytest.raises(ValueError, match=words):
        call(inference)
    assert [t for t, _ in tracked(inference)] == [*range(FRAMES)]


def test_objects_are_bounded(inference, monkeypatch):
    monkeypatch.setattr(module, "MAX_OBJECTS", 2)
    for object in (1, 2, 1):
        inference.add("a", 0, object, [POINT], [1])
    with pytest.raises(ValueError, match="at most 2 objects: remove one first"):
        inference.add("a", 0, 3, [POINT], [1])
    with pytest.raises(ValueError, match="at most 2 objects"):
        inference.add_mask("a", 0, 3, EMPTY)
    inference.remove("a", 1)
    assert len(inference.add("a", 0, 3, [POINT], [1])) == 2


def test_messages_are_short(inference):
    with pytest.raises(ValueError, match="A point must be") as raised:
        inference.add("a", 0, 1, [["x" * 10**5] * 10**5], [1])
    assert len(str(raised.value)) < 300


def test_files_that_are_no_videos_are_named_without_their_path(model, tmp_path):
    inference = Inference(model)
    (tmp_path / "notes.mp4").write_text("notes")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (tmp_path / "empty").mkdir()
    for name in ("notes.mp4", "picture.png", "empty", "missing.mp4", "null\0.mp4"):
        with pytest.raises(ValueError, match=r"^The file cannot be read as a video or a picture\.$"):
            inference.open("a", str(tmp_path / name))
    assert inference.memory()["sessions"] == {}


def damaged(folder):
    """A clip whose frame 3 cannot be decoded."""
    write_clip(folder, FRAMES)
    file = folder / "3.jpg"
    file.write_bytes(file.read_bytes()[:120])
    return str(folder)


def test_a_damaged_frame_is_named_without_its_path(model, tmp_path):
    inference = Inference(model)
    inference.open("a", damaged(tmp_path / "clip"))
    inference.open("guided", damaged(tmp_path / "other"), guided=True)
    for call in (
        lambda: inference.add("a", 3, 1, [POINT], [1]),
        lambda: inference.add("guided", 3, 1, [POINT], [1]),
        lambda: inference.add_mask("a", 3, 1, EMPTY),
        lambda: inference.preview("a", 3, [POINT], [1]),
        lambda: everything(inference, "a", 3, 2),
    ):
        with pytest.raises(ValueError, match=r"^Frame 3 cannot be decoded: the file is damaged there\.$"):
            call()
    assert inference.prompts("a") == inference.prompts("guided") == {}


def test_a_propagation_past_a_damaged_frame_gives_the_others_and_says_so(model, tmp_path):
    inference = Inference(model)
    inference.open("a", damaged(tmp_path / "clip"))
    inference.add("a", 1, 1, [POINT], [1])
    inference.begin("a", 1)
    frames = []
    with (
        pytest.warns(UserWarning, match="the masks end before frame 3"),
        pytest.raises(ValueError, match=r"^Frame 3 cannot be decoded: the file is damaged there, and tracking ended"),
    ):
        frames.extend(iter(lambda: inference.next("a")[0], None))
    assert frames == [1, 2, 1, 0]
    assert inference.next("a") is None


# Memory.


def test_sessions_on_one_file_share_its_frames(inference, clip):
    inference.open("b", clip)
    frames = inference._sessions["a"].frames
    assert inference._sessions["b"].frames is frames
    inference.close("a")
    inference.open("a", clip)
    assert inference._sessions["a"].frames is frames
    inference.close("a")
    inference.close("b")
    del frames
    gc.collect()
    assert not inference._frames


def test_a_file_that_changed_is_opened_again(inference, model, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (40, 30)).save(file)
    assert inference.open("b", str(file))["width"] == 40
    Image.new("RGB", (50, 30)).save(file)
    assert inference.open("c", str(file))["width"] == 50


def test_two_propagations_on_one_file_do_not_take_its_decoder_from_each_other(inference, clip):
    for session in ("b", "c"):
        inference.open(session, clip)
    for session, point in (("a", POINT), ("b", [0.7, 0.7])):
        inference.add(session, 0, 1, [point], [1])
    expected = [tracked(inference, "a", 1), tracked(inference, "b")]
    counts = inference.begin("a", 1), inference.begin("b", 0)
    a, b = (inference._sessions[session] for session in ("a", "b"))
    assert a.frames is b.frames is a.state.frames
    assert b.state.frames is not b.frames
    found = [], []
    for _ in range(max(counts)):
        for session, masks in zip(("a", "b"), found, strict=True):
            masks.append(inference.next(session))
    assert [[each for each in masks if each] for masks in found] == expected
    assert inference.next("b") is None
    assert b.state.frames is b.frames  # at its end it shares them again
    assert inference.add("b", 5, 2, [POINT], [1])


def test_sessions_that_are_not_used_give_back_what_the_encoder_made(inference, clip):
    one_frame = features(inference)
    inference.add("a", 0, 1, [POINT], [1])
    one_frame = inference.memory()["sessions"]["a"]
    for t in range(FRAMES):
        inference.preview("a", t, [POINT], [1])
    assert features(inference) == FRAMES
    assert inference.memory()["sessions"]["a"] > 4 * one_frame
    inference.open("b", clip)
    inference.preview("b", 0, [POINT], [1])
    assert features(inference) == 1  # that of the last frame: whoever comes back to it need not wait
    assert list(inference._sessions["a"].state._features) == [FRAMES - 1]
    for i in range(module._SESSIONS_WITH_FEATURES - 2):
        inference.open(f"more {i}", clip)
        inference.preview(f"more {i}", 0, [POINT], [1])
    assert features(inference) == 1
    inference.open("one too many", clip)
    inference.preview("one too many", 0, [POINT], [1])
    assert features(inference) == 0
    assert features(inference, "b") == 1
    assert inference.memory()["sessions"]["a"] < one_frame
    inference.add("a", 0, 1, [POINT], [1])  # and all goes on
    assert features(inference, "b") == 0


def features(inference, session="a"):
    return len(inference._sessions[session].state._features)


def test_a_closed_session_leaves_nothing(inference, clip):
    inference.add("a", 0, 1, [POINT], [1])
    inference.begin("a", 0)
    inference.next("a")
    inference.close("a")
    assert inference.memory()["sessions"] == {}
    with pytest.raises(KeyError):
        inference.next("a")
    inference.close("a")
    gc.collect()
    from omniops.sam2.state import InferenceState

    assert not [each for each in gc.get_objects() if type(each) is InferenceState]
