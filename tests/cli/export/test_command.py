"""omniops export: a function of the user's, detectors, SAM 2, and every wrong use."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
import torch

from omniops import detection, export
from omniops.cli.export import command, options

MODULE = """
import torch
from torch import nn
from torch.export import Dim

import omniops


def upsampler():
    torch.manual_seed(0)
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    module, args = omniops.CARAFEPack(4, 2, compressed_channels=4), (torch.rand(2, 4, 3, 5),)
    return module, args, {"dynamic_shapes": shapes, "input_names": ["low"], "output_names": ["high"]}


def fixed():
    return nn.ReLU(), (torch.rand(3),)


class Holes(nn.Module):
    def forward(self, mask):
        return omniops.fill_holes(mask, 4)


def holes():
    return Holes(), (torch.rand(1, 1, 4, 4),)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def branching():
    return Branching(), (torch.rand(3),)


def nothing():
    pass


def no_args():
    return nn.ReLU(), torch.rand(3)


def other_options():
    return nn.ReLU(), (torch.rand(3),), {"opset": 19}


def no_module():
    return upsampler, (torch.rand(3),)


def raising():
    raise RuntimeError("my checkpoint is not there\\nand more")


number = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    """A module in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "exported_module.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import a_package_that_is_nowhere\n")
    yield
    for name in ("exported_module", "broken_module"):
        sys.modules.pop(name, None)


def test_the_names_are_those_of_python():
    assert [name.value for name in options.FormatName] == list(export.FORMATS)


def test_a_function_s_module_is_written_and_described(omniops, tmp_path):
    result = omniops("export", "exported_module:upsampler", "--out", "new/up.pt", "--check")
    assert (result.status, result.err) == (0, "")
    wrote, takes, returns, differs = result.out.splitlines()
    size = (tmp_path / "new/up.pt").stat().st_size
    assert wrote == f"Wrote new/up.pt, {size / 1e3:.1f} kB"
    assert (takes, returns) == ("  takes   low float32 (*, 4, *, *)", "  returns high float32 (*, 4, *, *)")
    assert differs.startswith("  differs from PyTorch by at most ")
    assert float(differs.split()[6]) < 1e-5
    assert torch.jit.load("new/up.pt")(torch.rand(1, 4, 2, 7)).shape == (1, 4, 4, 14)
    assert result.notes == ["omniops: loading PyTorch\n", "omniops: writing new/up.pt\n"]


def test_sizes_can_be_fixed_and_weights_in_half(omniops):
    result = omniops("export", "exported_module:upsampler", "--out", "up.pt", "--fixed-sizes", "--half")
    assert result.out.splitlines()[1:] == ["  takes   low float32 (2, 4, 3, 5)", "  returns high float32 (2, 4, 6, 10)"]
    assert {weight.dtype for weight in torch.jit.load("up.pt").state_dict().values()} == {torch.float16}


def test_a_file_is_replaced_if_that_is_asked_for(omniops, fails, tmp_path):
    (tmp_path / "a.pt").write_text("mine")
    line = fails("export", "exported_module:fixed", "--out", "a.pt", status=2)
    assert line.endswith("a.pt is there already: --overwrite replaces what is there")
    assert (tmp_path / "a.pt").read_text() == "mine"
    assert omniops("export", "exported_module:fixed", "--out", "a.pt", "--overwrite").status == 0
    assert torch.jit.load("a.pt")(torch.tensor([-1.0, 2.0, 3.0])).tolist() == [0, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "a."))) == ["a.pt"]


@pytest.mark.parametrize("existing", ["a.xml", "a.bin"])
def test_neither_file_of_openvino_is_replaced(fails, tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    line = fails("export", "exported_module:fixed", "--out", "a.xml", status=2)
    assert line.endswith(f"{existing} is there already: --overwrite replaces what is there")


def test_a_folder_of_core_ml_is_not_replaced(fails, tmp_path):
    (tmp_path / "a.mlpackage").mkdir()
    line = fails("export", "exported_module:fixed", "--out", "a.mlpackage", status=2)
    assert line.endswith("a.mlpackage is there already: --overwrite replaces what is there")


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("nowhere:model", 2, "nowhere:model: there is no module nowhere in this folder or among Python's packages"),
        ("exported_module:missing", 2, "exported_module has no function missing"),
        ("exported_module:number", 2, "exported_module has no function number"),
        ("broken_module:f", 1, "broken_module raised ModuleNotFoundError: No module named 'a_package_that_is_nowhere'"),
        ("exported_module:raising", 1, "exported_module:raising raised RuntimeError: my checkpoint is not there"),
        (
            "exported_module:nothing",
            2,
            "exported_module:nothing must return (module, args) or (module, args, dict with",
        ),
        ("exported_module:no_args", 2, "got for args Tensor"),
        ("exported_module:no_module", 2, "got for module function"),
        ("exported_module:other_options", 2, "got for the last opset"),
        ("exported_module:torch", 2, "exported_module has no function torch, but a module of that name"),
        ("exported_module:holes", 1, "call omniops.fill_holes on what the file returns"),
        (
            "exported_module:branching",
            1,
            f"exported_module.py:{MODULE[: MODULE.index('return x * 2')].count(chr(10)) + 1}, where it decides by what",
        ),
    ],
)
def test_what_is_wrong_with_a_function_is_said(fails, tmp_path, model, status, words):
    line = fails("export", model, "--out", "a.pt", status=status)
    assert words in line
    assert len(line) < 600
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("exported_module:fixed", "--out", "a.engine"),
            "--format is missing, and a.engine ends with none of .onnx, .xml",
        ),
        (
            ("exported_module:fixed", "--out", "a.pt", "--format", "aoti"),
            "--out must be a name that ends with .pt2 for",
        ),
        (("exported_module:fixed", "--out", "a.onnx", "--opset", "17"), "--opset must be 18 or later, got 17: PyTorch"),
        (("exported_module:fixed", "--out", "a.pt", "--opset", "19"), "--opset is of ONNX, and the format is torch"),
        (("exported_module:fixed", "--out", "a.pt", "--random-weights"), "--random-weights are of a detector or SAM 2"),
        (("exported_module:fixed", "--out", "a.pt", "--weights", "coco"), "--weights are of a detector"),
        (("exported_module:fixed", "--out", "a.pt", "--part", "mask-decoder"), "--part and --image-size are of SAM 2"),
        (("faster-rcnn-r50-carafe", "--out", "a.pt", "--image-size", "64"), "--part and --image-size are of SAM 2"),
        (("tiny", "--out", "a.pt", "--size", "64", "64"), "--size is of a detector; SAM 2 has --image-size"),
        (
            ("faster-rcnn-r50-carafe", "--random-weights", "--out", "a.pt", "--size", "0", "64"),
            "--size must be a height and a width of at least 2 pixels, got 0 64",
        ),
        (("faster-rcnn-r50-carafe", "--out", "a.pt"), "no weights: --weights coco fetches those that OpenMMLab"),
        (("tiny", "--out", "a.pt", "--weights", "coco"), "--weights are of a detector; SAM 2 is named by its"),
        (
            ("hiera", "--out", "a.pt", "--part", "mask-decoder"),
            "hiera is no model: detectors are mask-rcnn-r50-carafe and",
        ),
        (("tiny", "--random-weights", "--out", "a.onnx"), "--out must be a folder, for all parts of SAM 2, or one be"),
        (
            ("tiny", "--out", "a", "--format", "aoti", "--image-size", "33"),
            "--image-size must be a positive multiple of 32",
        ),
    ],
)
def test_wrong_use_is_said(fails, tmp_path, arguments, words):
    assert words in fails("export", *arguments, status=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]


def test_an_unknown_format_is_answered_with_those_there_are(omniops):
    result = omniops("export", "exported_module:fixed", "--out", "a.plan", "--format", "tensorrt")
    assert result.status == 2
    assert all(name in result.err for name in export.FORMATS)


def test_a_missing_package_is_named(fails, monkeypatch):
    monkeypatch.setattr(export.formats, "find_spec", lambda module: None)
    line = fails("export", "exported_module:fixed", "--out", "a.onnx", status=1)
    assert line.endswith("format 'onnx' needs onnx, which is not installed: pip install 'omniops[export]'")


def test_what_check_needs_is_asked_for_before_the_work(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(export.formats, "find_spec", lambda module: True)
    monkeypatch.setattr(export.compare, "find_spec", lambda module: None)
    line = fails("export", "exported_module:fixed", "--out", "a.onnx", "--check", status=1)
    assert line.endswith("onnxruntime, which runs ONNX files, is not installed: pip install onnxruntime")
    line = fails("export", "exported_module:fixed", "--out", "a.mlpackage", "--check", status=1)
    assert line.endswith("Core ML files are not run here: only Apple's systems run them")


def test_debug_has_the_traceback_of_the_function(omniops):
    result = omniops("export", "exported_module:raising", "--out", "a.pt", "--log-level", "debug")
    assert result.status == 1
    assert 'raise RuntimeError("my checkpoint is not there' in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "arguments", "output"),
    [
        ("tiny", ("--part", "memory-encoder", "--image-size", "64"), "maskmem_features float32"),
        ("faster-rcnn-r50-carafe", (), "image float32 (3, *, *)"),
        ("faster-rcnn-r50-carafe", ("--size", "48", "70"), "image float32 (3, 48, 70)"),
    ],
)
def test_models_are_known_by_name(omniops, monkeypatch, model, arguments, output):
    build = functools.partial(detection.faster_rcnn_resnet50_fpn_carafe, min_size=64, max_size=96)
    monkeypatch.setattr(detection, "faster_rcnn_resnet50_fpn_carafe", build)
    result = omniops("export", model, *arguments, "--random-weights", "--out", "m.pt", "--check")
    assert (result.status, result.err) == (0, "")
    wrote, *specs, difference = result.out.splitlines()
    assert wrote.startswith("Wrote m.pt, ")
    assert output in " ".join(specs)
    assert float(difference.split()[6]) < 1e-4


README = Path(__file__).parents[3] / "README.md"


@pytest.mark.slow
@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
def test_readme_s_line_runs_as_printed(omniops, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra export")
    (line,) = re.findall(r"^    omniops (export .*)  #", README.read_text(encoding="utf-8"), re.MULTILINE)
    result = omniops(*line.split())
    assert (result.status, result.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "sam2-tiny").iterdir()) == [
        "image_encoder.onnx",
        "mask_decoder.onnx",
        "memory_attention.onnx",
        "memory_encoder.onnx",
    ]


@pytest.mark.slow
def test_sam2_in_openvino(omniops, tmp_path):
    pytest.importorskip("openvino", reason="needs openvino, of the extra runtimes")
    arguments = ("tiny", "--random-weights", "--format", "openvino", "--out", "sam2-tiny", "--image-size", "64")
    result = omniops("export", *arguments, "--check")
    assert result.status == 0
    parts = ("image_encoder", "mask_decoder", "memory_attention", "memory_encoder")
    assert {path.name for path in (tmp_path / "sam2-tiny").iterdir()} == {
        f"{part}.{ending}" for part in parts for ending in ("xml", "bin")
    }
    assert "point_labels: int64 (B, P): 1 on the object" in result.out
    differences = [float(line.split()[6]) for line in result.out.splitlines() if "differs from PyTorch" in line]
    assert len(differences) == 4
    assert max(differences) < 1e-4


def test_parts_are_files_in_a_folder(omniops, fails, tmp_path, monkeypatch):
    wanted = []

    def parts(*arguments):
        wanted.append(arguments)
        args, names = (torch.rand(3),), (("x",), ("y",))
        return [
            export.Part(name, torch.nn.ReLU(), args, *names, None, "") for name in ("image_encoder", "mask_decoder")
        ]

    monkeypatch.setattr(command, "sam2_parts", parts)
    arguments = ("export", "small", "--random-weights", "--image-size", "64", "--out", "new", "--format", "torchscript")
    result = omniops(*arguments)
    assert (result.status, result.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["image_encoder.pt", "mask_decoder.pt"]
    wrote = [line.split(",")[0] for line in result.out.splitlines() if line.startswith("Wrote ")]
    assert wrote == ["Wrote new/image_encoder.pt", "Wrote new/mask_decoder.pt"]
    line = fails(*arguments, status=2)
    assert line.endswith(
        "new/image_encoder.pt, new/mask_decoder.pt are there already: --overwrite replaces what is there"
    )
    assert omniops(*arguments, "--overwrite", "--fixed-sizes").status == 0
    assert wanted == [("small", None, True, 64, fixed) for fixed in (False, False, True)]
