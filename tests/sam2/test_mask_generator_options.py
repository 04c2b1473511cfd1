"""The mask generator against the image predictor that is given its points one by one."""

from __future__ import annotations

import numpy as np
import pytest
from lively_model import lively as lively
from lively_model import photograph as photograph
from one_thread import one_thread as one_thread

from omniops.sam2 import rle
from omniops.sam2.image_predictor import SAM2ImagePredictor
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator

THRESHOLD = 6.0
"""Above which fewer masks end near the edges of crops."""


def predicted_one_by_one(predictor, picture, grids, crop_boxes):
    """Of each point of each crop the masks of the image predictor, at the size of the picture, and all that is said
    of them."""
    height, width = picture.shape[:2]
    for x0, y0, x1, y1 in crop_boxes:
        predictor.set_image(picture[y0:y1, x0:x1])
        for point in grids[(x0, y0, x1, y1) != (0, 0, width, height)] * (x1 - x0, y1 - y0):
            logits, ious, _ = predictor.predict(point[None].astype(np.float32), [1], return_logits=True)
            for crop_logits, iou in zip(logits, ious, strict=True):
                mask = np.zeros((height, width), bool)
                sure, possible = (crop_logits > THRESHOLD + 1).sum(), (crop_logits > THRESHOLD - 1).sum()
                mask[y0:y1, x0:x1] = crop_logits > THRESHOLD
                yield {
                    "mask": mask,
                    "predicted_iou": iou,
                    "stability_score": sure / max(1, possible),
                    "point": [point[0] + x0, point[1] + y0],
                    "crop_box": [x0, y0, x1 - x0, y1 - y0],
                }


def ends_at_an_inner_edge(record, shape) -> bool:
    """Whether the mask ends within 20 pixels of an edge of its crop that is more than 20 from the picture's."""
    x, y, crop_width, crop_height = record["crop_box"]
    rows, columns = record["mask"].nonzero()
    ends = (columns.min(), rows.min(), columns.max(), rows.max())
    edges, outer = (x, y, x + crop_width, y + crop_height), (0, 0, shape[1], shape[0])
    return any(abs(e - c) <= 20 < abs(e - o) for e, c, o in zip(ends, edges, outer, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
@pytest.mark.parametrize("upsampling", ["bilinear", "guided"])
def test_masks_are_those_of_the_image_predictor(lively, photograph, upsampling, mode):
    """With crops, both thresholds and small regions mended, all at once."""
    picture = photograph.repeat(3, 0).repeat(3, 1)
    grids = [np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) for line in ([0.2, 0.5, 0.7], [0.3, 0.45, 0.6])]
    height, width = picture.shape[:2]
    overlap = int(0.7 * height)
    sides = [(overlap + length + 1) // 2 for length in (width, height)]
    corners = [(x, y) for x in (0, sides[0] - overlap) for y in (0, sides[1] - overlap)]
    boxes = [(0, 0, width, height)] + [(x, y, min(x + sides[0], width), min(y + sides[1], height)) for x, y in corners]
    predictor = SAM2ImagePredictor(lively[1], max_hole_area=6, max_sprinkle_area=6, upsampling=upsampling)
    every = [record for record in predicted_one_by_one(predictor, picture, grids, boxes) if record["mask"].any()]
    min_iou, min_stability = (
        float(np.quantile([record[name] for record in every], 0.1)) for name in ("predicted_iou", "stability_score")
    )
    expected = [
        record
        for record in every
        if record["predicted_iou"] > min_iou
        and record["stability_score"] >= min_stability
        and not ends_at_an_inner_edge(record, picture.shape)
    ]
    generator = SAM2AutomaticMaskGenerator(
        lively[1],
        points_per_side=None,
        point_grids=grids,
        crop_n_layers=1,
        crop_overlap_ratio=0.7,
        pred_iou_thresh=min_iou,
        stability_score_thresh=min_stability,
        min_mask_region_area=6,
        mask_threshold=THRESHOLD,
        box_nms_thresh=1.0,
        crop_nms_thresh=1.0,
        output_mode=mode,
        upsampling=upsampling,
    )
    found = {
        (*record["point_coords"][0], record["predicted_iou"]): record
        for record in generator.generate(picture)
        if record["area"]
    }
    assert 5 <= len(expected) == len(found) < len(every)
    assert len({tuple(record["crop_box"]) for record in expected}) > 1
    for right in expected:
        (record,) = [
            found[key]
            for key in found
            if key == pytest.approx((*right["point"], right["predicted_iou"]), abs=1e-4)
            and found[key]["crop_box"] == right["crop_box"]
        ]
        mask = record["segmentation"] if mode == "binary_mask" else rle.decode(record["segmentation"])
        assert (mask != right["mask"]).sum() <= 2
        assert record["area"] == mask.sum()
        assert record["stability_score"] == pytest.approx(right["stability_score"], abs=1e-3)
    assert generator.upsampling == upsampling


def test_guided_masks_differ_from_others(lively, photograph):
    options = {"points_per_side": 2, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5, "output_mode": "coco_rle"}
    found = [SAM2AutomaticMaskGenerator(lively[1], **options, upsampling=name) for name in ("bilinear", "guided")]
    bilinear, guided = (generator.generate(photograph) for generator in found)
    assert [record["segmentation"] for record in bilinear] != [record["segmentation"] for record in guided]
    with pytest.raises(ValueError, match="upsampling must be bilinear or guided, got 'nearest'"):
        SAM2AutomaticMaskGenerator(lively[1], upsampling="nearest")
