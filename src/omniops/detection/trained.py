"""What a file that ``omniops detect-train`` wrote says of its detector: its architecture and its categories."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch

from omniops.detection.carafe_rcnn import COCO_CATEGORIES, COCO_CATEGORY_IDS
from omniops.weights import fetch

ARCHITECTURES = ("faster_rcnn_resnet50_fpn_carafe", "mask_rcnn_resnet50_fpn_carafe")
"""The functions of ``omniops.detection`` that build a detector."""
BACKGROUND = "__background__"
KEY = "detector"
"""Under which a file has it, beside ``state_dict``."""


class Categories(NamedTuple):
    """The categories that a detector's labels stand for, the background first."""

    ids: tuple[int, ...]
    """COCO's id of each label; 0 of the background, which may be another's too."""
    names: tuple[str, ...]
    """The name of each label; ``"__background__"`` of 0."""

    def labels(self) -> dict[int, int]:
        """The label of each id, the background's not."""
        return {number: label for label, number in enumerate(self.ids) if label}

    def require(self, annotations: Mapping[str, Any]) -> None:
        """Raise where an annotation file has categories that are not among these, by id and name.

        Raises:
            ValueError: naming the first.
        """
        names = dict(zip(self.ids[1:], self.names[1:], strict=True))
        for category in annotations["categories"]:
            number, name = category["id"], category["name"]
            if names.get(number) != name:
                known = f"{names[number]!r}" if number in names else "none"
                raise ValueError(
                    f"the category {name!r} of id {number} is {known} of the detector's: the categories must be the "
                    "same, by id and name"
                )

    @classmethod
    def of(cls, annotations: Mapping[str, Any]) -> Categories:
        """An annotation file's, by their ids.

        Example:
            >>> Categories.of({"categories": [{"id": 9, "name": "boat"}, {"id": 4, "name": "aeroplane"}]})
            Categories(ids=(0, 4, 9), names=('__background__', 'aeroplane', 'boat'))
        """
        names = {category["id"]: category["name"] for category in annotations["categories"]}
        return cls((0, *sorted(names)), (BACKGROUND, *(names[number] for number in sorted(names))))


COCO = Categories(COCO_CATEGORY_IDS, COCO_CATEGORIES)
"""COCO's 80, of which OpenMMLab's weights are."""


class Description(NamedTuple):
    """A detector's architecture and categories, and the size at which it looks at pictures.

    Example:
        >>> categories = Categories((0, 4), ("__background__", "boat"))
        >>> description = Description("faster_rcnn_resnet50_fpn_carafe", categories, min_size=640)
        >>> parse_description(description.as_plain(), "best.pth") == description
        True
    """

    architecture: str
    """The name of the function that builds it, one of ``ARCHITECTURES``."""
    categories: Categories
    min_size: int = 800
    """What the shorter side of a picture is resized to."""
    max_size: int = 1333
    """What the longer side is at most resized to."""

    def as_plain(self) -> dict[str, Any]:
        """Of texts and numbers, as it stands in a file."""
        return {
            "architecture": self.architecture,
            "category_ids": list(self.categories.ids),
            "category_names": list(self.categories.names),
            "min_size": self.min_size,
            "max_size": self.max_size,
        }


def read_description(source: str | PathLike[str], progress: bool = True) -> Description | None:
    """What a checkpoint says of its detector; None where it says nothing, as OpenMMLab's and bare state dicts.

    Args:
        source: the path or the URL of the checkpoint, as ``load_checkpoint`` takes it.
        progress: whether a download shows its progress.

    Raises:
        ValueError: for a description that is none, and a URL that names no file.
        ConnectionError: where it cannot be fetched.
    """
    location = fspath(source)
    path = fspath(fetch(location, progress)) if re.match(r"\w+://", location) else location
    try:
        content = load(path, mmap=True)
    except Exception:  # of many types; what reads the tensors says what is wrong with it
        return None
    found = content.get(KEY) if isinstance(content, Mapping) else None
    return None if found is None else parse_description(found, path)


def load(path: str | PathLike[str], mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU, where it is of tensors, numbers and texts; errors are of many types."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_categories(source: str | PathLike[str], progress: bool = True) -> Categories:
    """The categories of a checkpoint's detector: COCO's where it does not say, and of ``"coco"``.

    Raises:
        ValueError, ConnectionError: as ``read_description``.
    """
    description = None if source == "coco" else read_description(source, progress)
    return COCO if description is None else description.categories


def parse_description(content: Any, path: str | PathLike[str]) -> Description:
    """The description that a file holds.

    Raises:
        ValueError: for one that is not as ``Description.as_plain`` makes it.
    """
    entries: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    name: Any = entries.get("architecture")
    ids: Any = entries.get("category_ids")
    names: Any = entries.get("category_names")
    shorter: Any = entries.get("min_size")
    longer: Any = entries.get("max_size")
    if name in ARCHITECTURES and _are_categories(ids, names) and _are_sizes(shorter, longer):
        return Description(name, Categories(tuple(ids), tuple(names)), shorter, longer)
    raise ValueError(
        f"{fspath(path)} is damaged: as {KEY!r} it must have one of {', '.join(ARCHITECTURES)} as architecture, "
        "category_ids and category_names, the background's first, min_size and max_size"
    )


def _are_categories(ids: Any, names: Any) -> bool:
    if not (isinstance(ids, list) and isinstance(names, list)):
        return False
    if not all(type(number) is int for number in ids) or not all(type(name) is str for name in names):
        return False
    return 2 <= len(ids) == len(names) and ids[0] == 0 and len(set(ids[1:])) == len(ids) - 1


def _are_sizes(shorter: Any, longer: Any) -> bool:
    return all(type(size) is int and 0 < size < 2**16 for size in (shorter, longer))
