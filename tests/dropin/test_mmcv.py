"""omniops.enable("mmcv"): what stands in for mmcv._ext and when, and mmcv-lite itself."""

import importlib
import pkgutil
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from dropin.mmcv_inputs import ROIS, SCALE, SIZE, assert_near, random_tensor

from omniops.dropin import mmcv_ext
from omniops.dropin._mmcv import mmcv as _mmcv

# Packages that look like mmcv.
LITE = {
    "__init__.py": "",
    "ops/__init__.py": "from . import bbox, carafe, knn",
    "ops/bbox.py": "from mmcv import _ext as ext_module",
    "ops/knn.py": "from mmcv import _ext as ext_module",
    "ops/carafe.py": """
import torch
from mmcv import _ext as ext_module

class CARAFENaiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, masks, kernel_size, group_size, scale_factor):
        ctx.kernel_size, ctx.group_size, ctx.scale_factor = kernel_size, group_size, scale_factor
        n, c, h, w = features.shape
        output = features.new_zeros(n, c, h * scale_factor, w * scale_factor)
        ext_module.carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)
        ctx.save_for_backward(features, masks)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        assert grad_output.is_cuda
""",
}
COMPILED = """
def bbox_overlaps(bboxes1, bboxes2, ious, mode, aligned, offset):
    if bboxes1.device.type != "meta":
        raise RuntimeError("bbox_overlaps_impl: implementation for device %s:0 not found." % bboxes1.device.type)
    if len(bboxes1) == 0:
        raise RuntimeError("its own error")
    calls.append("theirs")

def carafe_naive_forward(*arguments):
    raise RuntimeError("CarafeNaive is not compiled with GPU support")

def knn_forward():
    return "theirs"

calls = []
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package called mmcv; the modules of the real one, if imported, come back after the test."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mmcv"}
    was = _mmcv.enabled()
    _mmcv.disable()

    def make(**more: str) -> None:
        for name, text in {**LITE, **{f"{name}.py": text for name, text in more.items()}}.items():
            file = tmp_path / "mmcv" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    _mmcv.disable()
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        del sys.modules[name]
    sys.modules.update(before)
    if was:
        _mmcv.enable(None)


def _overlap(extension, device="cpu"):
    boxes, ious = torch.tensor([[0.0, 0, 2, 2]], device=device), torch.zeros(1, 1, device=device)
    extension.bbox_overlaps(boxes, boxes, ious, mode=0, aligned=False, offset=0)
    return ious


@pytest.mark.parametrize("imported_before", [False, True])
def test_lite_is_served(package, imported_before):
    package()
    if imported_before:
        importlib.import_module("mmcv")
        with pytest.raises(ImportError):
            importlib.import_module("mmcv.ops")
    assert _mmcv.installed()
    assert _mmcv.serving()["mps"].startswith("omniops")
    assert not _mmcv.enabled()
    _mmcv.enable(None)
    _mmcv.enable(("cpu",))
    assert _mmcv.enabled()

    ops = importlib.import_module("mmcv.ops")
    assert _overlap(ops.bbox.ext_module) == 1
    assert find_spec("mmcv._ext") is sys.modules["mmcv._ext"].__spec__  # what pkgutil.find_loader asks
    assert all(hasattr(ops.bbox.ext_module, name) for name in ("nms", "knn_forward", "anything"))
    assert not hasattr(ops.bbox.ext_module, "__file__")
    with pytest.raises(NotImplementedError, match=r"omniops has no knn_forward for mmcv: .*pip install mmcv"):
        ops.bbox.ext_module.knn_forward(torch.zeros(1))


def test_lite_is_no_longer_served_once_disabled(package):
    package()
    _mmcv.enable(None)
    ops = importlib.import_module("mmcv.ops")
    _mmcv.disable()
    assert not _mmcv.enabled()
    assert find_spec("mmcv._ext") is None
    with pytest.raises(AttributeError, match=r"'bbox_overlaps': omniops was told .* omniops\.enable\('mmcv'\)"):
        _overlap(ops.bbox.ext_module)
    _mmcv.enable(None)
    assert _overlap(ops.bbox.ext_module) == 1
    assert _overlap(importlib.import_module("mmcv._ext")) == 1


def test_an_mmcv_that_was_compiled_for_another_pytorch_is_as_mmcv_lite(package):
    package(_ext="raise ImportError('undefined symbol: _ZN3c10')")
    _mmcv.enable(None)
    assert _overlap(importlib.import_module("mmcv.ops").bbox.ext_module) == 1


@pytest.mark.parametrize("imported_before", [False, True])
def test_the_backward_of_carafe_naive_runs_everywhere(package, imported_before):
    package()
    _mmcv.enable(None)
    if imported_before:
        importlib.import_module("mmcv.ops.carafe")
        _mmcv.disable()
        _mmcv.enable(None)
    function = importlib.import_module("mmcv.ops.carafe").CARAFENaiveFunction
    tensors = random_tensor(1, 2, 3, 3).requires_grad_(), random_tensor(1, 9, 6, 6).requires_grad_()
    torch.autograd.gradcheck(lambda *args: function.apply(*args, 3, 1, 2), tensors)
    _mmcv.disable()
    with pytest.raises(AssertionError):
        function.backward(None, torch.zeros(1))


@pytest.mark.parametrize("imported_before", [False, True])
@pytest.mark.parametrize("devices", [None, ("meta",)])
def test_a_compiled_mmcv_keeps_its_own_functions(package, imported_before, devices):
    package(_ext=COMPILED)
    if imported_before:
        importlib.import_module("mmcv.ops")
    assert _mmcv.serving()["mps"].startswith("mmcv's compiled functions, omniops")
    _mmcv.enable(devices)
    ops = importlib.import_module("mmcv.ops")
    extension = ops.bbox.ext_module
    assert _overlap(extension) == 1  # it has no CPU function
    assert _overlap(extension) == 1
    _overlap(extension, "meta")
    assert _mmcv.serving()["mps"].startswith("mmcv's compiled functions, omniops")
    assert extension.calls == (["theirs"] if devices is None else [])
    if devices is None:
        with pytest.raises(RuntimeError, match="its own error"):
            extension.bbox_overlaps(torch.zeros(0, 4, device="meta"), *(torch.zeros(0, 4),) * 2, 0, False, 0)
    output = torch.zeros(1, 1, 1, 1)
    extension.carafe_naive_forward(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), output, 1, 1, 1)
    assert output == 1
    assert extension.knn_forward() == "theirs"
    assert not hasattr(extension, "nms")

    _mmcv.disable()
    with pytest.raises(RuntimeError, match="implementation for device cpu:0 not found"):
        _overlap(extension)


def test_mmengine_finds_the_extension_on_python_without_find_loader(package, monkeypatch):
    package()
    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    _mmcv.enable(None)
    assert pkgutil.find_loader("mmcv._ext") is not None
    assert pkgutil.find_loader("mmcv._no") is None
    _mmcv.disable()
    assert not hasattr(pkgutil, "find_loader")


def test_the_documentation_counts_the_functions():
    text = (Path(__file__).parents[2] / "docs/mmcv.md").read_text(encoding="utf-8")
    assert f"Of its functions {len(mmcv_ext.__all__)} are" in text


def test_mmcv_finds_all_that_it_asks_for(mmcv):
    extension = importlib.import_module("mmcv._ext")
    asked = set()
    for file in Path(mmcv.__file__).parent.glob("*.py"):
        for call in re.findall(r"load_ext\((.*?)\)", file.read_text(encoding="utf-8"), re.DOTALL):
            asked.update(re.findall(r"'(\w+)'", call))
    asked -= {"_ext"}
    assert len(asked) > 100
    assert all(hasattr(extension, name) for name in asked)
    assert set(mmcv_ext.__all__) <= asked


def _functions(ops):
    """Differentiable functions of mmcv.ops, each with its float64 inputs."""
    rois = ROIS[:4]
    input, target = random_tensor(2, 4, 8, 9), torch.tensor([0, 2, 1])
    offset, mask, weight = random_tensor(2, 36, 4, 4), random_tensor(2, 18, 4, 4), random_tensor(4, 2, 3, 3)
    bins = random_tensor(4, 2, *SIZE)
    features, masks = random_tensor(1, 4, 3, 3), random_tensor(1, 18, 6, 6)
    return {
        "carafe": (lambda x, m: ops.carafe(x, m, 3, 2, 2), features, masks),
        "carafe_naive": (
            lambda x, m: ops.carafe_naive(x, m, 3, 2, 2),
            random_tensor(1, 4, 3, 3),
            random_tensor(1, 18, 6, 6),
        ),
        "deform_conv2d": (lambda x, o, w: ops.deform_conv2d(x, o, w, 2, 1, 1, 2, 2), input[..., :8], offset, weight),
        "modulated_deform_conv2d": (
            lambda x, o, m, w, b: ops.modulated_deform_conv2d(x, o, m, w, b, 2, 1, 1, 2, 2),
            input[..., :8],
            offset,
            mask,
            weight,
            random_tensor(4),
        ),
        "roi_align": (lambda x: ops.roi_align(x, rois, SIZE, SCALE, 0, "avg", True), input),
        "roi_align max": (lambda x: ops.roi_align(x, rois, SIZE, SCALE, 0, "max", True), input),
        "roi_pool": (lambda x: ops.roi_pool(x, rois, SIZE, SCALE), input),
        "deform_roi_pool": (lambda x, o: ops.deform_roi_pool(x, rois, o, SIZE, SCALE, 0, 0.3), input, bins),
        "sigmoid_focal_loss": (
            lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "mean"),
            random_tensor(3, 2),
        ),
        "softmax_focal_loss": (
            lambda x: ops.softmax_focal_loss(x, target, 2.0, 0.25, None, "sum"),
            random_tensor(3, 3),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "carafe",
        "carafe_naive",
        "deform_conv2d",
        "modulated_deform_conv2d",
        "roi_align",
        "roi_align max",
        "roi_pool",
        "deform_roi_pool",
        "sigmoid_focal_loss",
        "softmax_focal_loss",
    ],
)
def test_mmcvs_functions_pass_gradcheck(mmcv, name):
    function, *inputs = _functions(mmcv)[name]
    torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True)


def test_mmcvs_other_functions_work(mmcv):
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3.9], [8, 8, 9, 9]], dtype=np.float32)
    scores = np.array([0.5, 0.9, 0.7], dtype=np.float32)
    assert mmcv.nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
    assert mmcv.nms(boxes, scores, 0.5, max_num=1)[1].tolist() == [1]
    assert mmcv.nms(boxes, scores, 0.99, score_threshold=0.6)[1].tolist() == [1, 2]
    assert mmcv.soft_nms(boxes, scores, 0.5, method="linear")[1].tolist() == [1, 2, 0]
    assert [group.tolist() for group in mmcv.nms_match(np.c_[boxes, scores], 0.5)] == [[1, 0], [2]]
    assert mmcv.bbox_overlaps(torch.tensor(boxes), torch.tensor(boxes)).diagonal().eq(1).all()
    assert "omniops" in mmcv.get_compiler_version()
    assert "omniops" in mmcv.get_compiling_cuda_version()
    layer = mmcv.MaskedConv2d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 5, 6)
    mask = torch.rand(1, 5, 6) > 0.5
    assert_near(layer(x, mask.float()), layer(x) * mask, 1e-5)
    with pytest.raises(NotImplementedError, match="omniops has no nms_quadri"):
        mmcv.nms_quadri(torch.zeros(1, 8), torch.zeros(1), 0.5)
