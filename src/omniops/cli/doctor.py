"""``omniops doctor``: what is installed, what was found, and which kernel serves which operator where."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omniops import device as devices
from omniops.backends import BACKENDS, cpu, reference
from omniops.cli import cases
from omniops.cli.common import EXTRAS, dtype_name, missing_packages, output, require_writable
from omniops.dropin import LIBRARIES
from omniops.dropin._extension import Extension

PACKAGES = ("omniops", "torch", "numpy", "triton")


def doctor(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, to attach to a report.")
    ] = None,
) -> None:
    """Show versions, devices, and the kernel that serves each operator on each device.

    Example: omniops doctor
    """
    require_writable(json_file)
    found = facts()
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console = output()
    table = Table("", "", show_header=False, box=None)
    for name, value in {**found["versions"], **found["machine"]}.items():
        table.add_row(name, value)
    console.print(table)

    table = Table("device", "name", "memory", box=SIMPLE_HEAD)
    for each in found["devices"]:
        limit = each["memory"]
        table.add_row(each["device"], each["name"], "" if limit is None else f"{limit / 2**30:.1f} GiB")
    console.print(table)

    table = Table("operator", "device", "found", "kernel", "dtypes", box=SIMPLE_HEAD)
    for each in found["operators"]:
        is_found = {True: "yes", False: "no", None: ""}[each["found"]]
        table.add_row(each["operator"], each["device"], is_found, each["kernel"], ", ".join(each["dtypes"]))
    console.print(table)

    served = found["libraries"]
    columns = list(dict.fromkeys(device_type for each in served for device_type in each["served by"]))
    caption = "Enabled in this process, which calls omniops.enable() for none: a program calls it for itself."
    table = Table("library", "version", "enabled", *columns, box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    for each in served:
        is_enabled = "yes" if each["enabled"] else "no"
        servers = each["served by"]
        table.add_row(each["library"], each["version"], is_enabled, *(servers.get(column, "") for column in columns))
    console.print(table)

    for sentence in found["remarks"]:
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)


def facts() -> dict[str, Any]:
    """All that ``doctor`` knows, as JSON can hold it; memory in bytes."""
    here = devices.found()
    types = {device.type for device in here}
    served = {library: who_serves(library) for library in LIBRARIES}
    rows: list[tuple[str, str, bool | None, ModuleType]] = []
    for operator in operators():
        shown = ("cpu", "cuda", "mps", *sorted(types - {"cpu", "cuda", "mps"}))
        rows += [(operator, each, each in types, serving(operator, each)) for each in shown]
        rows.append((operator, "any other", None, reference))
    return {
        "versions": versions(),
        "machine": machine(),
        "system": _system(),
        "packages": installed(name for packages in EXTRAS.values() for name in packages),
        "devices": [
            {
                "device": str(device),
                "name": devices.title(device),
                "memory": devices.memory(device).limit,
                "half precision": dtype_name(devices.autocast_dtype(device)),
            }
            for device in here
        ],
        "operators": [
            {
                "operator": operator,
                "device": each,
                "found": is_found,
                "kernel": backend.TITLE,
                "dtypes": [dtype_name(dtype) for dtype in cases.dtypes(operator, backend)],
            }
            for operator, each, is_found, backend in rows
        ],
        "libraries": [
            {
                "library": library,
                "version": library_version(library),
                "enabled": LIBRARIES[library].enabled(),
                "served by": servers,
            }
            for library, (servers, _) in served.items()
        ],
        "remarks": [*(why for _, why in served.values() if why), *missing(types), *missing_extras()],
    }


def operators() -> list[str]:
    """The operators that omniops registered with PyTorch's dispatcher, without those that are another's backward."""
    names = (name.removeprefix("omniops::") for name in torch._C._dispatch_get_all_op_names() if "omniops::" in name)
    return sorted(name for name in names if not name.endswith("_backward"))


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
    of_no_package = isinstance(LIBRARIES[library], Extension) and not LIBRARIES[library].package
    return ", ".join(found) or ("of no package" if of_no_package else "unknown")


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


def _system() -> dict[str, Any]:
    """What a report of a wrong result needs beyond the versions."""
    metal = torch.backends.mps
    is_available = metal.is_available()
    return {
        "platform": platform.platform(),
        "macos": platform.mac_ver()[0],
        "torch": torch.__config__.show(),
        "torch commit": torch.version.git_version,
        "cuda": torch.version.cuda,
        # As Metal calls it, which tells a virtual machine's GPU; older versions of torch do not ask.
        "metal device": metal.get_name() if is_available and hasattr(metal, "get_name") else None,
        "metal cores": metal.get_core_count() if is_available and hasattr(metal, "get_core_count") else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("PYTORCH_", "OMNIOPS_"))},
    }


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
