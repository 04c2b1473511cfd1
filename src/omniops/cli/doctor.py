"""``omniops doctor``: what is installed, what was found, and which kernel serves which operator where."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions, version
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
from omniops.cli.common import EXTRAS, missing_packages, output, require_writable
from omniops.dropin import LIBRARIES
from omniops.dropin._extension import Extension
from omniops.environment import (
    NOT_INSTALLED,
    OTHER_PACKAGES,
    ffmpeg,
    installed,
    is_for,
    machine,
    operators,
    serving,
    versions,
)
from omniops.formatting import dtype_name


def doctor(
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write everything there, to attach to a report; - for stdout, and nothing else.",
        ),
    ] = None,
) -> None:
    """Show versions, devices, and the kernel that serves each operator on each device.

    Example: omniops doctor

    Example: omniops doctor --json -
    """
    is_stdout = json_file == Path("-")
    if not is_stdout:
        require_writable(json_file)
    found = facts()
    written = json.dumps(found, indent=1)
    if is_stdout:
        print(written)
        return
    if json_file is not None:
        json_file.write_text(written + "\n", encoding="utf-8")
    _show(found)


def _show(found: dict[str, Any]) -> None:
    console = output()
    others = [f"{name} {value}" for name, value in found["packages"].items() if value != NOT_INSTALLED]
    others += [f"FFmpeg {value}" for name, value in found["ffmpeg"].items() if name == "ffmpeg"]
    table = Table("", "", show_header=False, box=None)
    for name, value in {**found["versions"], **found["machine"], "also installed": ", ".join(others)}.items():
        table.add_row(name, value)
    console.print(table)

    table = Table("device", "name", "memory", box=SIMPLE_HEAD)
    for device in found["devices"]:
        limit = device["memory"]
        table.add_row(device["device"], device["name"], "" if limit is None else f"{limit / 2**30:.1f} GiB")
    console.print(table)

    table = Table("operator", "device", "found", "kernel", "dtypes", box=SIMPLE_HEAD)
    for row in found["operators"]:
        is_found = {True: "yes", False: "no", None: ""}[row["found"]]
        table.add_row(row["operator"], row["device"], is_found, row["kernel"], ", ".join(row["dtypes"]))
    console.print(table)

    served = found["libraries"]
    columns = list(dict.fromkeys(device_type for library in served for device_type in library["served by"]))
    caption = "Enabled in this process, which calls omniops.enable() for none: a program calls it for itself."
    table = Table("library", "version", "enabled", *columns, box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    for library in served:
        is_enabled = "yes" if library["enabled"] else "no"
        servers = library["served by"]
        table.add_row(
            library["library"], library["version"], is_enabled, *(servers.get(column, "") for column in columns)
        )
    console.print(table)

    for sentence in found["remarks"]:
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)


def facts() -> dict[str, Any]:
    """All that ``doctor`` knows, as JSON can hold it; memory in bytes."""
    found = devices.found()
    types = {device.type for device in found}
    served = {library: who_serves(library) for library in LIBRARIES}
    distributions = packages_distributions()  # reads the files of every installed package
    rows: list[tuple[str, str, bool | None, ModuleType]] = []
    for operator in operators():
        shown = ("cpu", "cuda", "mps", *sorted(types - {"cpu", "cuda", "mps"}))
        rows += [(operator, device_type, device_type in types, serving(operator, device_type)) for device_type in shown]
        rows.append((operator, "any other", None, reference))
    return {
        "versions": versions(),
        "machine": machine(),
        "system": _system(),
        "packages": installed(dict.fromkeys((*OTHER_PACKAGES, *(name for extra in EXTRAS.values() for name in extra)))),
        "ffmpeg": ffmpeg(),
        "devices": [
            {
                "device": str(device),
                "name": devices.title(device),
                "memory": devices.memory(device).limit,
                "half precision": dtype_name(devices.autocast_dtype(device)),
            }
            for device in found
        ],
        "operators": [
            {
                "operator": operator,
                "device": device_type,
                "found": is_found,
                "kernel": backend.TITLE,
                "dtypes": [dtype_name(dtype) for dtype in cases.dtypes(operator, backend)],
            }
            for operator, device_type, is_found, backend in rows
        ],
        "libraries": [
            {
                "library": library,
                "version": library_version(library, distributions),
                "enabled": LIBRARIES[library].enabled(),
                "served by": servers,
            }
            for library, (servers, _) in served.items()
        ],
        "remarks": [*(why for _, why in served.values() if why), *missing(types), *missing_extras()],
    }


def library_version(library: str, distributions: Mapping[str, list[str]]) -> str:
    """The version of a library that ``omniops.enable`` knows, with its distribution where that is called otherwise.

    ``distributions`` are as ``importlib.metadata.packages_distributions`` gives them.
    """
    if not LIBRARIES[library].installed():
        return "not installed"
    names = dict.fromkeys(distributions.get(library, []))
    found = (version(name) if name == library else f"{version(name)} ({name})" for name in names)
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
        "cudnn": torch.backends.cudnn.version(),
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
        if not backend.AVAILABLE and backend is not cpu and is_for(backend, device_type)
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
