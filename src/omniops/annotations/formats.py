"""What annotations can be written as, for who must know before PyTorch is imported."""

from __future__ import annotations

from enum import Enum
from pathlib import Path


class Format(str, Enum):
    """What annotations can be written as.

    Example:
        >>> [format.value for format in Format]
        ['coco', 'coco-polygons', 'yolo', 'masks', 'labels', 'cutouts', 'labelme']
    """

    COCO = "coco"
    COCO_POLYGONS = "coco-polygons"
    YOLO = "yolo"
    MASKS = "masks"
    LABELS = "labels"
    CUTOUTS = "cutouts"
    LABELME = "labelme"

    def paths(self, stem: Path) -> list[Path]:
        """Its files, or the folder of them where there is one for each object: ``stem`` with what is appended."""
        endings = {
            Format.COCO: ["-coco.json"],
            Format.COCO_POLYGONS: ["-coco-polygons.json"],
            Format.YOLO: [".txt", ".yaml"],
            Format.MASKS: ["-masks"],
            Format.LABELS: ["-labels.png"],
            Format.CUTOUTS: ["-cutouts"],
            Format.LABELME: ["-labelme.json"],
        }
        return [stem.with_name(stem.name + ending) for ending in endings[self]]

    @property
    def is_folder(self) -> bool:
        """Whether there is a file for each object, ``ID.png`` in a folder."""
        return self in (Format.MASKS, Format.CUTOUTS)
