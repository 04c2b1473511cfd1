"""Files of every format beside the modules that they were written of, in the runtimes themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_models import Holes, dynamic, every_operator, inputs
from torch import nn
from torch.export import Dim

import omniops
from omniops import export
from omniops.export import executorch as executorch_files
from omniops.export import openvino as openvino_files

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-3
OTHER = inputs(3, 4, 9, 5)


@pytest.fixture(scope="module")
def model():
    return every_operator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


def _requires(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}, of the extra runtimes")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("format", "packages"), [("onnx", ("onnxscript", "onnxruntime")), ("openvino", ("openvino",))])
def test_batch_and_size_are_dynamic(format, packages, half, model, folder):
    _requires(*packages)
    path = folder / f"{format}-{half}{export.FORMATS[format].suffix}"
    written = export.write(model, inputs(), path, dynamic_shapes=dynamic(), half=half)
    differences = [export.largest_difference(written, model, args) for args in (inputs(), OTHER)]
    assert max(differences) < (HALF_TOLERANCE if half else TOLERANCE)
    if half:  # or else weights are float32 after all
        assert max(differences) > 1e-5
    assert not list(folder.glob(".omniops-*"))


def test_onnx_has_the_names_and_the_operators_of_its_opset(model, folder):
    _requires("onnxscript")
    import onnx

    used = {}
    for opset in (18, 20):
        names = {"input_names": ["a", "b", "c", "d"], "output_names": ["e", "f"]}
        written = export.write(model, inputs(), folder / f"{opset}.onnx", opset_version=opset, **names)
        file = onnx.load(written.path)
        assert [value.name for value in file.graph.input] == ["a", "b", "c", "d"]
        assert [value.name for value in file.graph.output] == ["e", "f"]
        assert {entry.domain: entry.version for entry in file.opset_import}[""] == opset
        assert {entry.domain for entry in file.opset_import} <= {"", "ai.onnx"}
        used[opset] = {node.op_type for node in file.graph.node}
    assert "DeformConv" in used[20]
    assert "DeformConv" not in used[18]
    assert "GridSample" in used[18]


def test_onnx_fills_holes(folder):
    _requires("onnxscript", "onnxruntime")
    logits = torch.ones(1, 1, 6, 7)
    logits[0, 0, 2:4, 3] = -1
    logits[0, 0, 0, 0:6] = -1
    written = export.write(Holes(), (logits,), folder / "holes.onnx")
    (found,) = export.load(written)([logits])
    assert torch.equal(found, Holes()(logits))
    assert not torch.equal(found, logits)


def test_openvino_has_the_names_and_sizes(folder):
    _requires("openvino")
    import openvino

    names = {"input_names": ["a"], "output_names": ["b"]}
    written = export.write(nn.Conv2d(3, 4, 3), (torch.rand(1, 3, 5, 5),), folder / "named.xml", **names)
    read = openvino.Core().read_model(written.path)
    assert list(read.input("a").shape) == [1, 3, 5, 5]
    assert list(read.output("b").shape) == [1, 4, 3, 3]


class Suppression(nn.Module):
    def forward(self, boxes, scores):
        import torchvision

        return boxes[torchvision.ops.nms(boxes, scores, 0.5)]


def test_openvino_goes_by_onnx_where_it_must(tmp_path, monkeypatch):
    _requires("openvino", "onnxscript", "torchvision")
    torch.manual_seed(0)
    corners = torch.rand(12, 2)
    args = torch.cat([corners, corners + 0.5], 1), torch.rand(12)
    path = tmp_path / "nms.xml"
    written = export.write(Suppression(), args, path)
    assert export.largest_difference(written, Suppression(), args) < TOLERANCE
    assert sorted(found.name for found in tmp_path.iterdir()) == ["nms.bin", "nms.xml"]
    monkeypatch.setattr(openvino_files, "find_spec", lambda package: None)
    with pytest.raises(export.ExportError, match=r"may read it by ONNX: pip install 'omniops\[export\]'; it says: "):
        export.write(Suppression(), args, path, overwrite=True)


def test_executorch_has_every_operator(model, folder):
    _requires("executorch")
    written = export.write(model, inputs(), folder / "all.pte")
    assert export.largest_difference(written, model, inputs()) < TOLERANCE


class Strided(nn.Module):
    """Weights that are not contiguous, which ExecuTorch 1.5 takes for others by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("positions", torch.rand(4, 3, 5).permute(2, 0, 1)[None])

    def forward(self, x):
        return self.linear((x + 0).flatten(2).transpose(1, 2) + self.positions.flatten(2).transpose(1, 2))


def test_executorch_takes_weights_of_any_strides(folder, monkeypatch):
    _requires("executorch")
    model, args = Strided(), (torch.rand(1, 5, 4, 3),)
    strides = model.positions.stride()
    for half in (False, True):
        written = export.write(model, args, folder / f"strided-{half}.pte", half=half)
        assert export.largest_difference(written, model, args) < (HALF_TOLERANCE if half else TOLERANCE)
    assert model.positions.stride() == strides
    monkeypatch.setattr(executorch_files, "_with_contiguous_constants", lambda program: program)
    written = export.write(model, args, folder / "by-itself.pte")
    assert export.largest_difference(written, model, args) > 0.01  # once it does not, the function can go


_AOTI = """
import sys, torch, torch._inductor
loaded = torch._inductor.aoti_load_package(sys.argv[1])
args = torch.load(sys.argv[2])
torch.save(loaded(*args), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("omniops")]
"""


def test_aotinductor_runs_where_omniops_was_never_imported(folder):
    torch.manual_seed(0)
    model = omniops.CARAFEPack(4, 2, compressed_channels=4).eval()
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    written = export.write(model, (torch.rand(2, 4, 5, 6),), folder / "up.pt2", dynamic_shapes=shapes)
    args = (torch.rand(3, 4, 7, 4),)
    assert export.largest_difference(written, model, args) < TOLERANCE
    torch.save(args, folder / "args.pt")
    command = [sys.executable, "-c", _AOTI, written.path, folder / "args.pt", folder / "found.pt"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-1000:]
    with torch.no_grad():
        assert torch.allclose(torch.load(folder / "found.pt"), model(*args), atol=1e-5)


def _operations(path: Path):
    import coremltools

    spec = coremltools.utils.load_spec(str(path))
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return spec.description, block.operations


@pytest.mark.parametrize("half", [False, True])
def test_core_ml_has_names_sizes_and_precision(half, model, folder):
    """It is converted and read back; only Apple's systems run it."""
    _requires("coremltools")
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2

    names = {"input_names": ["reference_points", "query", "value", "image"], "output_names": ["query_1", "image_1"]}
    written = export.write(model, inputs(), folder / f"all-{half}.mlpackage", half=half, **names)
    description, operations = _operations(written.path)
    for features, specs in ((description.input, written.inputs), (description.output, written.outputs)):
        assert [feature.name for feature in features] == [spec.name for spec in specs]
        arrays = [feature.type.multiArrayType for feature in features]
        assert {array.dataType for array in arrays} == {FeatureTypes_pb2.ArrayFeatureType.FLOAT32}
        if features is description.input:
            assert [tuple(array.shape) for array in arrays] == [spec.shape for spec in specs]
    kinds = {operation.type for operation in operations}
    assert {"resample", "conv", "softmax"} <= kinds
    assert not [kind for kind in kinds if kind.startswith("custom")]
    dtypes = {output.type.tensorType.dataType for operation in operations for output in operation.outputs}
    assert (MIL_pb2.FLOAT16 in dtypes) == half


class Unknown(nn.Module):
    """What coremltools 9 does not know by PyTorch's names."""

    def forward(self, x):
        chosen = (x > 0) & (x < 1) | ~(x > 2)
        large = nn.functional.interpolate(torch.where(chosen, x, 0.5), scale_factor=2, mode="bicubic")
        return torch.addcmul(large, large, large)


def test_core_ml_has_operators_that_coremltools_does_not_know(folder):
    _requires("coremltools")
    written = export.write(Unknown(), (torch.rand(1, 3, 4, 5),), folder / "unknown.mlpackage")
    _, operations = _operations(written.path)
    assert {"logical_and", "logical_or", "logical_not", "select"} <= {operation.type for operation in operations}


def test_core_ml_takes_five_axes(folder):
    _requires("coremltools")
    path = folder / "axes.mlpackage"
    with pytest.raises(export.ExportError, match="5"):
        export.write(nn.ReLU(), (torch.rand(1, 2, 1, 2, 1, 2),), path)
    assert not path.exists()
