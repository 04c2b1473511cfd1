"""Checkpoints of the detectors: fetched, read without running anything in them, and fitted to the model's names."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

_PATIENCE = 8
"""Seconds until a server counts as out of reach."""
_SHOWN = 4

# OpenMMLab's names, as patterns, and this package's.
_NAMES = {
    r"backbone\.": "backbone.body.",
    r"neck\.": "backbone.fpn.",
    r"rpn_head\.rpn_conv\.": "rpn.head.conv.0.0.",
    r"rpn_head\.rpn_cls\.": "rpn.head.cls_logits.",
    r"rpn_head\.rpn_reg\.": "rpn.head.bbox_pred.",
    r"roi_head\.bbox_head\.shared_fcs\.0\.": "roi_heads.box_head.fc6.",
    r"roi_head\.bbox_head\.shared_fcs\.1\.": "roi_heads.box_head.fc7.",
    r"roi_head\.bbox_head\.fc_cls\.": "roi_heads.box_predictor.cls_score.",
    r"roi_head\.bbox_head\.fc_reg\.": "roi_heads.box_predictor.bbox_pred.",
    r"roi_head\.mask_head\.convs\.(\d+)\.conv\.": r"roi_heads.mask_head.\1.0.",
    r"roi_head\.mask_head\.upsample\.": "roi_heads.mask_predictor.upsample.",
    r"roi_head\.mask_head\.conv_logits\.": "roi_heads.mask_predictor.mask_fcn_logits.",
}


def load_checkpoint(
    model: nn.Module, source: str | PathLike[str], *, fresh: Sequence[str] = (), progress: bool = True
) -> None:
    """Load a checkpoint into a detector of this package.

    Args:
        model: the detector.
        source: the path or the URL of OpenMMLab's checkpoint of the architecture, or of a state dict of such a model
            (``torch.save(model.state_dict(), path)``, or a ``.safetensors``). What a URL names is fetched once into
            torch's hub cache; a name that ends with ``-`` and hexadecimal digits is checked against them.
        fresh: the names of modules that keep what they have.
        progress: whether a download shows its progress.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as ``faster_rcnn_resnet50_fpn_carafe``.
    """
    place = fspath(source)
    path = _fetch(place, progress) if re.match(r"\w+://", place) else Path(place)
    state = _read(path)
    if any(name.startswith("roi_head.") for name in state):
        state = from_openmmlab(state)
    modules = dict(model.named_modules())
    for name in fresh:
        if name not in modules:
            raise ValueError(f"fresh must name modules of the model, got {name!r}")
    own = model.state_dict()
    for name, value in own.items():
        # Files of old versions lack the counters, which nothing reads.
        if name.startswith(tuple(f"{module}." for module in fresh)) or name.endswith("num_batches_tracked"):
            state[name] = value
    if complaint := _complaint(own, state):
        raise ValueError(f"{path} does not fit the model: {complaint}")
    model.load_state_dict(state)


def from_openmmlab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of MMDetection's Faster or Mask R-CNN with CARAFE -> that of this package's model.

    MMDetection has the background last among the scores and nowhere else. Here, as in torchvision, it is the first of
    the scores, boxes and masks; what has no counterpart is zero, and never looked at. Names that are not known stay.
    """
    converted = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES.items():
            name, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                break
        if ".cls_score." in name:
            value = value.roll(1, dims=0)
        elif ".box_predictor.bbox_pred." in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        elif ".mask_fcn_logits." in name:
            value = torch.cat([torch.zeros_like(value[:1]), value])
        converted[name] = value
    return converted


def _complaint(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from being loaded, or nothing."""
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    parts = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in shapes],
    }
    complaint = "; ".join(
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in parts.items()
        if names
    )
    heads = sorted({name.rpartition(".")[0] for name in shapes if "_predictor." in name})
    if heads:
        complaint += f". Is num_classes right? For other classes than the checkpoint's pass fresh={heads}"
    return complaint


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(import_module("safetensors.torch").load_file(path))
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is refused: it holds {found[1]}, which only running code could restore. A checkpoint needs "
                "tensors, numbers and texts alone: whoever trusts the file may save its state_dict again"
            ) from None
        raise ValueError(f"{path} is no checkpoint: {error}") from None
    except ImportError:  # safetensors is not installed
        raise
    except Exception as error:  # of many types, whatever the bytes of a file that is none happen to mean
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {error!r}") from None
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} is no checkpoint: it holds no state dict")
    return {name.removeprefix("module."): value for name, value in content.items()}  # of DistributedDataParallel


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


def _fetch(url: str, progress: bool) -> Path:
    """The file in torch's hub cache that a URL names, downloaded where it is not there yet."""
    name = url.partition("?")[0].rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return path
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    try:
        _require_answer(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits[1] if digits else None, progress)
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch {url}: {error}. Download it where there is a network and put it at {path}, or pass the "
            "path of the file"
        ) from None
    except RuntimeError as error:
        raise ValueError(f"{url} came with another checksum than its name says: {error}") from None
    return path


def _require_answer(url: str) -> None:
    """Raise where a server does not answer in time: sockets' own timeouts do not cover the look-up of its name."""
    errors: list[OSError] = [TimeoutError(f"no answer within {_PATIENCE} seconds")]

    def ask() -> None:
        try:
            urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=_PATIENCE).close()
            errors.clear()
        except OSError as error:
            errors[:] = [error]
        except Exception as error:  # of the URL itself
            errors[:] = [OSError(str(error))]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if errors:
        raise errors[0]
