"""What the commands share: errors, output, progress, and the options that several of them take."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from omniops import device as devices

# The package's extras: what each installs, and the module that it is imported as.
EXTRAS = {
    "cli": {"typer": "typer", "rich": "rich"},
    "pictures": {"pillow": "PIL", "matplotlib": "matplotlib"},
    "detect": {"torchvision": "torchvision", "faster-coco-eval": "faster_coco_eval"},
    "sam2": {"transformers": "transformers", "av": "av"},
}

# Outside a terminal rich would wrap tables at 80 columns, whatever reads them.
_PIPED_WIDTH = 140


class CommandError(Exception):
    """Ends the command with one line: status 2 says that it was used wrongly, 1 that it failed."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


DEVICE_NAMES = "auto, cpu, cuda, cuda:1, mps, ..."

DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="D", help=DEVICE_NAMES, show_default="the GPU where there is one"),
]


def choose_device(name: str | None) -> torch.device:
    """``omniops.device.pick``, its errors as the command's."""
    try:
        device = devices.pick("auto" if name is None else name)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def digits(number: float) -> str:
    """Three significant digits, or all before the point: 0.00789, 0.100, 12.3, 1234."""
    return f"{number:#.3g}" if number < 99.95 else f"{number:.0f}"


def output() -> Console:
    """Where results go: coloured and as wide as the terminal, plain in a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def progress(*columns: ProgressColumn) -> Progress:
    """A progress bar, beside the results on stderr and gone at the end, with more columns if wanted."""
    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


def missing_packages(extra: str) -> list[str]:
    """What an extra would install that is not here."""
    return [package for package, module in EXTRAS[extra].items() if find_spec(module) is None]


def require_sam2() -> None:
    """Raise before any work where a package of that extra is missing."""
    pillow = [package for package in missing_packages("pictures") if package == "pillow"]
    for package in [*missing_packages("sam2"), *pillow]:
        raise CommandError(f"SAM 2 needs {package}, which is not installed: pip install 'omniops[sam2]'", status=1)
    try:
        import omniops.sam2.architectures  # noqa: F401
    except ImportError as error:  # of another version, which lacks something
        raise CommandError(f"SAM 2 cannot be used: {error}: pip install --upgrade 'omniops[sam2]'", status=1) from None


def require_pictures() -> None:
    """Raise before the long work starts where the extra that draws pictures is missing."""
    for package in missing_packages("pictures"):
        raise CommandError(
            f"pictures need {package}, which is not installed: pip install 'omniops[pictures]'", status=1
        )


def require_writable(path: Path | None) -> None:
    """Raise before the long work starts where its result could not be written to ``path``; make its folder."""
    if path is None:
        return
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


def require_picture_path(path: Path | None) -> None:
    """As ``require_writable``, and raise for a name whose ending is no picture format's."""
    if path is not None and path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"):
        raise CommandError(f"cannot write {path}: a picture's name ends with .png, .jpg, .pdf, .svg or .webp")
    require_writable(path)
