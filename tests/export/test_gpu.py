"""Models on an NVIDIA GPU: AOTInductor's and TorchScript's files run there, the others on the CPU."""

import pytest
import torch
from export_models import dynamic, every_operator, inputs

from omniops import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(tensors):
    return tuple(tensor.cuda() for tensor in tensors)


@pytest.mark.parametrize("name", ["torchscript", "aoti"])
def test_a_file_runs_on_the_device_of_its_module(name, tmp_path):
    model = every_operator().cuda()
    path = tmp_path / f"model{export.FORMATS[name].suffix}"
    written = export.write(model, on_gpu(inputs()), path, dynamic_shapes=dynamic())
    for args in (inputs(), inputs(3, 4, 9, 5)):
        found = export.load(written)(on_gpu(args))
        assert all(tensor.is_cuda for tensor in found)
        assert export.largest_difference(written, model, on_gpu(args)) < 1e-5
    assert all(parameter.is_cuda for parameter in model.parameters())


@pytest.mark.parametrize("half", [False, True])
def test_other_files_are_of_no_device(half, tmp_path):
    pytest.importorskip("onnxruntime")
    model = every_operator().cuda()
    written = export.write(model, on_gpu(inputs()), tmp_path / "model.onnx", dynamic_shapes=dynamic(), half=half)
    for args in (inputs(), inputs(3, 4, 9, 5)):
        assert all(tensor.is_cpu for tensor in export.load(written)(args))
        assert export.largest_difference(written, model, on_gpu(args)) < (5e-3 if half else 1e-4)
    assert all(parameter.is_cuda for parameter in model.parameters())


def test_a_part_too(tmp_path):
    part = export.Part("relu", torch.nn.ReLU(), (torch.randn(2, 3).cuda(),), ("x",), ("y",), None, "")
    written = export.write_part(part, tmp_path / "relu.onnx")
    assert export.largest_difference(written, part.module, part.args) == 0
