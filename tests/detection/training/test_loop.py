"""Training: it learns, repeats itself, goes on where it was interrupted, and refuses what it cannot go on from."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from PIL import Image

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from tiny_detectors import NAMES

from omniops.detection.trained import COCO, Description
from omniops.detection.training import CocoDataset, Settings, Training, build
from omniops.detection.training.loop import mirrored, seed_of

LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


class InterruptionError(Exception):
    pass


def _losses(training, until=None):
    """Of every step until the end, or after so many steps the loss and the state, as read from a file."""
    losses = []

    def report(step):
        losses.append((step.epoch, step.number, step.lr, step.losses))
        if len(losses) == until:
            raise InterruptionError

    while training.epoch < training.settings.epochs:
        try:
            means = training.run_epoch(report)
        except InterruptionError:
            break
        own = [entry for entry in losses if entry[0] == training.epoch]
        if len(own) == training.steps:
            for name, mean in means.items():
                assert mean == pytest.approx(sum(entry[3][name] for entry in own) / training.steps)
        training.history.append({"losses": means})
    return losses


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("masks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_losses_fall(begin, shapes, annotations, masks):
    dataset = CocoDataset(shapes / "images", annotations, masks=masks, image_ids=[7, 21])
    training = begin(masks, dataset=dataset, epochs=20, lr=0.1, schedule="cosine", warmup=4)
    losses = _losses(training)
    assert [entry[:2] for entry in losses] == [(epoch, 1) for epoch in range(1, 21)]
    assert set(losses[0][3]) == LOSSES | ({"loss_mask"} if masks else set())
    totals = [sum(record["losses"].values()) for record in training.history]
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("done", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_it_goes_on_as_if_it_had_not_ended(begin, done):
    """Interrupted within the first epoch, between two, and within the second."""
    whole = _losses(begin())
    first = begin()
    before = _losses(first, until=done)
    if done == 3:  # the epoch is done then
        first = begin()
        first.run_epoch()
        first.history.append({})
    second = begin()
    for parameter in second.model.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state(_through_a_file(first.state()))
    assert (second.epoch, second.step) == divmod(done, 3)
    assert before + _losses(second) == whole


def test_sizes_drawn_at_random_are_drawn_on(begin):
    arguments = {"min_size": (48, 64, 80)}
    whole = _losses(begin(arguments=arguments))
    first = begin(arguments=arguments)
    _losses(first, until=2)
    state = _through_a_file(first.state())
    second = begin(arguments=arguments)
    second.load_state(state)
    assert _losses(second) == whole[2:]


def test_workers_that_are_spawned_get_all(begin):
    """As on macOS and Windows: through pickle."""
    loader = begin()._loader()
    again = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    image, target, seed = again[0][1]
    expected = loader.dataset[1]
    assert torch.equal(image, expected[0])
    assert torch.equal(target["boxes"], expected[1]["boxes"])
    assert (seed, again[1]([1, 2])) == (expected[2], [1, 2])


def test_workers_change_nothing(begin):
    assert _losses(begin(workers=2, epochs=1)) == _losses(begin(epochs=1))


def test_the_seed_changes_the_order_and_all_that_is_drawn(begin):
    first, other = _losses(begin(epochs=1)), _losses(begin(epochs=1, seed=1))
    assert first != other
    assert first == _losses(begin(epochs=1))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_mixed_precision(begin, dtype):
    """Near float32 at first, and still learning."""
    plain, mixed = (_losses(begin(masks=True, dtype=own, epochs=1)) for own in ("float32", dtype))
    for name, value in plain[0][3].items():
        assert mixed[0][3][name] == pytest.approx(value, rel=0.02, abs=0.02)
    assert mixed[0][3] != plain[0][3]
    first, second = (begin(masks=True, dtype=dtype, epochs=1) for _ in range(2))
    _losses(first, until=2)
    second.load_state(_through_a_file(first.state()))
    assert _losses(second) == mixed[2:]
    assert all(parameter.dtype == torch.float32 for parameter in second.model.parameters())


def test_a_gradient_that_overflows_in_float16_is_left_out(begin):
    training = begin(dtype="float16", epochs=1)
    training._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(training.model.state_dict())
    with pytest.raises(InterruptionError):
        training.run_epoch(lambda step: (_ for _ in ()).throw(InterruptionError))
    assert training._scaler.get_scale() == 2.0**39
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_last_step_is_filled_up(begin):
    training = begin(batch=4)
    assert training.steps == 2
    batches = training._batches()
    assert [len(batch) for batch in batches] == [4, 4]
    assert sorted(batches[0] + batches[1][:2]) == list(range(6))
    assert batches[1][2:] == batches[0][:2]
    training.epoch = 1
    assert training._batches() != batches


def test_a_picture_alone_fills_a_batch(begin, shapes, annotations):
    dataset = CocoDataset(shapes / "images", annotations, masks=False, image_ids=[0])
    assert len(_losses(begin(dataset=dataset, batch=3, epochs=1))) == 1


def test_pictures_without_objects_are_trained_on(begin, shapes, annotations):
    """A batch of them alone has losses that are no NaN."""
    dataset = CocoDataset(shapes / "images", annotations, masks=True, image_ids=[28, 35])
    annotations["annotations"][-1]["image_id"] = 28
    training = begin(masks=True, dataset=dataset, batch=1, epochs=1)
    losses = _losses(training)
    assert all(math.isfinite(value) for entry in losses for value in entry[3].values())
    assert sorted(entry[3]["loss_mask"] == 0 for entry in losses) == [False, True]


def test_pictures_without_objects_are_left_out_on_apple_gpus(begin, shapes, annotations):
    dataset = CocoDataset(shapes / "images", annotations, masks=False)
    training = Training(begin().model, dataset, Settings(batch=1), torch.device("mps"), NAMES[0])
    assert training.steps == 5
    assert sorted(number for batch in training._batches() for number in batch) == [0, 1, 2, 3, 4]


def test_losses_that_are_no_numbers_end_it(begin):
    training = begin(max_norm=0, lr=1e9, warmup=0)
    with pytest.raises(FloatingPointError, match=r"the loss is no finite number .* a lower rate"):
        training.run_epoch()


def test_gradients_that_are_no_numbers_end_it(begin):
    """Before they are in the weights."""
    training = begin()
    before = copy.deepcopy(training.model.state_dict())
    weight = training.model.roi_heads.box_predictor.cls_score.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"the gradient is no finite number \(loss_\w+ .* a lower rate"):
        training.run_epoch()
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_cannot_be_read_ends_it(begin, shapes, annotations, tmp_path):
    for entry in annotations["images"]:
        target = tmp_path / entry["file_name"]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((shapes / "images" / entry["file_name"]).read_bytes())
    dataset = CocoDataset(tmp_path, annotations, masks=False)
    (tmp_path / "0.png").write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^cannot read .*0\.png"):
            begin(dataset=dataset, workers=workers).run_epoch()


def test_flips(shapes, annotations):
    image, target = CocoDataset(shapes / "images", annotations, masks=True)[1]
    flipped, moved = mirrored(image, target)
    for mask, (x1, y1, x2, y2), colours in zip(moved["masks"], moved["boxes"].long(), target["masks"], strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum() == colours.sum() > 0
    again, back = mirrored(flipped, moved)
    assert torch.equal(again, image)
    assert all(torch.equal(back[name], target[name]) for name in target)


def test_half_are_flipped(begin):
    def shown(flip):
        training = begin(flip=flip)
        loader = training._loader()
        return [sample[0] for epoch in range(8) for sample in _epoch_of(training, epoch, loader)]

    plain, flipped = shown(False), shown(True)
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored_ones = [torch.equal(a.flip(2), b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored_ones, strict=True))
    assert 14 < sum(same) < 34


def _epoch_of(training, epoch, loader):
    training.epoch = epoch
    return [sample for batch in training._loader() for sample in batch]


def test_seeds_differ():
    seeds = {seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 3}, "other settings: epochs is 3 here and 2 there"),
        ({"lr": 0.01}, "other settings: lr is 0.01 here and 0.02 there"),
        ({"arguments": {"min_size": 48}}, "another model or other categories: min_size is 48 here and 64 there"),
    ],
)
def test_states_of_other_settings(begin, change, words):
    state = begin().state()
    with pytest.raises(ValueError, match=words):
        begin(**change).load_state(state)


def test_a_setting_that_an_older_state_lacks(begin):
    state = begin().state()
    del state["settings"]["warmup"]  # None here
    with pytest.raises(ValueError, match="other settings: warmup is None here and None there"):
        begin().load_state(state)


def test_states_of_other_data(begin, shapes, annotations):
    state = begin().state()
    dataset = CocoDataset(shapes / "images", annotations, masks=False, image_ids=[0, 7])
    with pytest.raises(ValueError, match="other pictures or annotations"):
        begin(dataset=dataset).load_state(state)
    annotations["categories"][0]["name"] = "ball"
    dataset = CocoDataset(shapes / "images", annotations, masks=False)
    with pytest.raises(ValueError, match=r"other categories: category_names is .*'ball'.* here and .*'disc'.* there"):
        begin(dataset=dataset).load_state(state)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"step": 3},
        {"step": -1},
        {"epoch": "x"},
        {"history": [5], "epoch": 1},
        {"optimizer": {}},
        {"optimizer": 5},
        {"rng": {}},
        {"rng": {"cpu": torch.zeros(3)}},
        {"totals": 7},
        {"state_dict": {}},
        {"state_dict": 5},
    ],
)
def test_damaged_states(begin, change):
    with pytest.raises(ValueError, match="the state is damaged"):
        begin().load_state({**begin().state(), **change})


def test_what_does_not_fit(begin, shapes, annotations):
    dataset = CocoDataset(shapes / "images", annotations, masks=False)
    with pytest.raises(ValueError, match="dataset must be made with masks=True"):
        begin(masks=True, dataset=dataset)
    dataset = CocoDataset(shapes / "images", annotations, masks=False, image_ids=[35])
    with pytest.raises(ValueError, match="dataset must have objects to train on, got none in 1 pictures"):
        begin(dataset=dataset)
    annotations["categories"].append({"id": 99, "name": "cone"})
    dataset = CocoDataset(shapes / "images", annotations, masks=False)
    with pytest.raises(ValueError, match="model must have 4 classes, the data set's and the background, got 3"):
        begin(dataset=dataset)


def test_heads_of_the_same_categories_are_kept(begin, tmp_path, monkeypatch):
    """Of COCO's where the file does not say; others are drawn anew, small."""
    import tiny_detectors

    tiny_detectors.replace(monkeypatch.setattr)
    training = begin(masks=True)
    torch.save(training.weights(), tmp_path / "own.pth")
    torch.save(tiny_detectors.mask_rcnn().state_dict(), tmp_path / "coco.pth")
    own = training.description
    for description, name, kept in (
        (own, "own.pth", True),
        (own, "coco.pth", False),
        (Description(NAMES[1], COCO), "coco.pth", True),
        (Description(NAMES[1], COCO), "own.pth", False),
    ):
        saved = torch.load(tmp_path / name, weights_only=True)
        saved = saved.get("state_dict", saved)
        model, has_heads = build(description, tmp_path / name)
        assert has_heads is kept
        heads = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        for key, value in model.state_dict().items():
            if not any(head in key for head in heads) or kept:
                assert torch.equal(value, saved[key]), key
            else:
                assert value.std() < 0.02, key
    model, has_heads = build(own)
    assert has_heads is False
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)


def test_settings_of_a_batch_that_processes_cannot_share(begin, shapes, annotations):
    class Three:
        are_several, rank, local_rank, count = True, 0, 0, 3

    dataset = CocoDataset(shapes / "images", annotations, masks=False)
    with pytest.raises(ValueError, match="batch must be shared evenly by the 3 processes, got 2 pictures"):
        Training(begin().model, dataset, Settings(), torch.device("cpu"), NAMES[0], processes=Three())


def test_the_picture_is_what_pillow_reads(begin, shapes, annotations):
    training = begin(flip=False)
    samples = [sample for batch in training._loader() for sample in batch]
    order = [index for batch in training._batches() for index in batch]
    for index, (image, _, _) in zip(order, samples, strict=True):
        with Image.open(shapes / "images" / annotations["images"][index]["file_name"]) as picture:
            assert picture.size == (image.shape[2], image.shape[1])
