"""detectron2 after omniops.enable, where its compiled module is missing: what it imports it for."""

import importlib
import sys

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
    "name", ["box_iou_rotated", "roi_align_rotated_forward", "COCOevalAccumulate", "InstanceAnnotation"]
)
def test_what_is_lacking_is_said_at_the_call(files, name):
    files()
    omniops.enable("detectron2")
    function = getattr(importlib.import_module("detectron2._C"), name)
    with pytest.raises(NotImplementedError, match=f"no {name} for detectron2: it takes the compiled detectron2._C"):
        function(torch.zeros(1, 5), torch.zeros(1, 5))


def test_nothing_stays(files):
    files()
    omniops.enable("detectron2")
    layers = module("layers.deform_conv")
    forward = layers._DeformConv.forward
    omniops.disable()
    assert layers._DeformConv.forward is not forward
    assert "detectron2._C" not in sys.modules
