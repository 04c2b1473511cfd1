"""What is written whatever the format is: names, shapes, files whole or not at all, and every error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from export_models import Holes, dynamic, every_operator, inputs
from torch import nn
from torch.export import Dim

import omniops
from omniops import export
from omniops.export import files, formats, torchscript


class Affine(nn.Module):
    """What is traced soon."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, scale: float = 1.0, shift=None):
        y = self.norm(self.linear(x)) * scale
        return y if shift is None else (y + shift, {"shift": shift * 2})


@pytest.fixture(scope="module")
def program():
    return every_operator()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_torchscript_has_every_operator_of_any_size(program, tmp_path):
    written = export.write(program, inputs(), tmp_path / "all.pt", dynamic_shapes=dynamic())
    assert written.path == tmp_path / "all.pt"
    assert written.format == "torchscript"
    assert list(map(str, written.inputs)) == [
        "image float32 (*, 4, *, *)",
        "query float32 (*, *, 8)",
        f"value float32 (*, {inputs()[2].shape[1]}, 8)",
        "reference_points float32 (*, *, 2, 2)",
    ]
    assert list(map(str, written.outputs)) == ["output_0 float32 (*, 4, *, *)", "output_1 float32 (*, *, 8)"]
    for args in (inputs(), inputs(3, 4, 9, 5)):
        assert export.largest_difference(written, program, args) < 1e-5
    assert _names(tmp_path) == ["all.pt"]


class Downsample(nn.Module):
    """CARAFE with stride 3."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.Conv2d(2, 25, 3, stride=3, padding=1)

    def forward(self, features):
        return omniops.carafe_downsample(features, self.masks(features), 5, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3, 21), (20, 3), (6, 7)])
def test_carafe_takes_other_sizes_than_an_example_of_one_row_or_tile(tmp_path, size):
    """torch.export makes a constant of a computed size that is 1 in the example."""
    module, any_size = Downsample().eval(), Dim.DYNAMIC
    shapes = ({0: any_size, 2: any_size, 3: any_size},)
    written = export.write(module, (torch.randn(2, 2, *size),), tmp_path / "down.pt", dynamic_shapes=shapes)
    for other in ((1, 2, 5, 8), (3, 2, 20, 33), (2, 2, 3, 2), (2, 2, 2, 70), (2, 2, 27, 48)):
        assert export.largest_difference(written, module, (torch.randn(other),)) < 1e-5


@pytest.mark.slow
def test_a_torchscript_file_needs_no_omniops(program, tmp_path):
    path = tmp_path / "all.pt"
    export.write(program, inputs(), path)
    code = (
        "import sys, torch; loaded = torch.jit.load(sys.argv[1]); "
        "assert not [name for name in sys.modules if name.startswith('omniops')]; print(type(loaded).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert result.stdout == "RecursiveScriptModule\n", result.stderr[-500:]


@pytest.mark.slow
def test_half_keeps_the_dtypes_outside(program, tmp_path):
    written = export.write(program, inputs(), tmp_path / "half.pt", dynamic_shapes=dynamic(), half=True)
    full = export.write(program, inputs(), tmp_path / "full.pt")
    assert {spec.dtype for spec in written.inputs + written.outputs} == {"float32"}
    assert [spec.name for spec in written.inputs] == [spec.name for spec in full.inputs]
    weights = torch.jit.load(written.path).state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert {parameter.dtype for parameter in program.parameters()} == {torch.float32}
    assert 1e-5 < export.largest_difference(written, program, inputs(3, 4, 9, 5)) < 2e-3


def test_half_takes_dynamic_sizes_by_name(tmp_path):
    model = Affine().eval()
    args = torch.rand(4, 3), 2.0
    shapes = {"x": {0: Dim("batch")}, "scale": None}
    written = export.write(model, args, tmp_path / "half.pt", dynamic_shapes=shapes, half=True)
    assert str(written.inputs[0]) == "x float32 (*, 3)"
    assert export.largest_difference(written, model, (torch.rand(7, 3), 2.0)) < 2e-3


def test_training_mode_is_left_as_it_was(tmp_path):
    model = Affine().train()
    model.linear.eval()
    x = torch.rand(4, 3)
    mean = model.norm.running_mean.clone()
    written = export.write(model, (x,), tmp_path / "affine.pt")
    assert (model.training, model.linear.training, model.norm.training) == (True, False, True)
    assert torch.equal(model.norm.running_mean, mean)
    assert export.largest_difference(written, model, (x,)) < 1e-6
    assert (model.training, model.linear.training) == (True, False)


def test_names_are_those_of_forward_or_those_given(tmp_path):
    args = torch.rand(4, 3), 2.0, torch.rand(2)
    written = export.write(Affine(), args, tmp_path / "own.pt")
    assert [spec.name for spec in written.inputs] == ["x", "shift"]
    assert [spec.name for spec in written.outputs] == ["output_0", "output_1"]
    names = {"input_names": ["a", "b"], "output_names": ["c", "d"]}
    written = export.write(Affine(), args, tmp_path / "given.pt", **names)
    assert [spec.name for spec in written.inputs + written.outputs] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"input_names": ["a"]}, "input_names must name 2 tensors, got 1 names: a"),
        ({"output_names": ["a", "b", "c"]}, "output_names must name 2 tensors, got 3 names: a, b, c"),
        ({"input_names": ["a", "a"]}, "input_names must be different names, got a, a"),
    ],
)
def test_names_must_fit(names, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export.write(Affine(), (torch.rand(4, 3), 2.0, torch.rand(2)), tmp_path / "a.pt", **names)
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "format", "words"),
    [
        ("a.pt", "tensorrt", "format must be one of onnx, openvino, executorch, torchscript, aoti, coreml; got 'tens"),
        ("a.engine", None, r"path must end with .onnx, .xml, .pte, .pt, .pt2, .mlpackage, or format be named; got '"),
        ("a.onnx", "torchscript", "path must be a name that ends with .pt, got"),
        (".pt", "torchscript", "path must be a name that ends with .pt, got"),
    ],
)
def test_the_format_must_be_known_and_the_name_its_own(path, format, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / path, format)


def test_wrong_arguments_are_named(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        export.write(lambda x: x, (torch.rand(3),), path)
    with pytest.raises(TypeError, match="args must be a tuple of the module's arguments, got Tensor"):
        export.write(Affine(), torch.rand(4, 3), path)
    with pytest.raises(ValueError, match="opset_version is of ONNX, and must be None for format 'torchscript'; got 19"):
        export.write(Affine(), (torch.rand(4, 3),), path, opset_version=19)
    with pytest.raises(ValueError, match="dynamic_shapes must be None for format 'executorch', whose files take"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.pte", dynamic_shapes=({0: Dim("n")},))
    with pytest.raises(ValueError, match="opset_version must be 18 or later, which PyTorch's exporter writes; got 17"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.onnx", opset_version=17)
    with pytest.raises(ValueError, match="dynamic_shapes must have an entry for each of 2 args, got 1"):
        export.write(Affine(), (torch.rand(4, 3), 2.0), path, dynamic_shapes=({0: Dim("n")},))
    with pytest.raises(ValueError, match=r"format must be one of onnx, openvino, .*; got 'tensorrt'"):
        export.require_packages("tensorrt")
    with pytest.raises(ValueError, match=r"format must be one of onnx, openvino, .*; got 'tensorrt'"):
        export.require_runtime("tensorrt")
    with pytest.raises(TypeError, match="opset_version must be a number, got str"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.onnx", opset_version="20")
    for shapes in (({0: Dim.AUTO, 2: Dim.AUTO},), {"x": {-1: Dim.AUTO}}):
        with pytest.raises(ValueError, match=r"dimensions from 0 to 1 of argument 0, of shape \(4, 3\); got (2|-1)$"):
            export.write(Affine(), (torch.rand(4, 3),), path, dynamic_shapes=shapes)
    with pytest.raises(ValueError, match=r"must have values, and linear\.weight is on the device meta: load"):
        export.write(Affine().to("meta"), (torch.rand(4, 3),), path)


@pytest.mark.slow
def test_an_opset_that_pytorch_does_not_write_is_said(tmp_path, capfd, caplog):
    with pytest.raises(export.ExportError, match="writes no opset 99 of this model: it wrote"):
        export.write(nn.ReLU(), (torch.rand(3),), tmp_path / "a.onnx", opset_version=99)
    assert _names(tmp_path) == []
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.name.startswith("onnxscript")]


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("onnx", "onnxscript", "'omniops\\[export\\]'"),
        ("openvino", "openvino", "openvino"),
        ("executorch", "executorch", "executorch"),
        ("coreml", "coremltools", "coremltools"),
    ],
)
def test_a_missing_package_is_named_with_its_command(name, package, install, tmp_path, monkeypatch):
    installed = set(export.FORMATS[name].packages) - {package}
    monkeypatch.setattr(formats, "find_spec", lambda module: True if module in installed else None)
    path = tmp_path / f"a{export.FORMATS[name].suffix}"
    with pytest.raises(ImportError, match=f"{name}' needs {package}, which is not installed: pip install {install}$"):
        export.write(Affine(), (torch.rand(4, 3),), path)


@pytest.mark.parametrize(("suffix", "existing"), [(".pt", "a.pt"), (".xml", "a.bin"), (".mlpackage", "a.mlpackage")])
def test_what_is_there_is_not_replaced(suffix, existing, tmp_path):
    (tmp_path / existing).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{existing} is there already: overwrite=True replaces it"):
        files.require_new(tmp_path / f"a{suffix}", suffix, overwrite=False)
    files.require_new(tmp_path / f"a{suffix}", suffix, overwrite=True)
    assert (tmp_path / existing).read_text() == "mine"


def test_a_folder_must_be_there_and_the_name_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing is no folder that is there"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "missing" / "a.pt")
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(FileExistsError, match=r"cannot write .*a.pt: it is a folder"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.pt", overwrite=True)


def test_overwrite_replaces_files_and_folders(tmp_path):
    (tmp_path / "a.mlpackage").mkdir()
    (tmp_path / "a.mlpackage" / "old").write_text("old")
    for name in ("a.xml", "a.bin"):
        (tmp_path / name).write_text("old")
    with files.writing(tmp_path / "a.mlpackage", overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    with files.writing(tmp_path / "a.xml", overwrite=True) as temporary:
        temporary.write_text("new")
        temporary.with_suffix(".bin").write_text("new")
    assert _names(tmp_path) == ["a.bin", "a.mlpackage", "a.xml"]
    assert _names(tmp_path / "a.mlpackage") == ["new"]
    assert {(tmp_path / name).read_text() for name in ("a.xml", "a.bin")} == {"new"}


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    def fail(program, request, path):
        path.write_text("half of it")
        raise RuntimeError("the disk of the converter's own\n%graph : [#users=1000]" + "x" * 1000)

    (tmp_path / "a.pt").write_text("old")
    monkeypatch.setattr(torchscript, "write", fail)
    with pytest.raises(export.ExportError) as caught:
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.pt", overwrite=True)
    assert str(caught.value) == "TorchScript cannot take the model: the disk of the converter's own"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert _names(tmp_path) == ["a.pt"]
    assert (tmp_path / "a.pt").read_text() == "old"


def test_what_came_meanwhile_stays(tmp_path):
    with (  # noqa: PT012
        pytest.raises(FileExistsError, match="meanwhile it is there"),
        files.writing(tmp_path / "a", False) as temporary,
    ):
        temporary.write_text("new")
        (tmp_path / "a").write_text("theirs")
    assert _names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "theirs"


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Sum(nn.Module):
    def forward(self, pair):
        return pair.first + pair.second


def test_named_tuples_stay_what_they_are(tmp_path):
    args = (Pair(torch.rand(2), torch.rand(2)),)
    written = export.write(Sum(), args, tmp_path / "sum.pt", half=True)
    assert len(written.inputs) == 2
    assert export.largest_difference(written, Sum(), args) < 1e-3


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Guarded(nn.Module):
    """An error of many lines."""

    def forward(self, x):
        raise ValueError("no\n" + "\n".join("a line of a graph" for _ in range(100)))


@pytest.mark.parametrize(("module", "name"), [(Branching(), "Branching"), (Guarded(), "Guarded")])
def test_what_cannot_be_traced_is_said_in_one_line(module, name, tmp_path):
    with pytest.raises(
        export.ExportError,
        match=rf"^torch\.export cannot trace {name}, which every format needs, at \S*test_write\.py:\d+",
    ) as caught:
        export.write(module, (torch.rand(3),), tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.__cause__ is not None
    assert _names(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_connected_components_are_named_with_the_way_out(suffix, tmp_path):
    with pytest.raises(export.ExportError, match=r"omniops::connected_components .* call omniops\.fill_holes on what"):
        export.write(Holes(), (torch.rand(1, 1, 4, 4),), tmp_path / f"a{suffix}")
    assert _names(tmp_path) == []


def test_a_part_has_its_own_names_and_sizes(tmp_path):
    part = export.Part("up", omniops.CARAFEPack(4, 2), (torch.rand(2, 4, 3, 5),), ("low",), ("high",), None, "")
    written = export.write_part(part, tmp_path / "up.pt")
    assert (*map(str, written.inputs), *map(str, written.outputs)) == (
        "low float32 (2, 4, 3, 5)",
        "high float32 (2, 4, 6, 10)",
    )
    assert export.largest_difference(written, part.module, part.args) < 1e-5


def test_a_difference_is_seen(tmp_path):
    model = Affine().eval()
    args = (torch.rand(4, 3),)
    written = export.write(model, args, tmp_path / "a.pt")
    with torch.no_grad():
        model.linear.bias.add_(10)
        found = export.largest_difference(written, model, args)
        assert 0.5 < found < 2
        model.linear.bias.fill_(float("nan"))
        assert export.largest_difference(written, model, args) == float("inf")


def test_files_of_core_ml_are_not_run(tmp_path):
    written = export.Written(tmp_path / "a.mlpackage", "coreml", (), ())
    with pytest.raises(export.ExportError, match="Core ML files are not run here: only Apple's systems run them"):
        export.load(written)


def test_a_missing_compiler_is_said_with_the_way_out(tmp_path, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(program, path):
        raise InvalidCxxCompiler

    monkeypatch.setattr("omniops._torch_private.compile_ahead_of_time", fail)
    with pytest.raises(export.ExportError, match=r"AOTInductor needs a C\+\+ compiler, and none works here: install g"):
        export.write(Affine(), (torch.rand(4, 3),), tmp_path / "a.pt2")
    assert _names(tmp_path) == []


@pytest.mark.slow
def test_importing_it_imports_no_other_package():
    code = (
        "import sys; import omniops.export; "
        "print({'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'executorch', 'coremltools'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "set()\n", result.stderr[-500:]
