"""Choosing a device by name, and waiting for it."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def found() -> list[torch.device]:
    """The devices of this machine that PyTorch can use: the CPU first, then every accelerator."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def choose(name: str | None = None) -> torch.device:
    """The device of that name, or the first accelerator where no name is given, or else the CPU.

    Args:
        name: as PyTorch writes it: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...

    Raises:
        ValueError: for a name that is no device's, or a device that this machine does not have.
    """
    here = found()
    if name is None:
        return here[min(1, len(here) - 1)]
    names = ", ".join(map(str, here))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: found here are {names}") from None
    alike = [each for each in here if each.type == device.type and device.index in (None, each.index or 0)]
    if not alike:
        raise ValueError(f"no device {name!r} for PyTorch {torch.__version__} on this machine: found here are {names}")
    return alike[0]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def title(device: torch.device) -> str:
    """What the hardware calls itself, as far as PyTorch can say: "NVIDIA H200", "Apple M2", "Apple M2, 8 threads"."""
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "mps":
        return _apple_chip() or "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def memory(device: torch.device) -> int | None:
    """The bytes of memory of an accelerator, None where PyTorch cannot say."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return int(module.get_device_properties(device).total_memory)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or _apple_chip() or platform.processor() or platform.machine()


def _apple_chip() -> str:
    """ "Apple M2", CPU and GPU in one; nothing where the system is no macOS."""
    try:
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return told.stdout.strip()
