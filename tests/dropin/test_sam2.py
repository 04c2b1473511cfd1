"""sam2 after omniops.enable: stand-ins for the package, with and without its compiled extension, and the real one."""

import importlib
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import omniops
from omniops.dropin import _sam2

MASK = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.uint8)[None, None]
MISC = """
def get_connected_components(mask):
    from sam2 import _C

    return _C.get_connected_componnets(mask)
"""
EXTENSION = """
def get_connected_componnets(mask):
    return ["labels of the extension", mask.device.type]
"""


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    omniops.disable()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package sam2 that calls the extension as the real one does; given the extension's text, that too."""
    away = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "sam2"}
    for name in away:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)

    def write(extension=None):
        (tmp_path / "sam2").mkdir()
        (tmp_path / "sam2" / "__init__.py").write_text("")
        (tmp_path / "sam2" / "misc.py").write_text(MISC)
        if extension is not None:
            (tmp_path / "sam2" / "_C.py").write_text(extension)
        importlib.invalidate_caches()

    yield write
    omniops.disable()
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam2"]:
        del sys.modules[name]
    sys.modules.update(away)


def components(mask=MASK):
    return importlib.import_module("sam2.misc").get_connected_components(mask)


def is_ours():
    labels, counts = components()
    assert labels.dtype == counts.dtype == torch.int32
    expected_labels, expected_counts = omniops.connected_components(MASK)
    return torch.equal(labels, expected_labels) and torch.equal(counts, expected_counts)


def test_enabled_before_the_import(package):
    package()
    omniops.enable("sam2")
    assert "sam2" not in sys.modules
    assert is_ours()


def test_enabled_after_the_import_and_disabled(package):
    package()
    with pytest.raises(ImportError, match="_C"):
        components()
    for _ in range(2):
        omniops.enable("sam2")
        omniops.enable("sam2")
        assert _sam2.enabled()
        assert is_ours()
        omniops.disable()
        assert not _sam2.enabled()
        with pytest.raises(ImportError, match="_C"):
            components()


def test_it_is_a_module_as_others_are(package):
    package()
    omniops.enable("sam2")
    assert find_spec("sam2._C").name == "sam2._C"
    module = importlib.import_module("sam2._C")
    assert module is sys.modules["sam2._C"] is sys.modules["sam2"]._C
    assert (module.__name__, module.__spec__.name) == ("sam2._C", "sam2._C")
    assert find_spec("sam2._D") is None


def on_cuda():
    return SimpleNamespace(device=torch.device("cuda"))


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_a_compiled_extension_goes_on_to_serve_cuda(package, imported):
    package(EXTENSION)
    extension = None
    if imported:
        assert components()[1] == "cpu"
        extension = sys.modules["sam2._C"]
    omniops.enable("sam2")
    assert tuple(components(on_cuda())) == ("labels of the extension", "cuda")
    assert is_ours()
    assert _sam2.serving() == {"cpu": "omniops", "cuda": "sam2", "mps": "omniops", "any other": "omniops"}
    omniops.disable()
    assert components()[1] == "cpu"
    assert not imported or sys.modules["sam2._C"] is extension is sys.modules["sam2"]._C


def test_a_compiled_extension_is_replaced_where_that_is_asked_for(package, monkeypatch):
    package(EXTENSION)
    monkeypatch.setattr(_sam2, "connected_components", lambda mask: ("ours", mask.device.type))
    omniops.enable("sam2", devices=["cuda"])
    assert components(on_cuda()) == ("ours", "cuda")
    assert set(_sam2.serving().values()) == {"omniops"}
    omniops.enable("sam2")
    assert tuple(components(on_cuda())) == ("labels of the extension", "cuda")


def test_an_extension_that_does_not_load_is_none(package):
    package("raise ImportError('undefined symbol: _ZN3c10')")
    omniops.enable("sam2")
    assert is_ours()


def test_a_folder_of_that_name_is_not_the_package(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "sam2").mkdir()
    assert not _sam2.installed()
    with pytest.raises(ModuleNotFoundError, match="got 'sam2', which is not: install it"):
        omniops.enable("sam2")


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
    skipped += [each for each in caught if "Skipping the post-processing step" in str(each.message)]


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
