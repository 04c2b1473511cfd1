"""Pictures and objects of a COCO annotation file, as the detectors train on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from omniops.detection import coco
from omniops.detection.inputs import Target
from omniops.detection.trained import Categories

if TYPE_CHECKING:
    from PIL.Image import Image

Reader = Callable[[Path, tuple[int, int]], Any]
"""Of a picture (H, W, 3) in RGB, uint8, from its path and its size as (width, height)."""

_SMALLEST = 0.01
"""In pixels, the side of a box below which it has no area: boxes are float32."""
_SHOWN = 3


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Pictures with their objects, in the order of the annotation file.

    An item is a picture, uint8 (3, H, W) in RGB, and its target: ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels, within
    the picture, ``labels`` int64 (N) from 1, and with masks ``masks`` uint8 (N, H, W) of 0 and 1, from polygons or run
    lengths. Pictures without objects have N = 0. Crowds and objects whose box has no area within the picture are left
    out, and counted in ``left_out``.

    Args:
        folder: of the pictures.
        annotations: as ``omniops.detection.coco.read_annotations`` gives them.
        masks: whether targets have masks.
        image_ids: the pictures that are in it; by default all.
        categories: what the labels stand for; by default the annotations', by their ids.
        read: reads a picture; by default Pillow, turned as its EXIF data says.

    Raises:
        FileNotFoundError: where pictures are not in the folder.
        ValueError: for names that lead out of the folder, objects without a mask where masks are wanted,
            categories that are not among those given, and where no picture is left.

    Example:
        >>> from PIL import Image
        >>> truck = {"image_id": 7, "category_id": 8, "bbox": [10, 10, 40, 30]}
        >>> annotations = {
        ...     "images": [{"id": 7, "file_name": "street.png", "width": 100, "height": 80}],
        ...     "categories": [{"id": 8, "name": "truck"}],
        ...     "annotations": [truck],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (100, 80)).save(f"{folder}/street.png")
        ...     image, target = CocoDataset(folder, annotations, masks=False)[0]
        >>> image.shape, target["boxes"].tolist(), target["labels"].tolist()
        (torch.Size([3, 80, 100]), [[10.0, 10.0, 50.0, 40.0]], [1])
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        annotations: Mapping[str, Any],
        *,
        masks: bool,
        image_ids: Collection[int] | None = None,
        categories: Categories | None = None,
        read: Reader | None = None,
    ) -> None:
        self.annotations = annotations
        self.categories = Categories.of(annotations) if categories is None else categories
        self.categories.require(annotations)
        wanted = None if image_ids is None else set(image_ids)
        self.images = [image for image in annotations["images"] if wanted is None or image["id"] in wanted]
        if not self.images:
            raise ValueError("no picture is left to look at: image_ids has none of those in the annotations")
        self.paths = [Path(folder) / coco.relative_path(image["file_name"]) for image in self.images]
        _require_files(self.paths, folder)
        self.masks = masks
        self.left_out = {"crowds": 0, "objects without area": 0}
        """How many objects are not trained on, and why."""
        self._read = read_rgb if read is None else read
        self._objects = self._collect()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, objects = self.images[index], self._objects[index]
        labels = self.categories.labels()
        target = {
            "boxes": torch.tensor([box for _, box in objects], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([labels[entry["category_id"]] for entry, _ in objects], dtype=torch.int64),
        }
        if self.masks:
            size = image["height"], image["width"]
            masks = [coco.decode_mask(entry["segmentation"], *size) for entry, _ in objects]
            target["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), np.uint8))
        return torch.from_numpy(self.picture(index)).permute(2, 0, 1), target

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The picture alone, (H, W, 3) in RGB.

        Raises:
            ValueError: for one that cannot be read or has another size than the annotations say.
        """
        image, path = self.images[index], self.paths[index]
        pixels: NDArray[np.uint8] = np.array(self._read(path, (image["width"], image["height"])), dtype=np.uint8)
        if pixels.shape != (image["height"], image["width"], 3):
            raise ValueError(f"{path} must be read as {image['height']} x {image['width']} x 3, got {pixels.shape}")
        return pixels

    @property
    def object_count(self) -> int:
        """How many objects are trained on."""
        return sum(map(len, self._objects))

    def count_objects(self, index: int) -> int:
        """How many objects of one picture are trained on."""
        return len(self._objects[index])

    def digest(self) -> str:
        """Of what is trained on, but for the pixels: another data set has another."""
        content = hashlib.sha256(repr((self.categories, self.masks)).encode())
        for image, objects in zip(self.images, self._objects, strict=True):
            entries = [
                (entry["category_id"], box, entry["segmentation"] if self.masks else None) for entry, box in objects
            ]
            content.update(repr((image["id"], image["width"], image["height"], entries)).encode())
        return content.hexdigest()

    def _collect(self) -> list[list[tuple[Mapping[str, Any], list[float]]]]:
        """The objects of each picture, with their boxes as corners."""
        own = {image["id"]: number for number, image in enumerate(self.images)}
        objects: list[list[tuple[Mapping[str, Any], list[float]]]] = [[] for _ in self.images]
        for position, entry in enumerate(self.annotations["annotations"]):
            number = own.get(entry["image_id"])
            if number is None:
                continue
            if entry.get("iscrowd"):
                self.left_out["crowds"] += 1
                continue
            box = _corners(entry["bbox"], self.images[number])
            if box[2] - box[0] < _SMALLEST or box[3] - box[1] < _SMALLEST:
                self.left_out["objects without area"] += 1
                continue
            if self.masks and not entry.get("segmentation"):
                raise ValueError(
                    f"annotations[{position}] has no 'segmentation', and a detector with masks needs one of every "
                    "object: train Faster R-CNN, or add them"
                )
            objects[number].append((entry, box))
        return objects


def hold_out(annotations: Mapping[str, Any], share: float, seed: int = 0) -> tuple[set[int], set[int]]:
    """The ids of the pictures to train on, and of a share of all that is held out, at least one of each.

    Which are held out depends on their ids and the seed alone, not on their order.

    Raises:
        ValueError: for a share that is not between 0 and 1, and for a single picture.

    Example:
        >>> train, validation = hold_out({"images": [{"id": number} for number in range(10)]}, share=0.2)
        >>> len(train), len(validation), train & validation
        (8, 2, set())
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    ids = sorted(image["id"] for image in annotations["images"])
    if len(ids) < 2:
        raise ValueError("nothing can be held out of a single picture")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(ids) - 1, max(1, round(share * len(ids))))
    return {ids[number] for number in order[count:]}, {ids[number] for number in order[:count]}


def read_rgb(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture by Pillow, turned as its EXIF data says or left as it is stored, whichever has that (width, height).

    Of grey pictures of 16 bits the upper 8 are taken.

    Raises:
        ValueError: for one that cannot be read, has another size, or has neither 8 nor 16 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as stored:
            turned = ImageOps.exif_transpose(stored)
            if turned.size == size or stored.size == size:
                return np.array(_eight_bits(turned if turned.size == size else stored).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise ValueError(f"cannot read {path}: {error}") from None
    raise ValueError(
        f"{path} has {turned.width} x {turned.height} pixels, its annotations {size[0]} x {size[1]}: is it another "
        "picture of that name?"
    )


def _eight_bits(picture: Image) -> Image:
    from PIL import Image

    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture)  # which Pillow would cut off at 255
    if picture.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its pixels have neither 8 nor 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _corners(box: Sequence[float], image: Mapping[str, Any]) -> list[float]:
    """x, y, width, height -> x1, y1, x2, y2 within the picture."""
    x, y, width, height = box
    return [
        max(0.0, float(x)),
        max(0.0, float(y)),
        min(float(image["width"]), float(x + width)),
        min(float(image["height"]), float(y + height)),
    ]


def _require_files(paths: Sequence[Path], folder: str | PathLike[str]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(str(path) for path in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} pictures are not in {folder}: {names}. What is not there has to be left "
            "out of the annotations"
        )
