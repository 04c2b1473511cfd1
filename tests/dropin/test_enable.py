"""omniops.enable and omniops.disable: which libraries they take, and what they say of wrong arguments."""

from types import SimpleNamespace

import pytest

import omniops
from omniops import dropin


@pytest.fixture
def called(monkeypatch):
    """What was called of three stand-ins, of which mmcv is not installed."""
    calls = []

    def library(name, installed):
        return SimpleNamespace(
            installed=lambda: installed,
            enable=lambda devices: calls.append((name, devices)),
            disable=lambda: calls.append(name),
        )

    libraries = {"torchvision": library("torchvision", True), "mmcv": library("mmcv", False)}
    monkeypatch.setattr(dropin, "LIBRARIES", {**libraries, "sam2": library("sam2", True)})
    return calls


def test_without_names_it_takes_what_is_installed(called):
    omniops.enable()
    assert called == [("torchvision", None), ("sam2", None)]


def test_names_and_devices(called):
    omniops.enable("sam2", "torchvision", devices=["mps", "cuda"])
    assert called == [("torchvision", ("mps", "cuda")), ("sam2", ("mps", "cuda"))]


def test_disable_takes_all_three_or_those_named(called):
    omniops.disable()
    assert called == ["torchvision", "mmcv", "sam2"]
    called.clear()
    omniops.disable("mmcv")
    assert called == ["mmcv"]


@pytest.mark.parametrize(
    ("libraries", "devices", "error", "words"),
    [
        (["torch"], None, ValueError, "libraries must be among 'torchvision', 'mmcv', 'sam2', got 'torch'"),
        ([["sam2"]], None, TypeError, r"each an argument of its own, got \['sam2'\]"),
        (["sam2", "mmcv"], None, ModuleNotFoundError, "libraries must be installed to be enabled, got 'mmcv'"),
        ([], "cuda", TypeError, r"devices must be a sequence of types of devices, as \('cuda', 'cpu'\), got 'cuda'"),
        ([], 3, TypeError, "devices must be a sequence of types of devices, .* got 3"),
        ([], ["cpu", 1], TypeError, "devices must hold names of types of devices, as 'cuda', got 1"),
        ([], ["gpu"], ValueError, "devices must hold types of devices such as 'cpu', 'cuda' and 'mps', got 'gpu'"),
        ([], ["cuda:1"], ValueError, "got 'cuda:1': write 'cuda'"),
    ],
)
def test_wrong_arguments_enable_nothing(called, libraries, devices, error, words):
    with pytest.raises(error, match=words):
        omniops.enable(*libraries, devices=devices)
    assert called == []


def test_disable_refuses_a_wrong_name(called):
    with pytest.raises(ValueError, match="libraries must be among 'torchvision', 'mmcv', 'sam2', got 'torch'"):
        omniops.disable("sam2", "torch")
    assert called == []
