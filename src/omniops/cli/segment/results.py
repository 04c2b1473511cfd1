"""The files that ``omniops segment`` writes of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from omniops.annotations.formats import Format
from omniops.cli.outputs import write_json, writing, writing_numbered_pictures
from omniops.cli.segment.files import DATASET, SETS, file_of_set, format_of, overlay_of
from omniops.cli.segment.options import Save
from omniops.cli.segment.prompts import Prompts
from omniops.cli.segment.records import Record, numbered_masks, sort_by_area
from omniops.cli.segment.request import Request

if TYPE_CHECKING:
    from omniops.annotations import Annotations


def write_picture(
    request: Request, pixels: NDArray[np.uint8], prompts: dict[int, Prompts], records: list[Record], *, is_one: bool
) -> Annotations | None:
    """Write what is asked for of a picture; returns its objects where a file of many pictures needs them.

    Args:
        request: for the picture.
        pixels: (H, W, 3), which are painted over.
        prompts: of each object.
        records: of each object.
        is_one: whether it is the only picture, with all of its files beside each other.
    """
    height, width = pixels.shape[:2]
    shown = sort_by_area(records)
    annotations = None
    needs_objects = any(save in SETS for save in request.save)
    for save in request.save:
        format = format_of(save)
        if format is not None:
            annotations = annotations or _annotations(request, records, height, width)
            _write_format(request, annotations, format, pixels, is_one)
    if Save.JSON in request.save:
        write_json(request.out.with_suffix(".json"), records, request.overwrite)
    if Save.MASK in request.save:
        from omniops.drawing import mask_image

        with writing(request.out, request.overwrite) as temporary:
            mask_image(numbered_masks(shown), height, width).save(temporary, format="PNG")
    if Save.OVERLAY in request.save:
        _write_overlay(request, pixels, prompts, shown)
    return None if is_one or not needs_objects else annotations


def write_sets(request: Request, folder: Path, pictures: Sequence[Annotations], names: Sequence[str]) -> list[Path]:
    """Write what is asked for of all pictures together; returns the files.

    Args:
        request: for one of them.
        folder: of the results.
        pictures: the objects of each, for COCO.
        names: of all pictures, those too that an earlier run has done.
    """
    from omniops import annotations

    written = []
    categories = request.labels.categories
    for save in request.save:
        if save in SETS:
            named = [_relative_to(picture, folder) for picture in pictures]
            polygons = save is Save.COCO_POLYGONS
            path = file_of_set(folder, save)
            write_json(path, annotations.to_coco(named, polygons=polygons, categories=categories), request.overwrite)
            written.append(path)
        elif save is Save.YOLO:
            path = folder / DATASET
            with writing(path, request.overwrite) as temporary:
                temporary.write_text(annotations.to_yolo_dataset(categories, _common_folder(names, folder)))
            written.append(path)
    return written


def _write_overlay(
    request: Request, pixels: NDArray[np.uint8], prompts: dict[int, Prompts], shown: list[Record]
) -> None:
    from PIL import Image

    from omniops.drawing import draw_prompts, paint

    paint(pixels, numbered_masks(shown))
    drawn = Image.fromarray(pixels)
    for number, object_prompts in prompts.items():
        draw_prompts(drawn, number, object_prompts.points, object_prompts.labels, object_prompts.box)
    with writing(overlay_of(request.out), request.overwrite) as temporary:
        drawn.save(temporary, format="JPEG", quality=90)


def _annotations(request: Request, records: list[Record], height: int, width: int) -> Annotations:
    from omniops.annotations import Annotation, Annotations

    objects = [
        Annotation(
            record["id"],
            record["segmentation"],
            request.labels.of(record["id"]),
            None if record.get("predicted_iou") is None else float(record["predicted_iou"]),
        )
        for record in records
    ]
    return Annotations(height, width, objects, request.source.name)


def _write_format(
    request: Request, annotations: Annotations, format: Format, pixels: NDArray[np.uint8], is_one: bool
) -> None:
    from omniops.annotations import files_of

    if not is_one and format in (Format.COCO, Format.COCO_POLYGONS):
        return
    stem = request.out.with_suffix("")
    files = files_of(annotations, stem, format, pixels=pixels, categories=request.labels.categories)
    if format.is_folder:
        (folder,) = format.paths(stem)
        with writing_numbered_pictures(folder) as temporary_folder:
            for path, content in files:
                (temporary_folder / path.name).write_bytes(content)
        return
    for path, content in files:
        if not is_one and path.suffix == ".yaml":  # one for all
            continue
        with writing(path, request.overwrite) as temporary:
            temporary.write_bytes(content)


def _relative_to(picture: Annotations, folder: Path) -> Annotations:
    return replace(picture, file_name=_path_from(folder, picture.file_name))


def _common_folder(names: Sequence[str], folder: Path) -> str:
    """The folder that all pictures are in, from that of the results on."""
    paths = [os.path.abspath(name) for name in names]
    return _path_from(folder, os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ".")


def _path_from(folder: Path, path: str) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return Path(path).absolute().as_posix()
