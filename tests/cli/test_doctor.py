"""omniops doctor: it says what the dispatcher does."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy
import PIL
import pytest
import torch

from omniops import environment
from omniops.backends import cpu, cuda, mps, reference
from omniops.cli import doctor


def test_it_shows_versions_devices_and_kernels(omniops):
    result = omniops("doctor")
    assert result.status == 0
    packages = environment.installed(environment.PACKAGES).values()
    for word in (*packages, *environment.operators(), cuda.TITLE, mps.TITLE, reference.TITLE):
        assert word in result.out
    assert ("The C++ kernels are not built" in result.out) == (not cpu.AVAILABLE)


@pytest.mark.parametrize(("backend", "device_type"), [(cpu, "cpu"), (cuda, "cuda"), (mps, "mps")])
def test_what_is_missing_comes_with_its_remedy(omniops, monkeypatch, backend, device_type):
    for module in (cpu, cuda, mps):
        monkeypatch.setattr(module, "AVAILABLE", module is not backend)
    (sentence,) = doctor.missing([device_type])
    assert f"the reference kernels serve {'the CPU' if backend is cpu else device_type}" in sentence
    assert backend.REMEDY in sentence


def test_a_missing_extra_comes_with_its_command(omniops, monkeypatch):
    assert doctor.missing_extras() == []
    assert "pip install 'omniops[" not in omniops("doctor").out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed: pip install 'omniops[pictures]'" in omniops("doctor").out
    for module in ("PIL", "typer", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    assert doctor.missing_extras() == [
        "typer and rich are not installed: pip install 'omniops[cli]'",
        "pillow and matplotlib are not installed: pip install 'omniops[pictures]'",
    ]


def test_it_shows_who_serves_the_libraries_that_can_be_enabled(omniops, monkeypatch):
    def library(installed=True, enabled=False, **serving):
        return SimpleNamespace(installed=lambda: installed, enabled=lambda: enabled, serving=lambda: serving)

    def broken():
        raise RuntimeError("mmcv is installed but cannot be imported")

    libraries = {
        "numpy": library(enabled=True, cpu="omniops", cuda="numpy"),  # a package that is here, for its version
        "mmcv": SimpleNamespace(installed=lambda: True, enabled=lambda: False, serving=broken),
        "sam2": library(installed=False, mps="never asked"),
    }
    monkeypatch.setattr(doctor, "LIBRARIES", libraries)
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"numpy": ["numpy"], "mmcv": ["numpy"]})
    lines = [" ".join(line.split()) for line in omniops("doctor").out.splitlines()]
    assert "library version enabled cpu cuda" in lines
    assert f"numpy {numpy.__version__} yes omniops numpy" in lines
    assert f"mmcv {numpy.__version__} (numpy) no" in lines
    assert "mmcv is installed but cannot be imported" in lines
    assert "sam2 not installed no" in lines


def test_a_library_without_a_distribution_has_an_unknown_version(monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", {"sam2": SimpleNamespace(installed=lambda: True)})
    assert doctor.library_version("sam2", {}) == "unknown"


def test_a_module_of_no_package_is_shown_as_such(omniops):
    lines = [" ".join(line.split()) for line in omniops("doctor").out.splitlines()]
    for name in ("MultiScaleDeformableAttention", "deform_conv_ext"):
        assert f"{name} of no package no omniops omniops omniops omniops" in lines
    assert "detectron2 not installed no" in lines


def test_without_the_compiled_module_it_says_so_in_a_sentence(omniops, monkeypatch):
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    result = omniops("doctor")
    assert result.status == 0
    assert "The C++ kernels are not built, so the reference kernels serve the CPU: " in result.out


def test_the_file_holds_what_is_shown_and_what_a_report_needs(omniops, tmp_path):
    path = tmp_path / "below" / "doctor.json"
    result = omniops("doctor", "--json", str(path))
    assert result.status == 0
    found = json.loads(path.read_text())
    assert found["versions"] == environment.versions()
    assert found["machine"] == environment.machine()
    assert {row["operator"] for row in found["operators"]} == set(environment.operators())
    assert found["devices"][0]["device"] == "cpu"
    assert all(word in result.out for row in found["operators"] for word in (row["kernel"], *row["dtypes"]))
    assert {"macos", "platform", "torch", "metal device"} <= set(found["system"])
    assert torch.__config__.show() == found["system"]["torch"]
    assert found["packages"]["typer"] == environment.installed(["typer"])["typer"]


def test_of_the_environment_only_settings_are_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0")
    monkeypatch.setenv("SECRET_TOKEN", "never shown")
    environment = doctor.facts()["system"]["environment"]
    assert environment["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.0"
    assert "never shown" not in json.dumps(doctor.facts())


def test_metal_names_its_device_where_torch_can_ask(monkeypatch):
    """Of a virtual machine it is another than the chip's."""
    metal = SimpleNamespace(
        is_available=lambda: True, get_name=lambda: "Apple Paravirtual device", get_core_count=lambda: 1
    )
    monkeypatch.setattr(torch.backends, "mps", metal)
    assert doctor._system()["metal device"] == "Apple Paravirtual device"
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: True))
    assert doctor._system()["metal device"] is None


def test_a_file_that_cannot_be_written_is_wrong_use(fails, tmp_path):
    assert fails("doctor", "--json", str(tmp_path), status=2).endswith("it is a folder")


def test_on_stdout_the_facts_are_alone(omniops):
    result = omniops("doctor", "--json", "-")
    assert (result.status, result.err, result.notes) == (0, "", [])
    found = json.loads(result.out)
    assert found["versions"] == environment.versions()
    needed = {
        "torchvision",
        "transformers",
        "sam2",
        "mmcv",
        "mmcv-lite",
        "av",
        "pillow",
        "safetensors",
        "huggingface-hub",
    }
    assert needed | {"opencv-python-headless", "faster-coco-eval", "typer", "flask"} <= set(found["packages"])
    assert found["packages"]["pillow"] == PIL.__version__


def test_it_shows_the_other_packages_that_are_here_and_no_others(omniops, monkeypatch):
    monkeypatch.setattr(doctor, "OTHER_PACKAGES", ("pillow", "no-such-package"))
    shown = " ".join(omniops("doctor").out.split())
    assert f"also installed pillow {PIL.__version__}, " in shown
    assert "no-such-package" not in shown


def test_it_knows_the_ffmpeg_that_reads_videos(omniops, monkeypatch):
    libraries = {"libavcodec": (61, 19, 101), "libavformat": (61, 7, 100)}
    spec = ModuleSpec("av", None)
    av = SimpleNamespace(ffmpeg_version_info="7.1.1", library_versions=libraries, __spec__=spec)
    monkeypatch.setitem(sys.modules, "av", av)
    assert doctor.facts()["ffmpeg"] == {"ffmpeg": "7.1.1", "libavcodec": "61.19.101", "libavformat": "61.7.100"}
    assert "FFmpeg 7.1.1" in " ".join(omniops("doctor").out.split())
    monkeypatch.setitem(sys.modules, "av", None)
    assert doctor.facts()["ffmpeg"] == {}
