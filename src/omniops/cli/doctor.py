"""``omniops doctor``: what is installed, what was found, and which kernel serves which operator where."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.backends import BACKENDS, cpu, reference
from omniops.cli import cases
from omniops.cli.common import EXTRAS, dtype_name, missing_packages, output
from omniops.dropin import LIBRARIES

PACKAGES = ("omniops", "torch", "numpy", "triton")


def doctor() -> None:
    """Show versions, devices, and the kernel that serves each operator on each device.

    Example: omniops doctor
    """
    console = output()
    table = Table("", "", show_header=False, box=None)
    for name, value in {**versions(), **machine()}.items():
        table.add_row(name, value)
    console.print(table)

    table = Table("device", "name", "memory", box=SIMPLE_HEAD)
    here = devices.found()
    for device in here:
        limit = devices.memory(device).limit
        table.add_row(str(device), devices.title(device), "" if limit is None else f"{limit / 2**30:.1f} GiB")
    console.print(table)

    table = Table("operator", "device", "found", "kernel", "dtypes", box=SIMPLE_HEAD)
    types = {device.type for device in here}
    for operator in operators():
        for device_type in ("cpu", "cuda", "mps", *sorted(types - {"cpu", "cuda", "mps"})):
            backend = serving(operator, device_type)
            found = "yes" if device_type in types else "no"
            table.add_row(operator, device_type, found, backend.TITLE, _names(cases.dtypes(operator, backend)))
        table.add_row(operator, "any other", "", reference.TITLE, _names(cases.dtypes(operator, reference)))
    console.print(table)

    served = {library: who_serves(library) for library in LIBRARIES}
    columns = list(dict.fromkeys(device_type for servers, _ in served.values() for device_type in servers))
    caption = "Enabled in this process, which calls omniops.enable() for none: a program calls it for itself."
    table = Table("library", "version", "enabled", *columns, box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    for library, (servers, _) in served.items():
        is_enabled = "yes" if LIBRARIES[library].enabled() else "no"
        table.add_row(library, library_version(library), is_enabled, *(servers.get(each, "") for each in columns))
    console.print(table)

    for sentence in [*(why for _, why in served.values() if why), *missing(types), *missing_extras()]:
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)


def operators() -> list[str]:
    """The operators that omniops registered with PyTorch's dispatcher, without those that are another's backward."""
    names = (name.removeprefix("omniops::") for name in torch._C._dispatch_get_all_op_names() if "omniops::" in name)
    return sorted(name for name in names if "_backward_" not in name)


def serving(operator: str, device_type: str) -> ModuleType:
    """The backend that the dispatcher calls for an operator on a type of device."""
    key = _dispatch_key(device_type)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"omniops::{operator}", key):
        return next(backend for backend in BACKENDS if _serves(backend, device_type))
    return reference


def library_version(library: str) -> str:
    """The version of a library that ``omniops.enable`` knows, with its distribution where that is called otherwise."""
    if not LIBRARIES[library].installed():
        return "not installed"
    distributions = packages_distributions().get(library, [])
    found = (version(name) if name == library else f"{version(name)} ({name})" for name in dict.fromkeys(distributions))
    return ", ".join(found) or "unknown"


def who_serves(library: str) -> tuple[dict[str, str], str]:
    """For each type of device who serves a library there once it is enabled; or nothing, and why that is unknown."""
    if not LIBRARIES[library].installed():
        return {}, ""
    try:
        return LIBRARIES[library].serving(), ""
    except RuntimeError as error:
        return {}, str(error)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter here."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package, or that it is not installed."""
    return {package: _version(package) for package in packages}


def machine() -> dict[str, str]:
    """The machine in words, its CPU and the instruction set that the C++ kernels use on it."""
    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else platform.system()
    words = {"machine": f"{system} on {platform.machine()}, {os.cpu_count()} CPUs"}
    if cpu.AVAILABLE:
        compiled = import_module("omniops._C")
        words["instruction set"] = f"{compiled.instruction_set()}, of the C++ kernels"
    return words


def missing(device_types: Iterable[str]) -> list[str]:
    """For each backend that could serve a device of this machine and does not: what would change that."""
    sentences = []
    if not cpu.AVAILABLE:
        sentences.append(
            f"The C++ kernels are not built, so the reference kernels serve the CPU: {cpu.REMEDY}, and they will."
        )
    sentences += [
        f"The {backend.TITLE} kernels cannot run, so the reference kernels serve {device_type}: {backend.REMEDY}."
        for device_type in device_types
        for backend in BACKENDS
        if not backend.AVAILABLE and backend is not cpu and _serves(backend, device_type)
    ]
    return sentences


def missing_extras() -> list[str]:
    """For each extra that is not installed completely: what is missing, and the command that installs it."""
    sentences = []
    for extra in EXTRAS:
        packages = missing_packages(extra)
        if packages:
            verb = "is" if len(packages) == 1 else "are"
            sentences.append(f"{' and '.join(packages)} {verb} not installed: pip install 'omniops[{extra}]'")
    return sentences


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _serves(backend: ModuleType, device_type: str) -> bool:
    return bool(_dispatch_key(device_type) == backend.DISPATCH_KEY)


def _dispatch_key(device_type: str) -> str:
    return str(torch._C._dispatch_key_for_device(device_type))


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(map(dtype_name, dtypes))
