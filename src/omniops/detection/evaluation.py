"""COCO's average precision and recall of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from omniops.detection import coco


class CocoEvaluator:
    """COCO's figures of a detector, from its detections image by image.

    Args:
        annotations: as ``omniops.detection.coco.read_annotations`` gives them. Where their categories are not COCO's,
            labels are taken for theirs in the order of their ids.
        category_ids: of each label, 0 of the background first, where the detector knows better.

    Example:
        >>> import torch
        >>> truck = {"image_id": 7, "category_id": 8, "bbox": [10, 10, 40, 30], "area": 1200}
        >>> annotations = {
        ...     "images": [{"id": 7, "file_name": "street.jpg", "width": 100, "height": 80}],
        ...     "categories": [{"id": 8, "name": "truck"}],
        ...     "annotations": [truck],
        ... }
        >>> evaluator = CocoEvaluator(annotations)
        >>> box, label = torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([8])
        >>> evaluator.update(7, {"boxes": box, "labels": label, "scores": torch.ones(1)})
        >>> round(evaluator.figures(masks=False)["bbox"]["AP"], 3)
        1.0
    """

    def __init__(self, annotations: Mapping[str, Any], category_ids: Sequence[int] | None = None) -> None:
        self.annotations = annotations
        self.category_ids = coco.label_ids(annotations) if category_ids is None else tuple(category_ids)
        """COCO's id of each label, 0 of the background first."""
        self.results: dict[int, list[dict[str, Any]]] = {}
        """COCO's results of each image that counts, by its id."""

    def update(self, image_id: int, detections: Mapping[str, Tensor]) -> None:
        """Count an image; ``detections`` are as torchvision's detectors give them."""
        self.results[image_id] = coco.to_results(detections, image_id, self.category_ids)

    def figures(self, masks: bool = True) -> dict[str, dict[str, float | None]]:
        """The figures of the images so far, by the names in ``omniops.detection.coco.FIGURES``.

        They do not depend on the order in which images came: among equal scores the first in the annotations counts.

        Returns:
            Those of boxes as ``bbox``; with ``masks``, and where every object has one, those of masks as ``segm``.
        """
        results = [result for image in self.annotations["images"] for result in self.results.get(image["id"], ())]
        figures = {"bbox": coco.average_precision(self.annotations, results, self.results)}
        if masks and coco.has_masks(self.annotations):
            figures["segm"] = coco.average_precision(self.annotations, results, self.results, masks=True)
        return figures
