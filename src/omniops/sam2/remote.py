"""Predictors in a process of their own, by ``omniops.remote``. PyTorch is imported when one is made."""

from __future__ import annotations

import os
import pkgutil
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from omniops.remote.errors import RemoteError

if TYPE_CHECKING:
    import torch

    from omniops.remote import Remote

__all__ = ["RemoteError", "remote"]

PREDICTORS = {
    "image": "omniops.sam2.image_predictor:SAM2ImagePredictor",
    "video": "omniops.sam2.video_predictor:SAM2VideoPredictor",
    "masks": "omniops.sam2.mask_generator:SAM2AutomaticMaskGenerator",
}


def remote(
    model: str | PathLike[str],
    *,
    predictor: str | type = "image",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    start_timeout: float = 300.0,
    **options: Any,
) -> Remote:
    """A predictor in a process of its own, which can use the GPU where this one cannot: in a forked web worker.

    It is an ``omniops.remote.Remote``, with the predictor's public methods and attributes; that class says when the
    process starts and ends, and what passes. It may be made before gunicorn forks its workers (``--preload``), each of
    which then has a process and a model of its own. ``init_state`` returns an ``omniops.remote.Handle``, which stands
    for the video's state there. Threads take turns, and a picture that one sets is set for all: hold a lock of your own
    around ``set_image`` and ``predict``. If the process dies, the call in progress raises ``RemoteError``, and the next
    one starts another. What needs the picture or a state of the old one raises ``RemoteError`` until ``set_image``,
    ``set_image_batch`` or ``init_state`` is called again. The first call raises what ``omniops.sam2.load`` does.

    Args:
        model, device, dtype: as ``omniops.sam2.load`` takes them.
        predictor: ``image`` for SAM2ImagePredictor, ``video`` for SAM2VideoPredictor, ``masks`` for
            SAM2AutomaticMaskGenerator; or a class that is constructed as they are, from a model, or its import path
            (``package.module:Class``).
        start_timeout: the seconds that the process may take to start and to load the model, with the model's download
            where it has to be fetched.
        options: of ``load`` (image_size, ...) and of the predictor.

    Raises:
        ValueError: for a predictor that no other process can import.
        OSError: on Windows, where a process cannot be given open file descriptors.

    Example:
        >>> import numpy as np
        >>> from omniops.sam2 import remote
        >>> image = np.zeros((48, 64, 3), np.uint8)
        >>> with remote("tiny", random_weights=True, image_size=64, device="cpu") as predictor:
        ...     predictor.set_image(image)
        ...     masks, scores, logits = predictor.predict(np.array([[32, 24]]), np.array([1]))
        >>> masks.shape
        (3, 48, 64)
    """
    from omniops.remote import Remote

    path = _import_path(predictor)
    source = fspath(model)
    if os.path.exists(source):
        source = os.path.abspath(source)  # the process may start when the working directory is another
    return Remote(
        make_predictor,
        (path, source, str(device), dtype, options),
        name=path.rpartition(":")[2],
        start_timeout=start_timeout,
        setters=("set_image", "set_image_batch"),
        resetters=("reset_predictor",),
        handles=("init_state",),
    )


def _import_path(predictor: str | type) -> str:
    from omniops.remote import import_path, is_import_path

    path = PREDICTORS[predictor] if predictor in PREDICTORS else import_path(predictor)
    if not is_import_path(path):
        raise ValueError(
            f"predictor must be one of {', '.join(PREDICTORS)}, or a class in a module that another process can import "
            f"(package.module:Class), got {path!r}"
        )
    return path


def make_predictor(path: str, model: str, device: str, dtype: str | torch.dtype, options: dict[str, Any]) -> Any:
    """Load the model and construct the predictor: in the process.

    Args:
        path: the predictor's import path.
        model, device, dtype: as ``omniops.sam2.load`` takes them.
        options: of ``load`` and of the predictor.
    """
    from omniops.sam2 import checkpoints

    predictor = pkgutil.resolve_name(path)
    loaded = checkpoints.load(model, device, dtype, **checkpoints.load_options(options))
    return predictor(loaded, **options)
