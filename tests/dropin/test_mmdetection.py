"""MMDetection from PyPI on omniops, in an environment of their own: the example, and what else needs them."""

import pytest
from matplotlib import cbook
from mmdetection_environment import ROOT, run
from mmdetection_environment import python as python

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples/mmdetection.py"
# The tests that skip where mmdet and mmcv are not installed.
NEED_THEM = (
    "tests/detection/test_checkpoints.py::test_what_a_training_writes_beside_the_weights",
    "tests/detection/test_mmdetection.py",
    "tests/dropin/test_mmcv.py::test_mmcv_finds_all_that_it_asks_for",
    "tests/dropin/test_mmcv.py::test_mmcvs_functions_pass_gradcheck",
    "tests/dropin/test_mmcv.py::test_mmcvs_other_functions_work",
    "tests/dropin/test_mmcv_deform_conv.py::test_mmcvs_module_reads_a_larger_offset",
    "tests/dropin/test_mmcv_deform_conv.py::test_mmcvs_functions_have_mmcvs_gradient_at_the_border",
    "tests/dropin/test_mmcv_deform_conv.py::test_dyhead_and_glip_predict_and_learn",
    "tests/dropin/test_mmcv_masked_conv.py::test_mmcvs_module",
    "tests/dropin/test_mmcv_masked_conv.py::test_mmcvs_module_refuses_by_name_what_it_would_leave_out",
    "tests/dropin/test_mmcv_masked_conv.py::test_mmcvs_module_is_its_own_again",
    "tests/dropin/test_mmcv_detection_transformers.py",
    "tests/dropin/test_mmcv_multi_scale_deform_attn.py",
    "tests/dropin/test_mmcv_psa_mask.py::test_mmcvs_module",
    "tests/dropin/test_mmcv_rotated.py::test_mmcvs_functions_of_rotated_boxes",
    "tests/dropin/test_mmcv_sync_bn.py::test_mmcvs_module",
    "tests/nn/test_fpn_carafe.py::test_fpn_equals_that_of_mmdet",
    "tests/nn/test_fpn_carafe.py::test_path_aggregation_equals_that_of_mmdet_with_nearest_interpolation",
    "tests/nn/test_multi_scale_deform_attn.py::test_parameters_are_mmcvs",
    "tests/nn/test_multi_scale_deform_attn.py::test_results_and_gradients_are_mmcvs",
)


@pytest.fixture(scope="module")
def photograph():
    """The one that ships inside matplotlib."""
    return cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


@pytest.mark.parametrize(
    ("model", "losses", "limit"),
    # ATSS divides its classes' loss, of all positions, by the one object's share of them.
    [("carafe-mask", 5, 100), ("dcn", 5, 100), ("dyhead/atss_r50_fpn_dyhead_1x_coco.py", 3, 10_000)],
)
def test_the_example_finds_and_learns(python, photograph, tmp_path, model, losses, limit):
    said = _example(python, photograph, tmp_path, "--model", model)
    assert len(_losses(said, limit)) == losses + 1  # and their sum


def test_it_starts_from_a_checkpoint_that_mmengine_saved(python, photograph, tmp_path):
    saved = tmp_path / "saved.pth"
    run(python, "-c", SAVE, saved)
    said = _example(python, photograph, tmp_path, "--model", "carafe-faster", "--weights", saved)
    assert str(saved) in said[0]
    losses = _losses(said)
    assert len(losses) == 4 + 1
    assert losses["loss_cls"] < 1  # about 4 with random weights; the checkpoint knows nothing but the background


def test_what_needs_the_packages(python):
    said = run(python, "-m", "pytest", "-p", "no:cacheprovider", *NEED_THEM)
    assert " passed" in said
    assert "skipped" not in said, said


def _example(python, photograph, tmp_path, *options):
    picture = tmp_path / "found.png"
    options += ("--device", "cpu", "--score", "0", "--scale", "256", "192", "--out", picture, "--train-step")
    said = run(python, EXAMPLE, photograph, *options).splitlines()
    assert "100 objects found on cpu" in said
    assert f"drawn in {picture}" in said
    assert picture.stat().st_size > 10_000
    return said


def _losses(said, limit=100):
    losses = {name: float(loss) for name, loss in (pair.split() for pair in said[-1].split(", "))}
    assert all(0 <= loss < limit for loss in losses.values())
    return losses


SAVE = """
import sys
import omniops
omniops.enable()
import mmdet
from mmdet.apis import init_detector
from mmengine.runner import save_checkpoint
model = init_detector(mmdet.__path__[0] + "/.mim/configs/carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py", device="cpu")
classify = model.roi_head.bbox_head.fc_cls
classify.weight.data.zero_()
classify.bias.data.zero_()[-1] = 9
meta = {"dataset_meta": model.dataset_meta, "epoch": 1}
save_checkpoint({"meta": meta, "state_dict": model.state_dict()}, sys.argv[1])
"""
