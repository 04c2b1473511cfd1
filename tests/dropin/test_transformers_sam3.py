"""SAM 3's masks of a video after omniops.enable("transformers"): holes filled, specks and doubles removed."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import omniops
from omniops.dropin import _transformers

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def sam3():
    """The module, which has loaded no kernel."""
    module = importlib.import_module("transformers.models.sam3_video.modeling_sam3_video")
    before = module.cv_utils_kernel
    module.cv_utils_kernel = None
    yield module
    omniops.disable()
    module.cv_utils_kernel = before


@pytest.fixture
def logged(sam3, monkeypatch):
    """The warnings of the module."""
    sentences = []
    monkeypatch.setattr(sam3, "logger", SimpleNamespace(warning_once=sentences.append))
    return sentences


def scores(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def cleaned(mask, max_area):
    """What SAM 3 makes of logits, by SciPy: small holes become 0.1, then small specks -0.1."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    result = mask.numpy().copy()
    for image in result[:, 0]:
        for foreground, value in ((False, 0.1), (True, -0.1)):
            pixels = (image > 0) == foreground
            limit = min(max_area, int(pixels.sum()) // 2) if foreground else max_area
            labels, _ = ndimage.label(pixels, np.ones((3, 3)))
            small = pixels & (np.bincount(labels.ravel())[labels] <= limit)
            image[small] = value
    return torch.from_numpy(result)


@pytest.mark.parametrize("size", [(24, 36), (23, 36), (24, 35), (17, 13)])
def test_holes_are_filled_and_specks_removed(sam3, logged, size):
    mask = scores(3, 1, *size)
    omniops.enable("transformers")
    result = sam3.fill_holes_in_mask_scores(mask, 4)
    assert_close(result, cleaned(mask, 4), rtol=0, atol=0)
    assert not torch.equal(result, mask)
    assert not logged
    omniops.disable()
    assert sam3.fill_holes_in_mask_scores(mask, 4).equal(mask)
    assert len(logged) == 1


def test_no_masks_at_all(sam3):
    omniops.enable("transformers")
    assert sam3.fill_holes_in_mask_scores(torch.zeros(0, 1, 6, 7), 4).shape == (0, 1, 6, 7)


def greedy(overlaps, points, threshold):
    """Kept ones, best first, of equal ones the first: each against all that were kept."""
    kept = []
    for i in sorted(range(len(points)), key=lambda i: -points[i]):
        if all(overlaps[j][i] <= threshold for j in kept):
            kept.append(i)
    return kept


def test_masks_that_better_ones_overlap_are_left_out(sam3, logged):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(40, generator=generator)
    masks = torch.full((40, 24, 24), -1.0)
    for mask, (top, left) in zip(masks, torch.randint(0, 12, (40, 2), generator=generator).tolist(), strict=True):
        mask[top : top + 12, left : left + 12] = 1.0

    def kept():
        return sam3.nms_masks(probs, masks, prob_threshold=0.2, iou_threshold=0.3)

    valid = probs > 0.2
    omniops.enable("transformers")
    result = kept()
    inside = (masks > 0).flatten(1).double()
    shared = inside @ inside.T
    areas = inside.sum(1)
    overlaps = shared / (areas[:, None] + areas - shared)
    (candidates,) = valid.nonzero(as_tuple=True)
    expected = candidates[greedy(overlaps[candidates][:, candidates].tolist(), probs[candidates].tolist(), 0.3)]
    assert sorted(expected.tolist()) == result.nonzero().flatten().tolist()
    assert 1 < result.sum() < valid.sum()
    assert not logged
    omniops.disable()
    assert torch.equal(kept(), valid)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_suppression_by_a_matrix(dtype):
    generator = torch.Generator().manual_seed(1)
    overlaps = torch.rand((70, 70), generator=generator)
    overlaps = torch.maximum(overlaps, overlaps.T).to(dtype)
    points = torch.randint(0, 8, (70,), generator=generator) / 8  # most are equal to others
    for threshold in (0.3, 0.9, 0.99):
        kept = _transformers.generic_nms(overlaps, points.to(dtype), threshold, True)
        assert kept.dtype == torch.int64
        assert kept.tolist() == greedy(overlaps.tolist(), points.tolist(), threshold)


def test_the_threshold_is_not_rounded_to_the_dtype_of_the_matrix():
    overlaps = torch.full((2, 2), 0.1)  # in float32 a little more than 0.1
    assert _transformers.generic_nms(overlaps, torch.tensor([0.5, 0.9]), 0.1, True).tolist() == [1]
    assert _transformers.generic_nms(overlaps * torch.nan, torch.tensor([0.5, 0.9]), 0.1, True).tolist() == [1, 0]
    assert _transformers.generic_nms(torch.zeros(0, 0), torch.zeros(0), 0.1, True).shape == (0,)


def test_suppression_says_what_is_wrong():
    for overlaps, points in (((3, 4), (3,)), ((3, 3), (2,)), ((3, 3), (3, 1))):
        with pytest.raises(ValueError, match=r"must have shapes \(N, N\) and \(N,\)"):
            _transformers.generic_nms(torch.zeros(overlaps), torch.zeros(points), 0.5, True)
    with pytest.raises(ValueError, match="use_iou_matrix must be True"):
        _transformers.generic_nms(torch.zeros(3, 4), torch.zeros(3), 0.5, False)


def test_components_without_counts():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    for wanted in (True, False):
        labels, counts = _transformers.cc_2d(mask, get_counts=wanted)
        assert labels.unique().tolist() == [1]
        assert counts.unique().tolist() == [4 if wanted else 0]


class Kernel:
    """Hugging Face's, which serves CUDA."""

    @staticmethod
    def cc_2d(inputs, get_counts):
        return ["the kernel's", inputs.device.type]

    @staticmethod
    def generic_nms(dets, scores, iou_threshold, use_iou_matrix):
        return "the kernel's"


def on_cuda(*shape):
    with FakeTensorMode():
        return torch.empty(shape, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("loaded", [False, True], ids=["loaded when needed", "loaded before"])
def test_the_kernel_stays_where_it_is_loaded(sam3, logged, monkeypatch, loaded):
    loads = []

    def get_kernel(name, **_):
        loads.append(name)
        return Kernel

    monkeypatch.setattr(sam3, "is_kernels_available", lambda: True)
    monkeypatch.setattr(sam3, "get_kernel", get_kernel, raising=False)
    if loaded:
        sam3._load_cv_utils_kernel_once()
    omniops.enable("transformers")
    mask = scores(1, 1, 8, 8) > 0
    for _ in range(2):
        assert_close(sam3._get_connected_components_with_padding(mask)[1], omniops.connected_components(mask)[1])
        assert sam3.cv_utils_kernel.cc_2d(on_cuda(1, 1, 8, 8), get_counts=True) == ["the kernel's", "cuda"]
        assert sam3.cv_utils_kernel.generic_nms(on_cuda(3, 3), on_cuda(3), 0.5, use_iou_matrix=True) == "the kernel's"
    assert loads == ["kernels-community/cv-utils"]
    omniops.enable("transformers", devices=["cuda"])
    labels, counts = sam3.cv_utils_kernel.cc_2d(on_cuda(1, 1, 8, 8), get_counts=True)
    assert labels.shape == counts.shape == (1, 1, 8, 8)
    omniops.disable()
    assert sam3.cv_utils_kernel is (Kernel if loaded else None)
    assert not logged


@pytest.mark.parametrize("available", [False, True], ids=["no kernels", "none that loads"])
def test_on_cuda_ours_serve_where_the_kernel_is_not_loaded(sam3, logged, monkeypatch, available):
    tried = []

    def get_kernel(name, **_):
        tried.append(name)
        raise OSError("no network")

    monkeypatch.setattr(sam3, "is_kernels_available", lambda: available)
    monkeypatch.setattr(sam3, "get_kernel", get_kernel, raising=False)
    omniops.enable("transformers")
    for _ in range(2):
        labels, counts = sam3.cv_utils_kernel.cc_2d(on_cuda(1, 1, 8, 8), get_counts=True)
        assert labels.shape == counts.shape == (1, 1, 8, 8)
    assert len(tried) == available
    assert not logged
