"""Checkpoints of every model: fetched from a URL, read without running anything in them, and written whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import Request, urlopen
from uuid import uuid4

import torch
from torch import Tensor
from torch.hub import tqdm  # type: ignore[attr-defined]  # or its stand-in where tqdm is not installed

_PATIENCE = 5
"""Seconds of silence until a server counts as out of reach."""
_BLOCK = 2**17
_SHOWN = 4


def fetch(url: str, progress: bool = True) -> Path:
    """The file in torch's hub cache that a URL names, downloaded where it is not there yet.

    A name that ends with ``-`` and hexadecimal digits is checked against them, and any other is preceded there by
    digits that tell its URL from others.

    Raises:
        ValueError: for a URL that names no file, or what came with another checksum.
        ConnectionError: where the server cannot be reached, or falls silent.
    """
    _, _, location = re.split("[?#]", url)[0].partition("://")
    name = location.partition("/")[2].rpartition("/")[2]
    if not name:
        raise ValueError(f"{url} names no file: the URL of a checkpoint ends with the name of one, as .../model.pth")
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    if not digits:  # what another URL calls the same may be another file
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return path
    try:
        _download(url, path, digits[1] if digits else "", progress)
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"cannot fetch {url}: {error}. Download it where there is a network and put it at {path}, or pass the "
            "path of the file"
        ) from None
    return path


def read(path: Path, key: str = "state_dict") -> dict[str, Tensor]:
    """The tensors of a file by their names: of a ``.safetensors``, or what ``torch.save`` wrote, alone or under a key.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is none, holds something else, or more than tensors, numbers and texts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(import_module("safetensors.torch").load_file(path))
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is refused: it holds {found[1]}, which only running code could restore. A checkpoint needs "
                "tensors, numbers and texts alone: whoever trusts the file may save its state_dict again"
            ) from None
        # Not what PyTorch says then: it explains how to have the file's code run.
        raise ValueError(f"{path} is no checkpoint, or one that only running code could restore") from None
    except ImportError:
        raise ImportError(
            f"reading {path} needs safetensors, which is not installed: pip install safetensors"
        ) from None
    except Exception as error:  # of many types, whatever the bytes of a file that is none happen to mean
        raise ValueError(f"{path} is no checkpoint, or a damaged one") from error
    while isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
        content = content[key]
    if isinstance(content, Mapping):
        others = [
            f"{name!r:.60} ({type(value).__name__})"
            for name, value in content.items()
            if not (isinstance(name, str) and isinstance(value, Tensor))
        ]
    else:
        others = [f"one {type(content).__name__}"]
    if others:
        raise ValueError(
            f"{path} is no checkpoint: it holds no state dict but {shown(others)}. Expected are tensors by the names "
            f"of the model's parameters, alone or in a dict as {key!r}: what has them elsewhere may be saved again"
        )
    return {name.removeprefix("module."): value for name, value in content.items()}  # of DistributedDataParallel


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have a file written whole or not at all; what was there is replaced once it is on the disk.

    Raises:
        OSError: where it cannot be written.
    """
    temporary = path.with_name(f".omniops-{os.getpid()}-{uuid4().hex[:8]}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # PyTorch says that it is at another position than it should be, after an error of the file system.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def complaint(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from being loaded, or nothing."""
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in shapes],
    }
    return "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in problems.items() if names)


def shown(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])


def _download(url: str, path: Path, digits: str, progress: bool) -> None:
    """Write what a URL names; the path is there only once all of it came, with a checksum that begins with digits."""
    with ask(url) as answer:
        size = answer.headers["Content-Length"] and int(answer.headers["Content-Length"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        checksum = hashlib.sha256()
        try:
            with (
                partial.open("xb") as file,
                tqdm(total=size, disable=not progress, unit="B", unit_scale=True, unit_divisor=1024) as bar,
            ):
                while block := answer.read(_BLOCK):
                    file.write(block)
                    checksum.update(block)
                    bar.update(len(block))
                came = file.tell()
            if size and came < size:
                raise OSError(f"the connection ended after {came} of {size} bytes")
            if not checksum.hexdigest().startswith(digits):
                raise ValueError(
                    f"{url} came with another checksum than its name says: expected {digits!r}, got "
                    f"{checksum.hexdigest()!r}"
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def ask(url: str) -> Any:
    """A server's answer to be read, whose silence raises too: sockets' timeouts do not cover the look-up of its name.

    Raises:
        OSError: where there is none within seconds, or it is an error (``urllib.error.HTTPError``).
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(urlopen(Request(url, headers={"User-Agent": "torch.hub"}), timeout=_PATIENCE))
        except (OSError, HTTPException) as error:
            outcome.append(error)
        except Exception as error:  # of the URL itself
            outcome.append(OSError(str(error)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    answer = outcome[0] if outcome else TimeoutError(f"no answer within {_PATIENCE} seconds")
    if isinstance(answer, Exception):
        raise answer
    return answer


_OF_NUMPY = ("_reconstruct", "scalar")


class _Discarded:
    """In place of what a training's record is made of: whatever it is made with, nothing happens."""

    def __new__(cls, *_: object) -> _Discarded:
        """Of anything."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Of anything."""


def _harmless() -> list[Any]:
    """What OpenMMLab's checkpoints hold beside tensors: arrays and numbers of NumPy, and the record of the losses.

    None of it is made: an array of objects over bytes of the file's choice would be pointers of its choice.
    """
    return [
        *((_Discarded, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in _OF_NUMPY),
        (_Discarded, "numpy.ndarray"),
        (_Discarded, "numpy.dtype"),
        (_Discarded, "mmengine.logging.history_buffer.HistoryBuffer"),
        *((_Discarded, f"{module}.getattr") for module in ("builtins", "__builtin__")),  # to its methods
    ]
