"""Resizing as OpenCV does, sizes, padding, targets, and the pasting of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops.detection.inputs import require_values
from omniops.detection.transform import Transform, paste_masks, resize_bilinear


def _transform(min_size: object = 64, max_size: int = 96) -> Transform:
    return Transform(min_size, max_size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((500, 700), (800, 1120)),
        ((427, 640), (800, 1199)),
        ((480, 360), (240, 180)),  # exactly half, where OpenCV averages
        ((600, 901), (223, 335)),
        ((3, 300), (4, 444)),
        ((1, 1), (80, 80)),
        ((1, 50), (1, 33)),
        ((64, 64), (64, 64)),
    ],
)
def test_resizing_is_opencvs(picture, old, new):
    cv2 = pytest.importorskip("cv2", reason="the oracle of resizing")
    image = picture(*old)
    expected = cv2.resize(image, new[::-1])
    result = resize_bilinear(torch.from_numpy(image).permute(2, 0, 1).float(), new)
    assert np.array_equal(result.permute(1, 2, 0).numpy(), expected.reshape(*new, 3))


def test_a_needed_gradient_goes_through_the_resizing():
    image = torch.rand(3, 20, 30, requires_grad=True)
    batch, _ = _transform().eval()([image])
    batch.tensors.sum().backward()
    assert image.grad.isfinite().all()
    assert (image.grad != 0).any()


def test_values_are_exactly_8_bits_however_they_come(picture):
    image = torch.from_numpy(picture(31, 47)).permute(2, 0, 1)
    transform = _transform().eval()
    from_float, from_double = (
        transform([image.to(dtype) / 255])[0].tensors for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(from_float, from_double.float())


@pytest.mark.parametrize(
    ("size", "resized"),
    [((100, 150), (64, 96)), ((100, 100), (64, 64)), ((10, 1000), (1, 96)), ((1, 5000), (1, 96)), ((1, 1), (64, 64))],
)
def test_sizes_are_rounded_and_padded_to_64(size, resized):
    batch, targets = _transform().eval()([torch.rand(3, *size)])
    assert batch.image_sizes == [resized]
    assert batch.image_sizes[0].original == size
    assert batch.tensors.shape == (1, 3, 64, 64 * -(-resized[1] // 64))
    assert (batch.tensors[..., resized[0] :, :] == 0).all()
    assert targets is None


def test_one_of_several_sizes_in_training_and_the_last_in_evaluation():
    transform = _transform(min_size=(32, 48, 64))
    images = [torch.rand(3, 80, 80)]
    assert {transform.train()(images)[0].image_sizes[0][0] for _ in range(40)} == {32, 48, 64}
    assert transform.eval()(images)[0].image_sizes == [(64, 64)]


def test_targets_are_moved_and_the_callers_own_stay():
    masks = torch.zeros(1, 32, 48, dtype=torch.bool)
    masks[0, 8:16, 12:24] = True
    target = {"boxes": torch.tensor([[12.0, 8.0, 24.0, 16.0]]), "masks": masks, "labels": torch.tensor([3])}
    before = {name: value.clone() for name, value in target.items()}
    _, (moved,) = _transform()([torch.rand(3, 32, 48)], [target])
    assert moved["boxes"].tolist() == [[24, 16, 48, 32]]
    assert moved["masks"][0].nonzero().aminmax(dim=0).max.tolist() == [31, 47]
    assert all(torch.equal(target[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images must hold at least one image"),
        ([torch.rand(3, 4, 4), torch.rand(1, 4, 4)], ValueError, r"images\[1\] must be \(3, H, W\).*got \(1, 4, 4\)"),
        ([torch.rand(4, 4)], ValueError, r"images\[0\] must be \(3, H, W\)"),
        ([torch.rand(3, 0, 4)], ValueError, r"not empty, got \(3, 0, 4\)"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], TypeError, "floating point.*got torch.uint8"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        _transform()(images)


def test_targets_of_some_images_are_refused():
    with pytest.raises(ValueError, match="targets must be one for each of 2 images, got 0"):
        _transform()([torch.rand(3, 4, 4)] * 2, [])


def test_masks_of_another_size_are_named():
    target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "masks": torch.ones(1, 5, 8), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match=r"targets\[0\]\['masks'\] must be \(1, 8, 8\).*got \(1, 5, 8\)"):
        _transform()([torch.rand(3, 8, 8)], [target])


MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
VALUES = {
    "0 to 255": (lambda image: image * 255, r"\[0, 1\], got 0 to 25\d\.?\d*: divide it by 255"),
    "normalised": (lambda image: (image - MEAN) / STD, r"\[0, 1\], got -[12].* to [12].*: it is normalised here"),
    "-1 to 1": (lambda image: image * 2 - 1, r"\[0, 1\], got -1 to .*: it is normalised here"),
    "-128 to 127": (lambda image: image * 255 - 128, r"\[0, 1\], got -128 to 12\d\.?\d*: it is normalised here"),
    "a NaN": (lambda image: image.index_fill(2, torch.tensor(3), torch.nan), r"\[0, 1\], got NaN in 60 of 1800 values"),
    "infinite": (lambda image: image / image, r"\[0, 1\], got NaN in 1 of 1800 values"),
    "infinity": (lambda image: image.index_fill(2, torch.tensor(3), torch.inf), r"\[0, 1\], got 0 to inf"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("training", [False, True])
def test_wrong_values_are_named(picture, case, dtype, training):
    change, message = VALUES[case]
    right = torch.rand(3, 8, 9)
    image = torch.from_numpy(picture(20, 30)).permute(2, 0, 1) / 255
    image[0, 0, 0] = 0
    image[1, 1, 1] = 1
    if case == "infinite":
        image = image.clamp(min=1e-3)
        image[0, 0, 0] = 0
    with pytest.raises(ValueError, match=r"images\[1\] must be in " + message):
        _transform().train(training)([right, change(image).to(dtype)])


def test_values_little_beyond_are_clipped(picture):
    """As of sharp interpolation."""
    image = torch.from_numpy(picture(20, 30)).permute(2, 0, 1) / 255
    beyond = image * 1.4 - 0.2
    found, expected = (_transform().eval()([values])[0].tensors for values in (beyond, beyond.clamp(0, 1)))
    assert torch.equal(found, expected)


def test_values_are_looked_at_once(monkeypatch):
    """A device is waited for a single time, however many images there are."""
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    for name in ("item", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("waited for"))
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "masks": torch.ones(1, 8, 8)}] * 3
    _transform().eval()([torch.rand(3, 8, 8)] * 3, targets)
    assert waits == [1]


def test_values_are_not_looked_at_while_compiling():
    class Checked(torch.nn.Module):
        def forward(self, image):
            require_values([image], None, None)
            return image + 1

    image = torch.rand(3, 4, 4)
    for traced in (
        torch.compile(Checked(), fullgraph=True, backend="eager"),
        torch.export.export(Checked(), (image,)).module(),
    ):
        assert torch.equal(traced(image), image + 1)


def test_masks_are_pasted_at_the_pixels_centres():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    boxes = torch.tensor([[2.0, 1.0, 10.0, 5.0]])
    pasted = paste_masks(mask, boxes, (7, 12), None)
    assert pasted.shape == (1, 1, 7, 12)
    expected = torch.zeros(7, 12, dtype=torch.bool)
    expected[1:5, 6:10] = True
    assert torch.equal(pasted[0, 0] >= 0.5, expected)
    assert torch.equal(paste_masks(mask, boxes, (7, 12), 0.5)[0, 0], expected)


@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), torch.tensor([[5.0, 5.0, 5.0, 5.0], [12.0, 7.0, 12.0, 7.0]])])
def test_no_masks_and_masks_of_empty_boxes(boxes):
    pasted = paste_masks(torch.rand(len(boxes), 1, 4, 4), boxes, (7, 12), None)
    assert pasted.shape == (len(boxes), 1, 7, 12)
    assert pasted.isfinite().all()
