"""Annotations as files: which there are of a format, and what is in them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniops.annotations.coco import to_coco
from omniops.annotations.formats import Format
from omniops.annotations.labelme import to_labelme
from omniops.annotations.objects import LABEL, Annotations
from omniops.annotations.pictures import cut_out, label_image, mask_picture
from omniops.annotations.yolo import to_yolo, to_yolo_dataset

if TYPE_CHECKING:
    from PIL.Image import Image


def files_of(
    annotations: Annotations,
    stem: str | PathLike[str],
    format: Format | str,
    *,
    pixels: NDArray[Any] | None = None,
    categories: list[str] | None = None,
) -> Iterator[tuple[Path, bytes]]:
    """The files of a format, one at a time, to be written by whoever asks for them; see ``save``.

    Yields:
        the path of each, and its content.

    Raises:
        TypeError, ValueError: as ``save``.

    Example:
        >>> annotations = from_masks([np.eye(2, 3, dtype=bool)])
        >>> [path.name for path, _ in files_of(annotations, "out/a", "masks")]
        ['1.png']
    """
    format, stem = Format(format), Path(stem)
    names = categories or annotations.labels or [LABEL]
    paths = format.paths(stem)
    if format is Format.MASKS:
        for annotation in annotations.objects:
            yield paths[0] / f"{annotation.id}.png", _png(mask_picture(annotation))
    elif format is Format.CUTOUTS:
        if pixels is None:
            raise TypeError("cutouts need pixels, those of the picture")
        for annotation in annotations.found:
            yield paths[0] / f"{annotation.id}.png", _png(cut_out(pixels, annotation))
    elif format is Format.LABELS:
        yield paths[0], _png(label_image(annotations))
    elif format is Format.YOLO:
        folder = _relative(Path(annotations.file_name).parent, stem.parent)
        yield paths[0], to_yolo(annotations, categories=names).encode()
        yield paths[1], to_yolo_dataset(names, folder).encode()
    elif format is Format.LABELME:
        named = replace(annotations, file_name=_relative(Path(annotations.file_name), stem.parent))
        yield paths[0], _json(to_labelme(named))
    else:
        named = replace(annotations, file_name=Path(annotations.file_name).name)
        yield paths[0], _json(to_coco([named], polygons=format is Format.COCO_POLYGONS, categories=names))


def save(
    annotations: Annotations,
    stem: str | PathLike[str],
    format: Format | str,
    *,
    pixels: NDArray[Any] | None = None,
    categories: list[str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the annotations of a picture in a format that other tools read.

    - ``coco``: ``STEM-coco.json`` with run lengths, ``coco-polygons``: ``STEM-coco-polygons.json`` with polygons;
      the picture by its name alone
    - ``yolo``: ``STEM.txt``, and ``STEM.yaml`` with the classes, and the folder of the picture as the data set's
    - ``masks``: ``STEM-masks/ID.png`` for each object, white inside
    - ``labels``: ``STEM-labels.png``, with the id of the object at each pixel, in DAVIS's palette
    - ``cutouts``: ``STEM-cutouts/ID.png`` for each object that has a pixel, as large as its box, transparent around it
    - ``labelme``: ``STEM-labelme.json``; the picture by its path from there

    Args:
        annotations: of the picture, with its path as ``file_name``.
        stem: the folder and the beginning of the names; the folder is made.
        format: one of them.
        pixels: (H, W, 3) in RGB, uint8; for ``cutouts``.
        categories: the names of the classes, in the order of their numbers, for ``coco`` and ``yolo``; by default the
            picture's labels.
        overwrite: replace files that are there.

    Returns:
        the files that were written.

    Raises:
        FileExistsError: where one is there, unless ``overwrite``. Those before it are written.
        TypeError: where ``pixels`` are missing.
        ValueError: for another format, or what the format cannot hold.

    Example:
        >>> annotations = from_masks([np.eye(2, 3, dtype=bool)], file_name="a.jpg")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save(annotations, f"{folder}/a", "yolo")]
        ['a.txt', 'a.yaml']
    """
    written = []
    for path, content in files_of(annotations, stem, format, pixels=pixels, categories=categories):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if overwrite else "xb") as file:
            file.write(content)
        written.append(path)
    return written


def _relative(path: Path, folder: Path) -> str:
    """A path from a folder on, with slashes as in the formats."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.absolute().as_posix()


def _json(value: Any) -> bytes:
    return (json.dumps(value, default=_to_number, allow_nan=False) + "\n").encode()


def _to_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
