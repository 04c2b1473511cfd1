"""What the commands share: output, progress, and the options that several of them take.

PyTorch is imported when it is needed first, so that help and errors of use do not wait for it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from omniops.cli.errors import CommandError as CommandError
from omniops.cli.errors import raise_received, say, says

if TYPE_CHECKING:
    import torch

# The package's extras: what each installs, and the module that it is imported as.
EXTRAS = {
    "cli": {"typer": "typer", "rich": "rich"},
    "pictures": {"pillow": "PIL", "matplotlib": "matplotlib"},
    "detect": {"torchvision": "torchvision", "faster-coco-eval": "faster_coco_eval"},
    "sam2": {"huggingface-hub": "huggingface_hub", "safetensors": "safetensors", "av": "av"},
    "server": {
        "flask": "flask",
        "strawberry-graphql": "strawberry",
        **({"gunicorn": "gunicorn"} if os.name == "posix" else {"waitress": "waitress"}),
    },
}

# Outside a terminal rich would wrap tables at 80 columns, whatever reads them.
_PIPED_WIDTH = 140
_SECONDS_BETWEEN_NOTES = 10


DEVICE_NAMES = "auto, cpu, cuda, cuda:1, mps, ..."

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="D",
        help=f"{DEVICE_NAMES}; OMNIOPS_DEVICE says what auto is",
        show_default="the GPU where there is one",
    ),
]


def choose_device(name: str | None) -> torch.device:
    """``omniops.device.pick``, its errors as the command's."""
    import torch

    from omniops import device as devices

    try:
        device = devices.pick("auto" if name is None else name)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    raise_received()
    return device


class _Output(Console):
    """Which leaves it to ``errors`` what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise


def output() -> Console:
    """Where results go: coloured and as wide as the terminal, plain in a pipe or a file."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Output(width=None if is_terminal else _PIPED_WIDTH, highlight=False)


def print_lines(*lines: str, above: Progress | None = None) -> None:
    """Results, as they are, and at once; in a terminal above a progress bar that is running."""
    console = output()
    is_covered = above is not None and above.console.is_terminal and console.is_terminal
    if above is not None and is_covered:
        above.stop()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if above is not None and is_covered:
        above.start()


def progress(*columns: ProgressColumn) -> Progress:
    """A progress bar, beside the results on stderr and gone at the end, with more columns if wanted.

    There is none where stderr is no terminal, and with --quiet.
    """
    console = Console(stderr=True)
    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not (console.is_terminal and says("info")),
    )


class Heartbeat:
    """In place of a progress bar that nobody sees: a note on stderr, at most every ten seconds."""

    def __init__(self, bar: Progress) -> None:
        self._silent = bar.console.is_terminal
        self._last = perf_counter()

    def beat(self, text: str) -> None:
        """Say how far it is, if it is time; raise where a signal asked for the end."""
        raise_received()
        now = perf_counter()
        if not self._silent and now - self._last > _SECONDS_BETWEEN_NOTES:
            self._last = now
            say(text)


def missing_packages(extra: str) -> list[str]:
    """What an extra would install that is not here."""
    return [package for package, module in EXTRAS[extra].items() if find_spec(module) is None]


def require_sam2() -> None:
    """Raise before any work where a package of that extra is missing."""
    pillow = [package for package in missing_packages("pictures") if package == "pillow"]
    for package in [*missing_packages("sam2"), *pillow]:
        raise CommandError(f"SAM 2 needs {package}, which is not installed: pip install 'omniops[sam2]'", status=1)


def load_sam2() -> None:
    """Import what SAM 2 is made of, which takes seconds; raise where it is of a version that lacks something."""
    try:
        import omniops.sam2.architectures  # noqa: F401
    except ImportError as error:  # of another version, which lacks something
        raise CommandError(f"SAM 2 cannot be used: {error}: pip install --upgrade 'omniops[sam2]'", status=1) from None
    raise_received()


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
    except (FileExistsError, NotADirectoryError):
        raise CommandError(f"cannot write {path}: a folder in its way is a file") from None
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")
