"""What is here: versions, the machine, the operators, and the kernels that serve them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from omniops._torch_private import dispatch_key, has_kernel, operator_names
from omniops.backends import BACKENDS, cpu, reference

PACKAGES = ("omniops", "torch", "numpy", "triton")
NOT_INSTALLED = "not installed"
# What omniops calls, serves or is compared with, by the names that pip knows.
OTHER_PACKAGES = (
    "torchvision", "transformers", "timm", "sam2", "mmcv", "mmcv-lite", "mmdet", "mmengine", "detectron2",
    "safetensors", "huggingface-hub", "av", "pillow", "pillow-heif", "matplotlib", "opencv-python",
    "opencv-python-headless", "opencv-contrib-python", "faster-coco-eval", "pycocotools", "supervision",
    "ultralytics", "scipy", "typer", "rich", "flask", "strawberry-graphql", "gunicorn", "waitress",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter here."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package, or that it is not installed."""
    return {package: _version(package) for package in packages}


def ffmpeg() -> dict[str, str]:
    """The versions of the FFmpeg that PyAV brings and of its libraries; nothing where PyAV cannot be used."""
    try:
        av = import_module("av")
    except (ImportError, OSError):  # a library that it needs may be missing
        return {}
    libraries = {name: ".".join(map(str, numbers)) for name, numbers in av.library_versions.items()}
    return {"ffmpeg": str(av.ffmpeg_version_info), **libraries}


def machine() -> dict[str, str]:
    """The machine in words, its CPU and the instruction set that the C++ kernels use on it."""
    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else platform.system()
    words = {"machine": f"{system} on {platform.machine()}, {os.cpu_count()} CPUs"}
    if cpu.AVAILABLE:
        compiled = import_module("omniops._C")
        words["instruction set"] = f"{compiled.instruction_set()}, of the C++ kernels"
    return words


def operators() -> list[str]:
    """The operators that omniops registered with PyTorch's dispatcher, without those that are another's backward."""
    names = (name.removeprefix("omniops::") for name in operator_names() if "omniops::" in name)
    return sorted(name for name in names if not name.endswith("_backward"))


def serving(operator: str, device_type: str) -> ModuleType:
    """The backend that the dispatcher calls for an operator on a type of device."""
    if has_kernel(f"omniops::{operator}", dispatch_key(device_type)):
        return next(backend for backend in BACKENDS if is_for(backend, device_type))
    return reference


def is_for(backend: ModuleType, device_type: str) -> bool:
    """Whether a backend's kernels, where they can run, are for a type of device."""
    return bool(dispatch_key(device_type) == backend.DISPATCH_KEY)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
