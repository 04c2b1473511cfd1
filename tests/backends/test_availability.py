"""Which backends can serve: without a C++ compiler, on AMD's GPUs, on an old macOS."""

import platform
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch

from omniops.backends import cuda, mps


def anew(module):
    """The module as this very moment would import it, leaving the imported one as it is."""
    spec = spec_from_file_location("anew", module.__file__)
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


WITHOUT_THE_COMPILED_MODULE = """
import sys
sys.modules["omniops._C"] = None  # as if it were not there
import torch
import torch.nn.functional as F
import omniops

for name in ("carafe", "carafe_backward"):
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{name}", "CPU")

torch.manual_seed(0)
features = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
masks = torch.randn(2, 2 * 9, 8, 10, dtype=torch.float64, requires_grad=True)
patches = F.unfold(features, 3, padding=1).view(2, 2, 3, 9, 4, 5)
weights = masks.view(2, 2, 9, 4, 2, 5, 2)
expected = torch.einsum("ngckyx,ngkyaxb->ngcyaxb", patches, weights).reshape(2, 6, 8, 10)
result = omniops.carafe(features, masks, 3, 2, 2)
torch.testing.assert_close(result, expected)
grad = torch.randn_like(result)
inputs = features, masks
torch.testing.assert_close(torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad))

from omniops.cli import main
main(["doctor"])
"""


@pytest.mark.slow
def test_without_a_compiler_the_reference_serves_the_cpu_and_doctor_says_so():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_COMPILED_MODULE], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (
        "The C++ kernels are not built, so the reference kernels serve the CPU: install a C++17 compiler and Python's "
        "headers, then reinstall omniops, and they will." in run.stdout
    )


def test_amds_gpus_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    copy = anew(cuda)
    assert not copy.AVAILABLE
    assert "NVIDIA GPUs alone" in copy.REMEDY


@pytest.mark.parametrize(
    ("macos", "available"), [("13.7.1", False), ("14.0", True), ("15.5", True), ("26.0", True), ("", True)]
)
def test_metal_needs_macos_14(monkeypatch, macos, available):
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    copy = anew(mps)
    assert copy.AVAILABLE is available
    assert "macOS 14" in copy.REMEDY


def test_metal_needs_the_call_that_compiles_it(monkeypatch):
    monkeypatch.delattr(torch.mps, "compile_shader")
    assert not anew(mps).AVAILABLE
