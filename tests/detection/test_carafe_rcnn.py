"""The detectors as torchvision's are used: evaluation, training, fine-tuning, odd images, dtypes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import batched_nms

from omniops import detection
from omniops.detection.heads import BoxCoder, RoIAlign, _mask_targets, classwise_nms

BUILDERS = {
    "faster": detection.faster_rcnn_resnet50_fpn_carafe,
    "mask": detection.mask_rcnn_resnet50_fpn_carafe,
}
SMALL = {
    "min_size": 44,
    "max_size": 64,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 50,
    "box_score_thresh": 0.0,  # random weights are sure of nothing
    "box_detections_per_img": 7,
    "box_batch_size_per_image": 16,
}


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_model(kind) -> detection.CARAFERCNN:
    """For tests that change nothing of it but its mode: to build one takes a second."""
    torch.manual_seed(0)
    return BUILDERS[kind](num_classes=4, **SMALL)


@pytest.fixture
def model(shared_model) -> detection.CARAFERCNN:
    torch.manual_seed(0)
    return copy.deepcopy(shared_model)


@pytest.fixture
def image(picture) -> Tensor:
    return torch.from_numpy(picture(70, 100)).permute(2, 0, 1) / 255


def _target(image: Tensor) -> dict[str, Tensor]:
    masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
    masks[0, 10:40, 20:60] = 1
    masks[1, 30:60, 5:50] = 1
    boxes = torch.tensor([[20.0, 10.0, 60.0, 40.0], [5.0, 30.0, 50.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    return {name: value.to(image.device) for name, value in target.items()}


def _check(detections: dict[str, Tensor], image: Tensor, masks: bool) -> None:
    """That these are as many well-formed detections as were asked for."""
    height, width = image.shape[1:]
    count = len(detections["scores"])
    assert count == SMALL["box_detections_per_img"]
    assert detections["boxes"].shape == (count, 4)
    assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32
    assert detections["labels"].dtype == torch.int64
    assert ((detections["labels"] >= 1) & (detections["labels"] <= 3)).all()
    assert (detections["boxes"] >= 0).all()
    assert (detections["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
    assert (detections["scores"].diff() <= 0).all()
    assert ("masks" in detections) == masks
    if masks:
        assert detections["masks"].shape == (count, 1, height, width)
        assert ((detections["masks"] >= 0) & (detections["masks"] <= 1)).all()


def test_evaluation(shared_model, kind, image):
    images = [image, image[:, :50, :31]]
    with torch.no_grad():
        for detections, input in zip(shared_model.eval()(images), images, strict=True):
            _check(detections, input, kind == "mask")


def test_evaluation_repeats_to_the_bit(shared_model, image):
    shared_model.eval()
    with torch.no_grad():
        first, second = shared_model([image])[0], shared_model([image])[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (400, 3), (64, 64)])
def test_odd_sizes(shared_model, kind, size):
    grey = torch.rand(1, *size).expand(3, -1, -1)
    with torch.no_grad():
        (detections,) = shared_model.eval()([grey])
    _check(detections, grey, kind == "mask")


def test_no_detections(kind, image):
    model = BUILDERS[kind](num_classes=4, **SMALL | {"box_score_thresh": 1.0}).eval()
    with torch.no_grad():
        (detections,) = model([image])
    assert {name: tuple(value.shape) for name, value in detections.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        **({"masks": (0, 1, 70, 100)} if kind == "mask" else {}),
    }


def test_masks_of_bits(image):
    model = detection.mask_rcnn_resnet50_fpn_carafe(num_classes=4, mask_threshold=0.5, **SMALL).eval()
    with torch.no_grad():
        (detections,) = model([image])
    assert detections["masks"].dtype == torch.bool


def _train_once(model: nn.Module, *images: Tensor) -> dict[str, Tensor]:
    losses = model.train()(list(images), [_target(image) for image in images])
    sum(losses.values()).backward()
    return losses


ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([] if ACCELERATOR is None else [ACCELERATOR])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_training_step_reaches_every_parameter(model, kind, image, device):
    losses = _train_once(model.to(device), image.to(device), image.flip(2).to(device))
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert set(losses) == (names | {"loss_mask"} if kind == "mask" else names)
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_training_step_in_bfloat16(image):
    model = detection.mask_rcnn_resnet50_fpn_carafe(num_classes=4, **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _train_once(model, image)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_training_learns(image):
    torch.manual_seed(0)
    model = detection.mask_rcnn_resnet50_fpn_carafe(num_classes=4, trainable_backbone_layers=0, **SMALL)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=3e-4)
    totals = []
    for _ in range(6):
        optimizer.zero_grad()
        losses = _train_once(model, image)
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses.values()))
    assert totals[-1] < 0.8 * totals[0]


def test_training_without_any_object(model, image):
    height, width = image.shape[1:]
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, height, width),
    }
    losses = model.train()([image], [nothing])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 3], ValueError, r"targets\[0\]\['labels'\] must be from 1 to 3, got \[0, 3\]"),
        ([1, 4], ValueError, "must be from 1 to 3"),
        ([1.0, 2.0], TypeError, "must be int64, got torch.float32"),
    ],
)
def test_wrong_labels_are_named(shared_model, image, labels, error, message):
    with pytest.raises(error, match=message):
        shared_model.train()([image], [_target(image) | {"labels": torch.tensor(labels)}])


def _boxes(*rows):
    return {"boxes": torch.tensor(rows)}


WRONG_TARGETS = {
    "no width": (
        _boxes([20.0, 10, 60, 40], [5, 30, 5, 60]),
        r"\['boxes'\] must be finite.*got \[5.0, 30.0, 5.0, 60.0\]",
    ),
    "no height": (_boxes([20.0, 10, 60, 10], [5, 30, 50, 60]), r"x1 < x2 and y1 < y2, got \[20.0, 10.0, 60.0, 10.0\]"),
    "inside out": (_boxes([60.0, 10, 20, 40], [5, 30, 50, 60]), "x1 < x2 and y1 < y2, got .* as box 0"),
    "NaN": (_boxes([20.0, 10, torch.nan, 40], [5, 30, 50, 60]), r"must be finite.*got \[20.0, 10.0, nan, 40.0\]"),
    "infinity": (_boxes([20.0, 10, 60, 40], [5, 30, torch.inf, 60]), r"must be finite.*inf, 60.0\] as box 1"),
    "three numbers": ({"boxes": torch.ones(2, 3)}, r"\['boxes'\] must be \(N, 4\), got \(2, 3\)"),
    "one box": ({"boxes": torch.tensor([1.0, 2, 3, 4])}, r"\['boxes'\] must be \(N, 4\), got \(4,\)"),
    "a label too few": ({"labels": torch.tensor([1])}, r"\['labels'\] must be \(2,\), one for each.*got \(1,\)"),
    "labels of two axes": ({"labels": torch.tensor([[1], [3]])}, r"\['labels'\] must be \(2,\).*got \(2, 1\)"),
    "0": ({"labels": torch.tensor([0, 3])}, r"\['labels'\] must be from 1 to 3, got \[0, 3\]"),
    "a class too many": ({"labels": torch.tensor([1, 4])}, r"\['labels'\] must be from 1 to 3, got \[1, 4\]"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_targets_are_named(shared_model, image, case):
    change, message = WRONG_TARGETS[case]
    right = _target(image)
    with pytest.raises(ValueError, match=r"targets\[1\].*" + message):
        shared_model.train()([image, image], [right, right | change])


def test_a_box_whose_width_is_rounded_away(shared_model, image):
    left = 102 + torch.arange(2000) * 2.0**-17
    right = left.nextafter(torch.tensor(torch.inf))
    lost = (left * 0.63 == right * 0.63).nonzero()[0, 0]  # 0.63: by which the image is resized
    boxes = torch.tensor([[20, 10, 60, 40], [left[lost], 30, right[lost], 60]])
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\] must be .* x1 < x2 and y1 < y2, got .* as box 1"):
        shared_model.train()([image], [_target(image) | {"boxes": boxes}])


MASKS = {
    "a mask too few": (lambda masks: masks[:1], r"\['masks'\] must be \(2, 70, 100\).*got \(1, 70, 100\)"),
    "another size": (lambda masks: masks[:, 1:], r"\['masks'\] must be \(2, 70, 100\).*got \(2, 69, 100\)"),
    "0 and 255": (lambda masks: masks * 255, r"\['masks'\] must be of 0 and 1, or of bool"),
    "probabilities": (lambda masks: masks * 0.7, r"\['masks'\] must be of 0 and 1, or of bool"),
    "NaN": (lambda masks: masks / 0, r"\['masks'\] must be of 0 and 1, or of bool"),
}


@pytest.mark.parametrize("case", MASKS)
def test_wrong_masks_are_named(image, case):
    change, message = MASKS[case]
    model = detection.mask_rcnn_resnet50_fpn_carafe(num_classes=4, **SMALL).train()
    right = _target(image)
    with pytest.raises(ValueError, match=r"targets\[1\]" + message):
        model([image, image], [right, right | {"masks": change(right["masks"])}])


def test_targets_that_are_none(shared_model, kind, image):
    right = _target(image)
    names = "boxes, labels, masks" if kind == "mask" else "boxes, labels"
    shared_model.train()
    with pytest.raises(ValueError, match=f"targets must be given in training: for each image a dict of {names}"):
        shared_model([image])
    with pytest.raises(ValueError, match="targets must be one for each of 2 images, got 1"):
        shared_model([image, image], [right])
    with pytest.raises(ValueError, match=rf"targets\[0\] must have {names}, got boxes"):
        shared_model([image], [{"boxes": right["boxes"]}])
    with pytest.raises(TypeError, match=r"targets\[0\] must be a dict, got Tensor"):
        shared_model([image], [right["boxes"]])
    with pytest.raises(TypeError, match="targets must be a list of dicts, one for each image, got dict"):
        shared_model([image], right)
    for boxes in (right["boxes"] > 0, right["boxes"] + 1j):
        with pytest.raises(TypeError, match=rf"targets\[0\]\['boxes'\] must be of real numbers, got {boxes.dtype}"):
            shared_model([image], [right | {"boxes": boxes}])
    with pytest.raises(TypeError, match=r"targets\[0\]\['boxes'\] must be a tensor, got list"):
        shared_model([image], [right | {"boxes": right["boxes"].tolist()}])
    with pytest.raises(TypeError, match=r"images\[0\] must be a tensor \(3, H, W\) in \[0, 1\], got ndarray"):
        shared_model([image.numpy()], [right])


@pytest.mark.parametrize("training", [False, True])
def test_wrong_images_are_named(shared_model, image, training):
    shared_model.train(training)
    targets = [_target(image)] * 2 if training else None
    for wrong, message in ((image * 255, "got 0 to 25.*: divide it by 255"), (image / 0, "got NaN in")):
        with pytest.raises(ValueError, match=r"images\[1\] must be in \[0, 1\], " + message):
            shared_model([image, wrong], targets)


NO_IMAGES = {
    "PIL's": (lambda image: [Image.new("RGB", (9, 9))], TypeError, r"images\[0\] must be a tensor .*, got Image"),
    "an array": (lambda image: [image.numpy()], TypeError, r"images\[0\] must be a tensor .*, got ndarray"),
    "bytes": (
        lambda image: [image.byte()],
        TypeError,
        r"images\[0\] must be floating point in \[0, 1\], got torch.uint8",
    ),
    "bool": (lambda image: [image > 0.5], TypeError, r"images\[0\] must be floating point in \[0, 1\], got torch.bool"),
    "one axis": (
        lambda image: [image[0, 0]],
        ValueError,
        r"images\[0\] must be \(3, H, W\) and not empty, got \(100,\)",
    ),
    "no axis": (lambda image: [image[0, 0, 0]], ValueError, r"images\[0\] must be \(3, H, W\) and not empty, got \(\)"),
    "grey": (
        lambda image: [image[:1]],
        ValueError,
        r"images\[0\] must be \(3, H, W\) and not empty, got \(1, 70, 100\)",
    ),
    "no pixels": (lambda image: [image[:, :0]], ValueError, r"images\[0\] must be \(3, H, W\) and not empty"),
    "one image": (lambda image: image, ValueError, r"images must be a list of tensors .* got a tensor \(3, 70, 100\)"),
    "none": (lambda image: [], ValueError, "images must hold at least one image"),
    "None": (lambda image: None, TypeError, "images must be a list of tensors .* got NoneType"),
    "a generator": (lambda image: iter([image]), TypeError, "images must be a list of tensors .* got list_iterator"),
    "a dict": (lambda image: {"image": image}, TypeError, "images must be a list of tensors .* got dict"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NO_IMAGES)
def test_images_that_are_none(shared_model, image, case, training):
    wrong, error, message = NO_IMAGES[case]
    with pytest.raises(error, match=message):
        shared_model.train(training)(wrong(image), [_target(image)] if training else None)


def test_a_batch_is_a_list(shared_model, image):
    found, expected = (shared_model.eval()(images) for images in (torch.stack([image, image]), [image, image]))
    assert len(found) == 2
    assert torch.equal(found[1]["boxes"], expected[1]["boxes"])


def test_bfloat16(model, kind, image):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (mixed,) = model.eval()([image])
    _check(mixed, image, kind == "mask")
    with torch.no_grad():
        (detections,) = model.bfloat16()([image.bfloat16()])
    _check(detections, image, kind == "mask")


def test_what_trains():
    def frozen(model: nn.Module) -> set[str]:
        return {name.split(".")[2] for name, value in model.named_parameters() if not value.requires_grad}

    build = detection.faster_rcnn_resnet50_fpn_carafe
    assert frozen(build()) == set()
    assert frozen(build(trainable_backbone_layers=3)) == {"conv1", "bn1", "layer1"}
    assert frozen(build(trainable_backbone_layers=0)) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    with pytest.raises(ValueError, match="trainable_backbone_layers must be between 0 and 5, got 6"):
        build(trainable_backbone_layers=6)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        build(num_classes=1)
    with pytest.raises(TypeError, match="num_classes must be an int, got '3'"):
        build(num_classes="3")


@pytest.mark.parametrize("trained", [False, True])
def test_loaded_models_keep_the_statistics_of_their_normalisations(tmp_path, image, trained):
    build = detection.faster_rcnn_resnet50_fpn_carafe
    path = tmp_path / "model.pth"
    torch.save(build(num_classes=4).state_dict(), path)
    model = build(path if trained else None, num_classes=4, **SMALL)
    before = model.backbone.body.bn1.running_mean.clone()
    model.train()([image], [_target(image)])
    assert torch.equal(model.backbone.body.bn1.running_mean, before) == trained


def test_torchvisions_way_to_other_classes(model, kind, image):
    model.roi_heads.box_predictor = FastRCNNPredictor(1024, 9)
    if kind == "mask":
        model.roi_heads.mask_predictor = detection.CARAFEMaskPredictor(256, 9)
    losses = model.train()([image], [_target(image) | {"labels": torch.tensor([8, 7])}])
    assert all(loss.isfinite() for loss in losses.values())


def test_cocos_categories():
    assert len(detection.COCO_CATEGORIES) == len(detection.COCO_CATEGORY_IDS) == 81
    assert detection.COCO_CATEGORIES[:4] == ("__background__", "person", "bicycle", "car")
    assert detection.COCO_CATEGORIES[80] == "toothbrush"
    assert detection.COCO_CATEGORY_IDS[:13] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    assert detection.COCO_CATEGORY_IDS[80] == 90


def test_boxes_are_decoded_to_what_was_encoded():
    boxes = torch.tensor([[3.0, 4.0, 50.0, 60.0], [0.0, 0.0, 7.0, 9.0]])
    others = torch.tensor([[5.0, 1.0, 40.0, 90.0], [1.0, 1.0, 6.0, 12.0]])
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    codes = coder.encode([boxes], [others])[0]
    torch.testing.assert_close(coder.decode(codes, [others])[:, 0], boxes)


@pytest.mark.parametrize("count", [0, 1, 300, 10001])
def test_classwise_nms(count):
    torch.manual_seed(0)
    corners = torch.rand(count, 2) * 300
    boxes = torch.cat([corners, corners + 1 + 40 * torch.rand(count, 2)], dim=1)
    scores, classes = torch.rand(count), torch.randint(0, 5, (count,))
    assert torch.equal(classwise_nms(boxes, scores, classes, 0.5), batched_nms(boxes, scores, classes, 0.5))


def test_a_box_is_pooled_from_the_level_of_its_size():
    features = {str(level): torch.full((1, 1, 512 >> level, 512 >> level), float(level)) for level in range(4)}
    sides = torch.tensor([0.0, 20.0, 111.9, 112.0, 223.0, 224.0, 447.0, 448.0, 1500.0])
    boxes = torch.stack([torch.full_like(sides, 8.0)] * 2 + [8 + sides] * 2, dim=1)
    pooled = RoIAlign(2)(features, [boxes])
    assert pooled.amax(dim=(1, 2, 3)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_what_a_box_should_see_of_a_mask():
    mask = torch.zeros(1, 8, 8)
    mask[0, :, 4:] = 1
    boxes = torch.tensor([[2.0, 0.0, 6.0, 8.0], [4.0, 0.0, 8.0, 8.0]])
    targets = _mask_targets(mask, boxes, torch.tensor([0, 0]), 4)
    assert targets[0].tolist() == [[0, 0, 1, 1]] * 4
    assert targets[1].tolist() == [[1, 1, 1, 1]] * 4


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_torchvision_is_not_imported_with_the_package():
    result = _run("import sys, omniops; assert 'torchvision' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_without_torchvision_the_error_says_how_to_get_it():
    result = _run("import sys; sys.modules['torchvision'] = None; import omniops.detection")
    assert "ImportError: omniops.detection needs a torchvision" in result.stderr
    assert "pip install 'omniops[detect]'" in result.stderr
