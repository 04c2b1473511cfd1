"""detectron2 after omniops.enable, where its compiled module is missing: what it imports it for."""

import functools
import importlib
import math
import sys

import numpy as np
import pytest
import torch

import omniops

LAYERS = """
from detectron2 import _C

class _DeformConv:
    def forward(): ...
    def backward(): ...

class _ModulatedDeformConv:
    def forward(): ...
    def backward(): ...
"""
FAST = """
from pycocotools.cocoeval import COCOeval
from detectron2 import _C

class COCOeval_opt(COCOeval):
    def evaluate(self):
        return _C.COCOevalEvaluateImages()
"""
EVALUATION = """
from pycocotools.cocoeval import COCOeval
try:
    from detectron2.evaluation.fast_eval_api import COCOeval_opt
except ImportError:
    COCOeval_opt = COCOeval

is_fast = COCOeval_opt is not COCOeval
"""
COLLECT_ENV = """
def collect(has_cuda):
    try:
        import detectron2._C as _C
    except ImportError as e:
        return [f"not built correctly: {e}"]
    data = [_C.get_compiler_version(), _C.get_cuda_version()]
    if has_cuda and getattr(_C, "has_cuda", lambda: True)():
        data.append(_C.__file__)
    return data
"""
COMPILED = """
def deform_conv_forward(): ...
"""


@pytest.fixture
def files(project):
    written = {
        "detectron2/layers/deform_conv.py": LAYERS,
        "detectron2/evaluation/fast_eval_api.py": FAST,
        "detectron2/evaluation/coco_evaluation.py": EVALUATION,
        "detectron2/utils/collect_env.py": COLLECT_ENV,
    }
    return lambda **more: project({**written, **{f"detectron2/{name}.py": text for name, text in more.items()}})


def module(name):
    return importlib.import_module(f"detectron2.{name}")


def test_it_can_be_imported(files):
    files()
    with pytest.raises(ImportError, match="_C"):
        module("layers.deform_conv")
    omniops.enable("detectron2")
    assert callable(module("layers.deform_conv")._C.deform_conv_backward_filter)


def test_coco_evaluation_is_left_to_pycocotools(files):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    files()
    omniops.enable("detectron2")
    assert not module("evaluation.coco_evaluation").is_fast


def test_a_compiled_one_goes_on_to_evaluate(files):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    files(_C=COMPILED)
    omniops.enable("detectron2")
    assert module("evaluation.coco_evaluation").is_fast


def test_its_report_of_the_environment_names_us(files):
    files()
    omniops.enable("detectron2")
    assert module("utils.collect_env").collect(has_cuda=True) == ["none: omniops stands in for detectron2._C"] * 2
    omniops.disable()
    assert "not built correctly" in module("utils.collect_env").collect(has_cuda=True)[0]


@pytest.mark.parametrize(
    "name", ["roi_align_forward", "roi_align_rotated_forward", "COCOevalAccumulate", "InstanceAnnotation"]
)
def test_what_is_lacking_is_said_at_the_call(files, name):
    files()
    omniops.enable("detectron2")
    function = getattr(importlib.import_module("detectron2._C"), name)
    with pytest.raises(NotImplementedError, match=f"no {name} for detectron2: it takes the compiled detectron2._C"):
        function(torch.zeros(1, 5), torch.zeros(1, 5))


def rotated_corners(x, y, width, height, degrees):
    """The corners as detectron2 documents them: an angle turns the width away from the y axis, which points down."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        a, b = a * width / 2, b * height / 2
        yield x + c * a + s * b, y + c * b - s * a


BOXES = [[0, 0, 8, 2, 30], [3, -1, 6, 2, 45], [3, 1, 6, 2, 45], [-2, 1, 3, 3, 0], [0, 0, 2, 8, -60], [9, 9, 1, 1, 10]]
SCORES = [0.5, 0.9, 0.8, 0.3, 0.6, 0.1]


@functools.cache
def overlaps_of_boxes():
    """Each with each, by counting the points of a fine grid inside of them."""
    grid = (np.arange(-500, 500) + 0.5) / 50
    points = np.stack(np.meshgrid(grid, grid), -1)
    inside = np.ones((len(BOXES), *points.shape[:2]), bool)
    for i, box in enumerate(BOXES):
        corners = np.array(list(rotated_corners(*box)))
        for corner, edge in zip(corners, np.roll(corners, -1, 0) - corners, strict=True):
            inside[i] &= edge[0] * (points[..., 1] - corner[1]) >= edge[1] * (points[..., 0] - corner[0])
    return np.array([[(one & other).sum() / (one | other).sum() for other in inside] for one in inside])


def by_module():
    module = importlib.import_module("detectron2._C")
    return module.box_iou_rotated, module.nms_rotated


def by_dispatcher():
    importlib.import_module("detectron2._C")
    return torch.ops.detectron2.box_iou_rotated, torch.ops.detectron2.nms_rotated


@pytest.mark.parametrize("functions", [by_module, by_dispatcher])
def test_rotated_boxes(files, functions):
    files()
    omniops.enable("detectron2")
    box_iou_rotated, nms_rotated = functions()
    boxes, scores = torch.tensor(BOXES, dtype=torch.float32), torch.tensor(SCORES)
    overlaps = box_iou_rotated(boxes[:2], boxes)
    assert overlaps.dtype == torch.float32
    expected = overlaps_of_boxes()
    assert np.abs(overlaps.numpy() - expected[:2]).max() < 5e-3
    assert abs(expected[0, 1] - expected[0, 2]) > 0.1  # else the angle could go the other way round
    for threshold in (0.1, 0.3, 0.5):
        left, kept = sorted(range(6), key=lambda i: -SCORES[i]), []
        while left:
            kept.append(left.pop(0))
            left = [i for i in left if expected[kept[-1], i] <= threshold]
        assert nms_rotated(boxes, scores, threshold).tolist() == kept


def test_no_rotated_boxes(files):
    files()
    omniops.enable("detectron2")
    box_iou_rotated, nms_rotated = by_dispatcher()
    none, one = torch.zeros(0, 5), torch.ones(1, 5)
    assert box_iou_rotated(none, one).shape == (0, 1)
    assert box_iou_rotated(one, none).shape == (1, 0)
    assert nms_rotated(none, none[:, 0], 0.5).tolist() == []


def test_wrong_rotated_boxes_are_named(files):
    files()
    omniops.enable("detectron2")
    box_iou_rotated, nms_rotated = by_dispatcher()
    boxes = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"boxes2 must have shape \(N, 5\), .* got \(2, 4\)"):
        box_iou_rotated(boxes, boxes[:, :4])
    with pytest.raises(ValueError, match=r"scores must have shape \(N,\) = \(2,\), got \(1,\)"):
        nms_rotated(boxes, boxes[:1, 0], 0.5)


def test_operators_of_the_dispatcher_come_and_go(files):
    files()
    for _ in range(2):
        omniops.enable("detectron2")
        importlib.import_module("detectron2._C")
        with pytest.raises(
            NotImplementedError, match="no roi_align_rotated_forward for detectron2: it takes the compiled"
        ):
            torch.ops.detectron2.roi_align_rotated_forward(torch.ones(1, 1, 2, 2), torch.ones(1, 6), 1.0, 2, 2, 0)
        assert torch.ops.detectron2.nms_rotated(torch.ones(1, 5), torch.ones(1), 0.5).tolist() == [0]
        omniops.disable()
        with pytest.raises(AttributeError, match="nms_rotated"):
            torch.ops.detectron2.nms_rotated(torch.ones(1, 5), torch.ones(1), 0.5)


def test_nothing_stays(files):
    files()
    omniops.enable("detectron2")
    layers = module("layers.deform_conv")
    forward = layers._DeformConv.forward
    omniops.disable()
    assert layers._DeformConv.forward is not forward
    assert "detectron2._C" not in sys.modules
