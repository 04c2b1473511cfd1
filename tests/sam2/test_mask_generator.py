"""The mask generator against the official package's: its choice among masks to the last bit, its network nearly so."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from lively_model import HEIGHT, SIDE, WIDTH
from lively_model import lively as lively
from lively_model import photograph as photograph
from one_thread import one_thread as one_thread
from PIL import Image

from omniops import dropin
from omniops.sam2 import checkpoints, mask_generator, rle
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator, nms
from omniops.sam2.modeling.mask_decoder import Masks
from omniops.sam2.modeling.sam2 import ImageFeatures


def generators(models, **options):
    """The official generator and ours, with the same options."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator as Official

    official, ours = Official(models[0], **options), SAM2AutomaticMaskGenerator(models[1], **options)
    official.predictor._bb_feat_sizes = [(SIDE // stride,) * 2 for stride in (4, 8, 16)]  # fixed there for 1024
    return official, ours


def blobs(prompts, multimask_output):
    """A stand-in for the network: three grainy blobs around a point, or one; less grainy from a mask."""
    points, labels, mask = prompts
    assert points.shape == (len(points), 1, 2)
    assert labels.eq(1).all()
    side = SIDE // 4
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre = points[:, :, None, None] / 4
    distance = (((x - centre[..., 0]) / 1.5) ** 2 + (y - centre[..., 1]) ** 2).sqrt()
    phase = points.sum(-1) * 0.7
    radius = torch.tensor([2.0, 4.0, 9.0] if multimask_output else [5.0]) + phase.sin()
    grain = (5 * x + 3 * y + 2 * x * y).sin()
    logits = 4 * (radius[..., None, None] - distance) + (5 if mask is None else 1) * grain
    if mask is not None:
        assert mask.abs().max() == 32  # that of a mask before was cut off there
        logits = logits + mask / 2
    scores = 0.6 + 0.4 * (radius * 5 + phase).cos()
    return Masks(logits, scores, scores, scores)


class WithoutEncoder:
    """A model whose features of images mean nothing."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward_image(self, images):
        features = torch.zeros(len(images), 1, 1, 1)
        return ImageFeatures(features, (features, features), features)


def without_network(generator):
    """Have ``blobs`` for a network; the rest of the predictor stays."""
    predictor = generator.predictor
    predictor.predict_low_res_masks = lambda *args, **kwargs: blobs(*args, **kwargs)
    predictor.model = WithoutEncoder(predictor.model)
    return generator


class AsTheOfficial:
    """Our predictor as the official generator calls its own."""

    def __init__(self, predictor, official):
        for name in ("device", "set_image", "reset_predictor", "postprocess_masks"):
            setattr(self, name, getattr(predictor, name))
        self._transforms = official._transforms

    def _predict(self, points, labels, mask_input=None, multimask_output=True, return_logits=False):
        assert return_logits
        low = blobs((points, labels, mask_input), multimask_output)
        return self.postprocess_masks(low.low_res_masks), low.ious, low.low_res_masks.clamp(-32, 32)


MANY = {"points_per_side": 5, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
CASES = {
    "plain": {},
    "every mask": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0},
    "empty masks": {"mask_threshold": 1e4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
    "empty masks of crops": {
        "mask_threshold": 1e4,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "crop_n_layers": 1,
        "crop_overlap_ratio": 0.9,
    },
    "strict": {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.7, "stability_score_offset": 0.5},
    "threshold": {"mask_threshold": 9.0, "box_nms_thresh": 0.4},
    "crops": {"crop_n_layers": 1, "crop_nms_thresh": 0.5},
    "crops of crops": {
        "crop_n_layers": 2,
        "crop_n_points_downscale_factor": 2,
        "crop_overlap_ratio": 0.5,
        "points_per_batch": 3,
    },
    "refined": {"use_m2m": True, "points_per_batch": 16},
    "refined crops": {"use_m2m": True, "crop_n_layers": 1},
    "mended": {"min_mask_region_area": 9.0},
    "one mask a point": {"multimask_output": False},
    "own grids": {
        "points_per_side": None,
        "crop_n_layers": 1,
        "point_grids": [np.array([[0.1, 0.9], [0.5, 0.5], [0.0, 1.0]]), np.array([[0.25, 0.5], [0.75, 0.5]])],
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_choice_is_the_official_one(lively, photograph, case):
    """Of the same logits and scores, in every bit and every type."""
    official, ours = generators(lively, **{**MANY, **CASES[case]})
    official.predictor = AsTheOfficial(without_network(ours).predictor, official.predictor)
    expected, found = official.generate(photograph), ours.generate(photograph)
    assert len(found) == len(expected) >= 10
    for record, right in zip(found, expected, strict=True):
        assert list(record) == list(right)
        assert np.array_equal(record.pop("segmentation"), right.pop("segmentation"))
        np.testing.assert_equal(record, right)  # where NaN equals NaN
        assert [type(value) for value in record.values()] == [type(value) for value in right.values()]


@pytest.mark.parametrize("mode", ["uncompressed_rle", "coco_rle"])
def test_run_lengths_are_the_official_ones(lively, photograph, mode):
    official, ours = generators(lively, **MANY, crop_n_layers=1, output_mode=mode)
    official.predictor = AsTheOfficial(without_network(ours).predictor, official.predictor)
    expected, found = official.generate(photograph), ours.generate(photograph)
    assert len(found) >= 10
    assert found == expected
    assert json.loads(json.dumps(found)) == expected
    for record in found:
        mask = rle.decode(record["segmentation"])
        assert mask.sum() == record["area"]
        y, x = mask.nonzero()
        assert record["bbox"] == [x.min(), y.min(), np.ptp(x), np.ptp(y)]


WHOLE = {
    "plain": {},
    "refined": {"use_m2m": True, "points_per_batch": 7},
    "mended": {"min_mask_region_area": 5},
    "crops": {"crop_n_layers": 1, "mask_threshold": 6.0, "points_per_side": 3},
    "one mask a point": {"multimask_output": False},
}


@pytest.mark.parametrize("case", WHOLE)
def test_masks_are_the_official_ones(lively, photograph, case):
    """Network and all. Where a logit is next to nothing rounding may decide otherwise: in few pixels of all."""
    options = {**MANY, "stability_score_thresh": 0.1, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0, **WHOLE[case]}
    official, ours = generators(lively, **options)
    if case == "crops":  # where fewer masks end near the edges
        photograph = photograph.repeat(3, 0).repeat(3, 1)
    dropin.enable("sam2")  # for what mends the official masks
    try:
        expected, found = official.generate(photograph), ours.generate(photograph)
    finally:
        dropin.disable("sam2")
    assert len(found) == len(expected) >= 20
    assert (len({tuple(record["crop_box"]) for record in found}) > 1) == (case == "crops")
    differing = 0
    for record, right in zip(found, expected, strict=True):
        assert record["predicted_iou"] == pytest.approx(right["predicted_iou"], abs=1e-4)
        for name in ("point_coords", "crop_box"):
            assert record[name] == right[name]
        pixels = (record["segmentation"] != right["segmentation"]).sum()
        # The score is a share of at least so many pixels as the mask has: what differs of it is pixels too.
        stability = abs(record["stability_score"] - right["stability_score"])
        differing += pixels + math.ceil(stability * record["area"] - 0.01)
        if not pixels:
            assert (record["bbox"], record["area"]) == (right["bbox"], right["area"])
    assert differing <= 3


def kinds(value):
    """The types of a value and of what it holds."""
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    if isinstance(value, list):
        return [kinds(item) for item in value]
    return (type(value), value.dtype, value.shape) if isinstance(value, np.ndarray) else type(value)


@pytest.mark.parametrize("mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
def test_records_are_of_the_official_types(lively, photograph, mode):
    official, ours = generators(lively, **MANY, output_mode=mode)
    official.predictor = AsTheOfficial(without_network(ours).predictor, official.predictor)
    expected, found = official.generate(photograph), ours.generate(photograph)
    assert len(found) == len(expected) > 5
    for record, right in zip(found, expected, strict=True):
        assert kinds(record["segmentation"]) == kinds(right["segmentation"])
        assert list(record) == list(right)
        for name in ("bbox", "crop_box", "point_coords", "predicted_iou", "stability_score", "area"):
            assert (name, kinds(record[name])) == (name, kinds(right[name]))


def components(mask):
    """OpenCV's for the official package's extension: labels and areas of (N, 1, H, W)."""
    cv2 = pytest.importorskip("cv2", reason="what the oracle finds components with")
    labels, areas = torch.zeros_like(mask, dtype=torch.int32), torch.zeros_like(mask, dtype=torch.int32)
    for i, channel in enumerate(mask[:, 0].numpy()):
        _, label, stats, _ = cv2.connectedComponentsWithStats(channel.astype(np.uint8), connectivity=8)
        labels[i, 0] = torch.from_numpy(label)
        areas[i, 0] = torch.from_numpy(np.where(label > 0, stats[label, cv2.CC_STAT_AREA], 0))
    return labels, areas


@pytest.mark.parametrize("area", [1, 5, 40, 300])
def test_small_regions_of_random_masks_go_as_in_the_official_generator(lively, photograph, monkeypatch, area):
    """Ours all the way, and the official generator with its own postprocessing.

    Masks come to the size of the picture by the nearest pixel: what is mended has few values, between which a bilinear
    one may be next to nothing, where rounding decides.
    """
    nearest = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda masks, size, **_: nearest(masks, size))
    misc = pytest.importorskip("sam2.utils.misc", reason="the oracle: the official package, sam2 from PyPI")
    monkeypatch.setattr(misc, "get_connected_components", components)
    smooth = blobs

    def noisy(prompts, multimask_output):
        masks = smooth(prompts, multimask_output)
        numbers = torch.Generator().manual_seed(int(1000 * prompts[0].sum()))
        return masks._replace(
            low_res_masks=masks.low_res_masks + 12 * torch.randn(masks.low_res_masks.shape, generator=numbers)
        )

    monkeypatch.setattr(sys.modules[__name__], "blobs", noisy)
    options = {"points_per_side": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99}
    official, ours = generators(lively, **options, min_mask_region_area=area)
    theirs = official.predictor
    theirs._orig_hw = [photograph.shape[:2]]
    official.predictor = AsTheOfficial(without_network(ours).predictor, theirs)
    official.predictor.postprocess_masks = lambda low: theirs._transforms.postprocess_masks(low, theirs._orig_hw[0])
    expected, found = official.generate(photograph), ours.generate(photograph)
    assert len(found) == len(expected) >= 3
    for record, right in zip(found, expected, strict=True):
        assert np.array_equal(record.pop("segmentation"), right.pop("segmentation"))
        np.testing.assert_equal(record, right)
    _, plain = generators(lively, **options)
    before = {
        tuple(record["point_coords"][0]): record["area"] for record in without_network(plain).generate(photograph)
    }
    assert any(before.get(tuple(record["point_coords"][0])) != record["area"] for record in found)


def test_numpy_integers_are_integers(lively, photograph):
    integers = {name: np.int64(value) for name, value in {"points_per_side": 2, "points_per_batch": 3}.items()}
    options = {"crop_n_layers": np.int64(1), "min_mask_region_area": np.int32(4), "crop_n_points_downscale_factor": 1}
    options["crop_n_points_downscale_factor"] = np.int64(1)
    generator = without_network(SAM2AutomaticMaskGenerator(lively[1], **integers, **options))
    plain = without_network(SAM2AutomaticMaskGenerator(lively[1], 2, 3, crop_n_layers=1, min_mask_region_area=4))
    assert len(generator.point_grids) == 2
    found, expected = ([record["area"] for record in either.generate(photograph)] for either in (generator, plain))
    assert found == expected


def test_chunks_do_not_matter(lively, photograph, monkeypatch):
    generator = without_network(SAM2AutomaticMaskGenerator(lively[1], **MANY, output_mode="coco_rle"))
    expected = generator.generate(photograph)
    monkeypatch.setattr(mask_generator, "MAX_CHUNK_BYTES", 1)
    assert generator.generate(photograph) == expected


def test_only_good_masks_become_large_and_few_at_once(lively, photograph, monkeypatch):
    generator = without_network(SAM2AutomaticMaskGenerator(lively[1], **MANY))
    postprocess, counts = generator.predictor.postprocess_masks, []

    def counted(logits):
        counts.append(len(logits))
        return postprocess(logits)

    generator.predictor.postprocess_masks = counted
    monkeypatch.setattr(mask_generator, "MAX_CHUNK_BYTES", 5 * 4 * HEIGHT * WIDTH + 1)
    generator.generate(photograph)
    points = torch.from_numpy(generator.point_grids[0] * (WIDTH, HEIGHT)).float()
    scores = blobs((points[:, None] / torch.tensor([WIDTH, HEIGHT]) * SIDE, torch.ones(25, 1), None), True).ious
    assert sum(counts) == (scores > MANY["pred_iou_thresh"]).sum() < 75
    assert max(counts) == 5


def test_no_mask_is_good_enough(lively, photograph):
    for options in ({"pred_iou_thresh": 1.0}, {"stability_score_thresh": 2.0}, {"mask_threshold": 1e4}):
        generator = SAM2AutomaticMaskGenerator(lively[1], points_per_side=2, crop_n_layers=1, **options)
        assert without_network(generator).generate(photograph) == []


def test_one_pixel(lively):
    options = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0, "crop_n_layers": 2}
    generator = SAM2AutomaticMaskGenerator(lively[1], **options)
    found = generator.generate(np.full((1, 1, 3), 99, np.uint8))
    assert found
    for record in found:
        assert record["segmentation"].shape == (1, 1)
        assert record["area"] == record["segmentation"].sum()
        assert record["bbox"] == [0, 0, 0, 0]
        assert record["crop_box"] == [0, 0, 1, 1]


def test_pictures_of_other_kinds(lively, photograph):
    generator = SAM2AutomaticMaskGenerator(lively[1], **{**MANY, "points_per_side": 2}, output_mode="coco_rle")
    expected = generator.generate(photograph)
    assert expected
    assert generator.generate(Image.fromarray(photograph)) == expected
    assert generator.generate(np.dstack([photograph, photograph[..., :1]])) == expected
    grey = generator.generate(photograph[..., 0])
    assert grey == generator.generate(photograph[..., :1].repeat(3, 2))
    with pytest.raises(TypeError, match="image must be a NumPy array or a PIL image, got str"):
        generator.generate("photo.jpg")


def test_progress_is_told(lively, photograph):
    generator = without_network(
        SAM2AutomaticMaskGenerator(lively[1], points_per_side=3, points_per_batch=4, crop_n_layers=1)
    )
    steps = []
    generator.generate(photograph, progress=lambda *numbers: steps.append(numbers))
    assert steps == [(9 * crop + done, 45) for crop in range(5) for done in (4, 8, 9)]


def test_picture_is_forgotten(lively, photograph):
    generator = SAM2AutomaticMaskGenerator(lively[1], points_per_side=1)
    generator.generate(photograph)
    with pytest.raises(RuntimeError, match="no picture is set"):
        generator.predictor.get_image_embedding()


def test_from_pretrained_tells_options_apart(lively, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "load", lambda *name, **options: asked.append((name, options)) or lively[1])
    generator = SAM2AutomaticMaskGenerator.from_pretrained(
        "facebook/sam2.1-hiera-tiny", device="cpu", points_per_side=3
    )
    assert asked == [(("facebook/sam2.1-hiera-tiny",), {"device": "cpu"})]
    assert len(generator.point_grids[0]) == 9
    with pytest.raises(TypeError, match="point_per_side"):
        SAM2AutomaticMaskGenerator.from_pretrained("facebook/sam2.1-hiera-tiny", point_per_side=3)
    assert len(asked) == 1


BAD = {
    "both": (
        {"point_grids": [np.zeros((1, 2))]},
        ValueError,
        "exactly one of points_per_side and point_grids .* got both",
    ),
    "neither": ({"points_per_side": None}, ValueError, "exactly one of points_per_side and point_grids .* got neither"),
    "a mode": ({"output_mode": "png"}, ValueError, "output_mode must be one of binary_mask, .*, got 'png'"),
    "no points": ({"points_per_side": 0}, ValueError, "points_per_side must be at least 1, got 0"),
    "half a point": ({"points_per_side": 1.5}, TypeError, "points_per_side must be an integer, got float"),
    "no batch": ({"points_per_batch": 0}, ValueError, "points_per_batch must be at least 1, got 0"),
    "layers": ({"crop_n_layers": -1}, ValueError, "crop_n_layers must not be negative, got -1"),
    "area": ({"min_mask_region_area": -1}, ValueError, "min_mask_region_area must not be negative, got -1"),
    "overlap": ({"crop_overlap_ratio": 1.0}, ValueError, "crop_overlap_ratio must be from 0 to below 1, got 1.0"),
    "factor": ({"crop_n_points_downscale_factor": 0}, ValueError, "downscale_factor must be at least 1, got 0"),
    "too few": (
        {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        ValueError,
        "crop_n_points_downscale_factor leaves the crops without points, got 2: points_per_side is 3",
    ),
    "pixels": (
        {"points_per_side": None, "point_grids": [[[0.5, 0.5], [20, 30]]]},
        ValueError,
        r"point_grids\[0\] must be fractions from 0 to 1, got 0.5 to 30",
    ),
    "a NaN": ({"points_per_side": None, "point_grids": [[[0.5, np.nan]]]}, ValueError, "must be fractions from 0 to 1"),
    "a shape": ({"points_per_side": None, "point_grids": [[0.5, 0.5]]}, ValueError, r"must be \(P, 2\) .* got \(2,\)"),
    "an empty one": ({"points_per_side": None, "point_grids": [np.zeros((0, 2))]}, ValueError, r"got \(0, 2\)"),
    "one layer's": (
        {"points_per_side": None, "point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1},
        ValueError,
        "point_grids must have 2 grids, for the picture and each layer, got 1",
    ),
    "a word": ({"points_per_sides": 3}, TypeError, "points_per_sides"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments(lively, case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        SAM2AutomaticMaskGenerator(lively[1], **options)


@pytest.mark.parametrize("count", [0, 1, 40, 1100])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_that_of_torchvision(count, threshold):
    ops = pytest.importorskip("torchvision.ops", reason="the oracle: torchvision")
    numbers = np.random.default_rng(count)
    corners = numbers.integers(0, 30, (count, 2))
    boxes = torch.from_numpy(np.hstack([corners, corners + numbers.integers(0, 12, (count, 2))])).float()
    distinct = torch.from_numpy(numbers.permutation(count)).float()
    assert torch.equal(nms(boxes, distinct, threshold), ops.batched_nms(boxes, distinct, torch.zeros(count), threshold))
    equal = (distinct % 9) / 9
    expected = ops.nms(boxes, equal, threshold)
    assert torch.equal(nms(boxes, equal, threshold), expected)
    # From 1000 boxes on batched_nms sorts once more, and leaves the order of equal scores to chance.
    batched = ops.batched_nms(boxes, equal, torch.zeros(count), threshold)
    assert torch.equal(*((batched, expected) if count < 1000 else (batched.sort().values, expected.sort().values)))


def test_nms_next_to_its_threshold():
    """0.7 and 0.1 in float32 are less and more than what is asked for."""
    batched_nms = pytest.importorskip("torchvision.ops", reason="the oracle: torchvision").batched_nms
    for tenths in range(1, 10):
        boxes = torch.tensor([[0, 0, 10, 1], [0, 0, tenths, 1]]).float()
        scores = torch.tensor([0.5, 0.4])
        expected = batched_nms(boxes, scores, torch.zeros(2), tenths / 10)
        assert torch.equal(nms(boxes, scores, tenths / 10), expected)
