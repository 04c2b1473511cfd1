"""The detectors' parts: by themselves and as files they find what the detectors find, in images of any size."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_detectors import build

from omniops import export
from omniops.export import detection

SIZES = ((90, 120), (33, 200), (150, 101))
"""The first is exported. The others are made smaller or larger, and padded to other numbers of pixels."""
TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-3
"""Of masks, whose pixels are taken from features in float16; boxes and scores agree ten times better."""
OPENVINO_TOLERANCE = 1e-3
"""It has float32 for float64: a pixel of a resized image may differ by one of 255."""


def small_detector(masks, **settings):
    """One whose boxes move and whose scores differ, so that there is something to suppress and to choose."""
    torch.manual_seed(0)
    model = build(masks, num_classes=5, **{"box_score_thresh": 0.1, **settings}).eval()
    with torch.no_grad():
        for layer in (
            model.rpn.head.bbox_pred,
            model.roi_heads.box_predictor.cls_score,
            model.roi_heads.box_predictor.bbox_pred,
        ):
            layer.weight *= 20
        if masks:
            model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 5
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["faster", "mask"])
def model(request):
    return small_detector(request.param)


@pytest.fixture(scope="module")
def part(model):
    (part,) = detection.parts(model, size=SIZES[0])
    return part


def image_of(size):
    """(3, H, W): waves, and rectangles of one colour each."""
    height, width = size
    random = torch.Generator().manual_seed(7)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, 0.5 + 0.4 * (40 * x * y + 9 * y).sin()])
    for _ in range(30):
        cy, cx, ry, rx, *colour = torch.rand(7, generator=random).tolist()
        inside = ((y - cy).abs() < ry / 5) & ((x - cx).abs() < rx / 5)
        image = torch.where(inside, torch.tensor(colour)[:, None, None], image)
    return (image + 0.02 * torch.randn(image.shape, generator=random)).clamp(0, 1)


def check(model, part, run, image, tolerance=TOLERANCE):
    """Boxes in the scale of the image, probabilities in that of 1."""
    with torch.no_grad():
        (expected,) = model([image])
    found = dict(zip(part.output_names, run([image]), strict=True))
    assert found.keys() == expected.keys()
    assert len(expected["scores"]) > 3
    for name, scale in (("scores", 1), ("boxes", max(image.shape)), ("masks", 1)):
        if name in expected:
            assert found[name].shape == expected[name].shape
            assert (found[name] - expected[name]).abs().max() <= tolerance * scale, name
    # The tolerance leaves the order of equal scores open, and no two are here.
    assert torch.equal(found["labels"], expected["labels"])


def run_module(part):
    def run(inputs):
        with torch.no_grad():
            return part.module(*inputs)

    return run


def test_the_part_finds_what_the_detector_finds(model, part):
    for size in SIZES:
        check(model, part, run_module(part), image_of(size), 1e-6)


def test_the_part_resizes_in_the_detectors_arithmetic(model, part):
    for size in (*SIZES, (64, 64), (7, 3), (1, 500)):
        image = image_of(size)
        expected, _ = model.transform([image])
        assert torch.equal(part.module._batch(image, part.module._sizes(image)), expected.tensors)


def test_a_part_of_one_size_finds_the_same(model):
    for settings in ({}, {"box_score_thresh": 0.3}):
        model = small_detector(model.roi_heads.has_mask(), **settings)
        (part,) = detection.parts(model, dynamic=False, size=SIZES[0])
        assert part.dynamic_shapes is None
        check(model, part, run_module(part), image_of(SIZES[0]), 1e-6)


def test_masks_are_pasted_as_the_detector_does():
    model = small_detector(True, mask_threshold=0.5, box_score_thresh=0.05)
    (part,) = detection.parts(model)
    image = image_of(SIZES[2])
    with torch.no_grad():
        (expected,) = model([image])
        *_, masks = part.module(image)
    assert masks.dtype == torch.bool
    assert 0.01 < masks.float().mean() < 0.99
    # The last digit decides where a pixel is at the threshold.
    assert (masks != expected["masks"]).float().mean() < 1e-5
    assert "masks: bool (N, 1, H, W), the mask of each pixel" in part.description


def test_an_image_without_objects_gives_empty_results():
    for masks in (False, True):
        (part,) = detection.parts(small_detector(masks, box_score_thresh=0.999))
        boxes, labels, scores, *others = run_module(part)([image_of(SIZES[0])])
        assert (boxes.shape, labels.shape, scores.shape) == ((0, 4), (0,), (0,))
        assert [mask.shape for mask in others] == ([(0, 1, *SIZES[0])] if masks else [])


def test_half_computes_boxes_in_float32(model, part):
    half = part.half()
    assert half.module.dtype == torch.float16
    found = run_module(half)([image_of(SIZES[0])])
    assert found[0].dtype == found[2].dtype == torch.float32
    assert part.module.dtype == torch.float32


def test_descriptions_name_every_input_and_output(part):
    inputs, outputs = part.description.partition("Inputs:\n")[2].split("Outputs:\n")
    assert [line.split(":")[0] for line in inputs.splitlines()] == list(part.input_names)
    assert [line.split(":")[0] for line in outputs.splitlines()] == list(part.output_names)


def test_a_model_that_cannot_be_written_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be a detector of omniops\.detection, got Linear"):
        detection.parts(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must be in float32 on the CPU, got torch\.float16 on cpu"):
        detection.parts(small_detector(False).half())
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        detection.parts(small_detector(False).train())
    with pytest.raises(ValueError, match=r"size must be a height and a width of at least 2 pixels, got \(1, 64\)"):
        detection.parts(model, size=(1, 64))


def written_and_loaded(part, path, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = export.write_part(part, path, **options)
    assert not [warning for warning in caught if "create_unbacked_symint" in str(warning.message)]
    return export.load(written)


@pytest.mark.slow
def test_onnx_files_take_images_of_any_size(model, part, tmp_path):
    run = written_and_loaded(part, tmp_path / "detector.onnx")
    for size in SIZES:
        check(model, part, run, image_of(size))


@pytest.mark.slow
def test_openvino_files_take_images_of_any_size(tmp_path):
    model = small_detector(True)
    (part,) = detection.parts(model, size=SIZES[0])
    run = written_and_loaded(part, tmp_path / "detector.xml")
    for size in SIZES:
        check(model, part, run, image_of(size), OPENVINO_TOLERANCE)


@pytest.mark.slow
def test_aoti_files_take_images_of_one_size(tmp_path):
    model = small_detector(True)
    (part,) = detection.parts(model, dynamic=False, size=SIZES[0])
    run = written_and_loaded(part, tmp_path / "detector.pt2")
    check(model, part, run, image_of(SIZES[0]))


@pytest.mark.slow
def test_aoti_refuses_images_of_any_size(tmp_path):
    (part,) = detection.parts(small_detector(False), size=SIZES[0])
    with pytest.raises(export.ExportError, match="write the model for one size"):
        export.write_part(part, tmp_path / "detector.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchscript_files_take_images_of_any_size(tmp_path):
    model = small_detector(True)
    (part,) = detection.parts(model, size=SIZES[0])
    run = written_and_loaded(part, tmp_path / "detector.pt")
    for size in SIZES:
        check(model, part, run, image_of(size))


@pytest.mark.slow
def test_onnx_files_find_nothing_and_compute_in_float16(tmp_path):
    """Of the exported size: where boxes overlap as much as is allowed, half precision may keep others of them."""
    model = small_detector(True, box_score_thresh=0.05)
    (part,) = detection.parts(model, size=SIZES[0])
    run = written_and_loaded(part, tmp_path / "half.onnx", half=True)
    check(model, part, run, image_of(SIZES[0]), HALF_TOLERANCE)
