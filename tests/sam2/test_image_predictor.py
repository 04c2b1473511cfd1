"""The image predictor against the official package's, and with pictures and prompts of every kind."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from one_thread import one_thread as one_thread
from PIL import Image

from omniops import connected_components
from omniops.sam2 import SAM2ImagePredictor
from omniops.sam2.architectures import cast
from omniops.sam2.modeling.sam2 import normalize
from omniops.sam2.transforms import resize, to_rgb
from omniops.sam2.upsampling import guided

SIDE = 128


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Blobs, edges and noise, (H, W, 3) in uint8: as wide as no network is."""
    y, x = np.mgrid[:150, :211]
    disc = ((x - 60) ** 2 + (y - 80) ** 2 < 1500)[..., None] * np.array([200, 40, 90])
    stripes = ((x // 9 % 2) * 60)[..., None] + np.array([10, 30, 50])
    noise = np.random.default_rng(0).integers(0, 40, (150, 211, 3))
    return (disc + stripes + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def predictors(twins, photograph):
    """The two predictors with the photograph set."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor as Official

    official, ours = twins(image_size=SIDE)
    pair = Official(official), SAM2ImagePredictor(ours)
    pair[0]._bb_feat_sizes = [(SIDE // stride,) * 2 for stride in (4, 8, 16)]  # fixed there for 1024
    for predictor in pair:
        predictor.set_image(photograph)
    return pair


def assert_alike(found, expected):
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())


LOW = np.random.default_rng(1).normal(0, 8, (1, SIDE // 4, SIDE // 4)).astype(np.float32)
PROMPTS = {
    "a point": {"point_coords": np.array([[60, 80]]), "point_labels": np.array([1])},
    "points": {"point_coords": [[60.5, 80.25], [5, 140]], "point_labels": [1, 0]},
    "points of three prompts": {"point_coords": [[[60, 80]], [[5, 5]], [[200, 10]]], "point_labels": [[1], [1], [1]]},
    "fractions": {"point_coords": [[0.25, 0.5]], "point_labels": [1], "normalize_coords": False},
    "a point outside": {"point_coords": [[-20, 400]], "point_labels": [1]},
    "a box": {"box": np.array([20, 40, 100, 120])},
    "boxes": {"box": np.array([[20, 40, 100, 120], [0, 0, 211, 150]])},
    "a box and a point": {"box": [20, 40, 100, 120], "point_coords": [[50, 60]], "point_labels": [0]},
    "a mask": {"mask_input": LOW},
    "a mask and a point": {"mask_input": LOW, "point_coords": [[60, 80]], "point_labels": [1]},
    "nothing": {},
}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_predictions_are_the_official_ones(predictors, prompt, multimask):
    official, ours = predictors
    expected = official.predict(**PROMPTS[prompt], multimask_output=multimask, return_logits=True)
    assert expected[0].std() > 0
    assert_alike(ours.predict(**PROMPTS[prompt], multimask_output=multimask, return_logits=True), expected)
    (masks, *rest), right = (
        predictor.predict(**PROMPTS[prompt], multimask_output=multimask) for predictor in predictors[::-1]
    )
    logits = ours.predict(**PROMPTS[prompt], multimask_output=multimask, return_logits=True)[0]
    assert np.array_equal(masks, logits > 0)
    assert masks.shape == right[0].shape
    for found, expected in zip((masks, *rest), right, strict=True):
        assert type(found) is type(expected)
        assert found.dtype == expected.dtype == np.float32
        assert found.flags.writeable
        assert found.flags.c_contiguous == expected.flags.c_contiguous


def test_masks_are_numbers_to_compute_with(predictors):
    """What bool refuses, or gives other values of: as scripts for the official predictor do."""
    cv2 = pytest.importorskip("cv2", reason="what resizes masks")
    _, ours = predictors
    masks, scores, _ = ours.predict([[60, 80]], [1])
    assert cv2.resize(masks[0], (20, 10)).shape == (10, 20)
    assert set(np.unique(masks[0] - masks[1])) <= {-1, 0, 1}
    color = np.array([0.1, 0.2, 0.3, 0.6])
    assert (masks[0].reshape(150, 211, 1) * color).max() == 0.6
    assert masks[scores.argsort()[::-1]].shape == masks.shape
    masks *= 255
    assert set(np.unique(masks)) == {0, 255}


def test_the_embedding_is_the_official_one(predictors):
    official, ours = (predictor.get_image_embedding() for predictor in predictors)
    assert ours.shape == official.shape
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-3 * official.abs().max().item())


LARGE = pytest.param("large", "2.1", marks=pytest.mark.slow)  # modeling/test_modules.py compares its encoder too


@pytest.mark.parametrize(
    ("size", "version"), [("tiny", "2.0"), ("tiny", "2.1"), ("small", "2.1"), ("base-plus", "2.0"), LARGE]
)
def test_every_model_is_the_official_one(twins, photograph, size, version):
    from sam2.sam2_image_predictor import SAM2ImagePredictor as OfficialPredictor

    official, ours = twins(size=size, version=version, image_size=64)
    pixels = normalize(resize(to_rgb(photograph), 64, torch.device("cpu"))[None])
    with torch.inference_mode():
        expected = official.forward_image(pixels)["backbone_fpn"]
        found = ours.forward_image(pixels)
        for ours_here, theirs in zip((*found.high_res_feats, found.image_embed), expected, strict=True):
            torch.testing.assert_close(ours_here, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())
    # Behind the encoder all sizes are of the same width, in videos too.
    pair = OfficialPredictor(official), SAM2ImagePredictor(ours)
    pair[0]._bb_feat_sizes = [(16, 16), (8, 8), (4, 4)]
    predicted = []
    for predictor in pair:
        predictor.set_image(photograph)
        predicted.append(predictor.predict([[60, 80]], [1], return_logits=True))
    assert_alike(predicted[1], predicted[0])


def test_batches_are_the_official_ones(predictors, photograph):
    pictures = [photograph, photograph[:90, :70].copy(), photograph[::-1].copy()]
    prompts = {
        "point_coords_batch": [np.array([[60, 80]]), np.array([[5.0, 6], [30, 40]]), None],
        "point_labels_batch": [np.array([1]), np.array([1, 0]), None],
        "box_batch": [None, None, np.array([10, 20, 90, 100])],
    }
    results = []
    for predictor in predictors:
        predictor.set_image_batch(pictures)
        results.append(predictor.predict_batch(**prompts, return_logits=True))
    for found, expected in zip(zip(*results[1], strict=True), zip(*results[0], strict=True), strict=True):
        assert_alike(found, expected)
    binary = [predictor.predict_batch(**prompts) for predictor in predictors]
    for found, expected in zip(*binary, strict=True):
        assert type(found) is type(expected) is list
        assert [result.dtype for result in found] == [result.dtype for result in expected] == [np.float32] * 3
    for mask, logits in zip(binary[1][0], results[1][0], strict=True):
        assert np.array_equal(mask, logits > 0)


def test_small_holes_and_specks_go_as_in_the_official_one(twins, photograph):
    from sam2.sam2_image_predictor import SAM2ImagePredictor as Official

    from omniops import dropin

    official, ours = twins(image_size=SIDE)
    limits = {"max_hole_area": 4, "max_sprinkle_area": 6, "mask_threshold": 0.25}
    dropin.enable("sam2")
    try:
        theirs = Official(official, **limits)
        theirs._bb_feat_sizes = [(SIDE // stride,) * 2 for stride in (4, 8, 16)]
        theirs.set_image(photograph)
        mended, plain = SAM2ImagePredictor(ours, **limits), SAM2ImagePredictor(ours, mask_threshold=0.25)
        for predictor in (mended, plain):
            predictor.set_image(photograph)
        # Noise for a mask is what holes and specks come from.
        logits = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (1, 3, 32, 32))).float()
        expected = theirs._transforms.postprocess_masks(logits, (150, 211))
        found = mended.postprocess_masks(logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(found, plain.postprocess_masks(logits), atol=1)
    finally:
        dropin.disable("sam2")


def test_no_small_hole_is_left(twins, photograph):
    _, ours = twins(image_size=SIDE)
    predictor = SAM2ImagePredictor(ours, max_hole_area=9)
    predictor.set_image(photograph[:32, :32])  # of the size of the masks, which are not resized
    logits = torch.from_numpy(np.random.default_rng(3).normal(1, 2, (1, 1, 32, 32))).float()
    _, areas = connected_components(predictor.postprocess_masks(logits) <= 0)
    assert not ((areas > 0) & (areas <= 9)).any()
    _, before = connected_components(logits <= 0)
    assert ((before > 0) & (before <= 9)).any()


def test_masks_are_upsampled_along_the_edges_of_the_picture(twins, photograph):
    _, ours = twins(image_size=SIDE)
    guide = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
    predictor, plain = SAM2ImagePredictor(ours, upsampling="guided"), SAM2ImagePredictor(ours)
    results = []
    for either in (predictor, plain):
        either.set_image(photograph)
        results.append(either.predict([[60, 80]], [1], return_logits=True))
    (masks, scores, low), (others, same_scores, same_low) = results
    assert masks.shape == others.shape
    assert not np.allclose(masks, others, atol=0.01 * np.abs(others).max())
    assert np.array_equal(scores, same_scores)
    assert np.array_equal(low, same_low)
    expected = guided(torch.from_numpy(low)[None], guide, (150, 211))[0]  # no logit here is beyond 32
    torch.testing.assert_close(torch.from_numpy(masks), expected)
    with pytest.raises(ValueError, match="upsampling must be bilinear or guided, got 'bicubic'"):
        SAM2ImagePredictor(ours, upsampling="bicubic")


KINDS = {
    "grey": lambda rgb: rgb[..., 0],
    "grey with an axis": lambda rgb: rgb[..., :1],
    "RGBA": lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 7, np.uint8)]),
    "uint16": lambda rgb: rgb.astype(np.uint16) * 257,
    "float32": lambda rgb: (rgb / 255).astype(np.float32),
    "float64": lambda rgb: rgb / 255,
    "float16": lambda rgb: (rgb / 255).astype(np.float16),
    "columns first in memory": np.asfortranarray,
    "mirrored twice": lambda rgb: rgb[:, ::-1].copy()[:, ::-1],
    "PIL": Image.fromarray,
    "PIL's palette": lambda rgb: Image.fromarray(rgb).convert("RGBA").convert("P"),
    "PIL's grey": lambda rgb: Image.fromarray(rgb[..., 0]),
    "PIL's 16 bits": lambda rgb: Image.fromarray(rgb[..., 0].astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(photograph, kind):
    image = KINDS[kind](photograph)
    expected = photograph
    if kind == "PIL's palette":
        expected = np.asarray(image.convert("RGB"))
    elif "grey" in kind or "16 bits" in kind:
        expected = photograph[..., :1].repeat(3, 2)
    found, expected = (resize(to_rgb(pixels), 64, torch.device("cpu")) for pixels in (image, expected))
    assert found.shape == (3, 64, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if kind == "float16" else 1e-6)


def test_png_of_16_bits(photograph):
    """As PIL opens it: no two versions give it the same mode."""
    file = io.BytesIO()
    Image.fromarray(photograph[..., 0].astype(np.uint16) * 257).save(file, "png")
    found = resize(to_rgb(Image.open(file)), 64, torch.device("cpu"))
    expected = resize(to_rgb(photograph[..., 0]), 64, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_one_pixel(twins):
    predictor = SAM2ImagePredictor(twins(image_size=SIDE)[1])
    predictor.set_image(np.full((1, 1, 3), 200, np.uint8))
    masks, scores, _ = predictor.predict([[0, 0]], [1])
    assert masks.shape == (3, 1, 1)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["a point", "a box", "a mask and a point"])
def test_half_precision(predictors, photograph, case, dtype):
    """Logits and scores as nearly as that is."""
    prompts = PROMPTS[case]
    half = SAM2ImagePredictor(cast(copy.deepcopy(predictors[1].model), dtype))
    half.set_image(photograph)
    found, expected = (predictor.predict(**prompts, return_logits=True) for predictor in (half, predictors[1]))
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, exact, rtol=0, atol=0.05 * np.abs(exact).max())


BAD_PICTURES = {
    "a path": ("photo.jpg", TypeError, "image must be a NumPy array or a PIL image, got str"),
    "integers": (np.zeros((4, 4, 3), np.int64), TypeError, "uint8, uint16 or floating, got int64"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), ValueError, r"got \(4, 4, 2\)"),
    "channels first": (np.zeros((3, 40, 50), np.uint8), ValueError, r"got \(3, 40, 50\)"),
    "no pixel": (np.zeros((0, 4, 3), np.uint8), ValueError, "must not be empty"),
    "0 to 255 in float": (np.full((4, 4, 3), 255.0), ValueError, "must be from 0 to 1, got 255 to 255"),
    "NaN": (np.full((4, 4, 3), np.nan), ValueError, "must be from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures(twins, case):
    picture, error, words = BAD_PICTURES[case]
    with pytest.raises(error, match=words):
        SAM2ImagePredictor(twins(image_size=SIDE)[1]).set_image(picture)


BAD_PROMPTS = {
    "points without labels": ({"point_coords": [[1, 2]]}, "given together"),
    "labels without points": ({"point_labels": [1]}, "given together"),
    "points of three numbers": ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"\(P, 2\) or \(B, P, 2\)"),
    "a label too many": ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"must be \(1,\) as point_coords"),
    "another label": ({"point_coords": [[1, 2]], "point_labels": [5]}, r"must be 1 \(object\) or 0"),
    "no number": ({"point_coords": [[1, float("nan")]], "point_labels": [1]}, "finite"),
    "a box of three": ({"box": [1, 2, 3]}, r"box must be \(4\) or \(B, 4\), got \(3,\)"),
    "a box inside out": ({"box": [100, 20, 30, 120]}, "x0 <= x1"),
    "two boxes, three points": (
        {"box": [[1, 2, 3, 4]] * 2, "point_coords": [[[1, 2]]] * 3, "point_labels": [[1]] * 3},
        r"one number of prompts, got \[2, 3\]",
    ),
    "no box": ({"box": np.zeros((0, 4))}, "point_coords, box and mask_input must hold a prompt or more, got none"),
    "no points": (
        {"point_coords": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))},
        "a prompt or more, got none",
    ),
    "a mask that is no number": ({"mask_input": np.full((1, 32, 32), np.nan)}, "mask_input must be finite"),
    "a mask of another size": ({"mask_input": np.zeros((1, 50, 50))}, r"\(1, 32, 32\)"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(predictors, case):
    prompt, words = BAD_PROMPTS[case]
    with pytest.raises(ValueError, match=words):
        predictors[1].predict(**prompt)


def test_a_model_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"sam_model must be a SAM2Base, got str: pass what omniops\.sam2\.load"):
        SAM2ImagePredictor("tiny")


def test_order_of_calls(twins, photograph):
    predictor = SAM2ImagePredictor(twins(image_size=SIDE)[1])
    with pytest.raises(RuntimeError, match="call set_image"):
        predictor.predict([[1, 2]], [1])
    with pytest.raises(RuntimeError, match="call set_image"):
        predictor.get_image_embedding()
    predictor.set_image(photograph)
    with pytest.raises(RuntimeError, match="call set_image_batch"):
        predictor.predict_batch()
    predictor.set_image_batch([photograph])
    with pytest.raises(RuntimeError, match="predict_batch"):
        predictor.predict([[1, 2]], [1])
    with pytest.raises(ValueError, match="box_batch must have one entry for each of 1 pictures, got 2"):
        predictor.predict_batch(box_batch=[None, None])
    predictor.reset_predictor()
    with pytest.raises(RuntimeError, match="call set_image"):
        predictor.predict([[1, 2]], [1])
    with pytest.raises(ValueError, match="image_list must not be empty"):
        predictor.set_image_batch([])
    with pytest.raises(TypeError, match="image_list must be a list"):
        predictor.set_image_batch(photograph)
