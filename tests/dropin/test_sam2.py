"""sam2 and its copies after omniops.enable: small packages with and without a compiled extension, and the real one."""

import importlib
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import omniops
from omniops.dropin import LIBRARIES

MASK = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.uint8)[None, None]
LABELS = torch.tensor([[1, 1, 0, 0, 5], [0, 0, 0, 0, 5], [11, 0, 0, 0, 0]], dtype=torch.int32)[None, None]
COUNTS = torch.tensor([[2, 2, 0, 0, 2], [0, 0, 0, 0, 2], [1, 0, 0, 0, 0]], dtype=torch.int32)[None, None]
MISC = """
def get_connected_components(mask):
    from {package} import _C

    return _C.get_connected_componnets(mask)
"""
EXTENSION = """
def get_connected_componnets(mask):
    return ["labels of the extension", mask.device.type]
"""
PACKAGES = ("sam2", "sam2_train", "efficient_track_anything")


@pytest.fixture(params=PACKAGES)
def package(request, project):
    """The name of a package that calls its extension as the real one does."""
    project({f"{request.param}/utils/misc.py": MISC.format(package=request.param)})
    return request.param


def components(package, mask=MASK):
    return importlib.import_module(f"{package}.utils.misc").get_connected_components(mask)


def test_enabled_before_the_import(package):
    omniops.enable(package)
    assert package not in sys.modules
    assert_close(components(package), (LABELS, COUNTS), rtol=0, atol=0)


def test_enabled_after_the_import_and_disabled(package):
    with pytest.raises(ImportError, match="_C"):
        components(package)
    for _ in range(2):
        omniops.enable(package)
        omniops.enable(package)
        assert LIBRARIES[package].enabled()
        assert_close(components(package), (LABELS, COUNTS), rtol=0, atol=0)
        omniops.disable()
        assert not LIBRARIES[package].enabled()
        with pytest.raises(ImportError, match="_C"):
            components(package)


def test_a_compiled_extension_goes_on_to_serve_cuda(package, project):
    project({f"{package}/_C.py": EXTENSION})
    with FakeTensorMode():
        on_cuda = torch.empty(MASK.shape, dtype=torch.uint8, device="cuda")
    assert components(package)[1] == "cpu"
    omniops.enable(package)
    assert components(package, on_cuda) == ["labels of the extension", "cuda"]
    assert_close(components(package), (LABELS, COUNTS), rtol=0, atol=0)
    omniops.enable(package, devices=["cuda"])
    labels, counts = components(package, on_cuda)
    assert labels.shape == counts.shape == MASK.shape
    omniops.disable()
    assert components(package)[1] == "cpu"


# From here on the package from PyPI, with a small model of random weights.

SIZE = 256
OVERRIDES = [
    f"++model.image_size={SIZE}",
    "++model.image_encoder.trunk.embed_dim=24",
    "++model.image_encoder.trunk.stages=[1,1,2,1]",
    "++model.image_encoder.trunk.global_att_blocks=[3]",
    "++model.image_encoder.neck.backbone_channel_list=[192,96,48,24]",
]
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
CLICK = {"points": np.array([[60, 40]], np.float32), "labels": np.array([1], np.int32)}


@pytest.fixture
def build():
    """sam2.build_sam, and a seed for the weights."""
    pytest.importorskip("sam2", reason="the package sam2 is not installed")
    torch.manual_seed(0)
    return importlib.import_module("sam2.build_sam")


@contextmanager
def warned():
    """What is warned of by sam2's post-processing, which it skips without the extension."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        skipped = []
        yield skipped
    skipped += [warning for warning in caught if "Skipping the post-processing step" in str(warning.message)]


def photo():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def test_the_packages_function_fills_what_fill_holes_fills(build):
    from sam2.utils.misc import fill_holes_in_mask_scores

    scores = torch.randn(3, 1, 33, 47)
    with warned() as skipped:
        assert fill_holes_in_mask_scores(scores, 8) is scores
    assert skipped
    omniops.enable("sam2")
    with warned() as skipped:
        filled = fill_holes_in_mask_scores(scores, 8)
    assert not skipped
    assert not torch.equal(filled, scores)
    assert_close(filled, omniops.fill_holes(scores, 8), rtol=0, atol=0)


def test_the_image_predictor(build):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(
        build.build_sam2(CONFIG, device="cpu", hydra_overrides_extra=OVERRIDES), max_hole_area=8, max_sprinkle_area=8
    )
    predictor._bb_feat_sizes = [(SIZE // stride,) * 2 for stride in (4, 8, 16)]
    omniops.enable("sam2")
    with warned() as skipped:
        predictor.set_image(photo())
        masks, _, logits = predictor.predict(CLICK["points"], CLICK["labels"])
    assert not skipped
    logits = torch.from_numpy(logits)
    filled = torch.where(omniops.fill_holes(logits, 8) != logits, 10, logits)
    # sam2 looks for specks, of 8 pixels or less, in the logits before the holes are filled.
    cleaned = torch.where(omniops.remove_small_components(logits, 9) != logits, -10, filled)
    assert not torch.equal(filled, logits)
    assert not torch.equal(cleaned, filled)
    expected = F.interpolate(cleaned[None], masks.shape[1:], mode="bilinear", align_corners=False)[0] > 0
    assert np.array_equal(masks, expected.numpy())


def test_the_video_predictor(build, tmp_path):
    for i in range(2):
        Image.fromarray(np.roll(photo(), 3 * i, 1)).save(tmp_path / f"{i}.jpg")
    predictor = build.build_sam2_video_predictor(CONFIG, device="cpu", hydra_overrides_extra=OVERRIDES)
    assert predictor.fill_hole_area == 8

    def scores():
        with torch.inference_mode():
            state = predictor.init_state(str(tmp_path))
            predictor.add_new_points_or_box(state, 0, 1, **CLICK)
            # At the resolution at which holes are filled.
            list(predictor.propagate_in_video(state))
            outputs = state["output_dict_per_obj"][0]
            return outputs["cond_frame_outputs"][0]["pred_masks"]

    with warned() as skipped:
        unfilled = scores()
    assert skipped
    omniops.enable("sam2")
    with warned() as skipped:
        filled = scores()
    assert not skipped
    assert not torch.equal(filled, unfilled)
    assert_close(filled, omniops.fill_holes(unfilled, 8), rtol=0, atol=0)
