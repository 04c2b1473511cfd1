"""A set in COCO's format of small pictures with coloured shapes, with all that such sets have."""

import json

import numpy as np
from PIL import Image, ImageDraw

from omniops.detection import coco

CATEGORIES = [{"id": 20, "name": "disc"}, {"id": 3, "name": "square"}]
"""With gaps, and not in order."""
COLOURS = {3: (230, 60, 60), 20: (60, 220, 80)}


def make(folder, count=8, sizes=((64, 64), (80, 64), (64, 72)), seed=0):
    """Write pictures into ``folder/images`` and its folders; return the path of the annotations.

    The last picture has no objects. Masks are polygons, or run lengths of either kind.
    """
    random = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images" / "more").mkdir(parents=True)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = Image.fromarray(random.integers(0, 60, (height, width, 3), dtype=np.uint8))
        name = f"more/{number}.png" if number % 2 else f"{number}.png"
        images.append({"id": 7 * number, "file_name": name, "width": width, "height": height})
        for _ in range(0 if number == count - 1 else 1 + number % 2):
            side = int(random.integers(20, 36))
            x, y = int(random.integers(0, width - side)), int(random.integers(0, height - side))
            annotations.append(_draw(pixels, x, y, side, len(annotations)))
            annotations[-1]["image_id"] = 7 * number
        pixels.save(folder / "images" / name)
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def _draw(pixels, x, y, side, number):
    category = (3, 20)[number % 2]
    mask = Image.new("L", pixels.size)
    for image, colour in ((pixels, COLOURS[category]), (mask, 1)):
        draw = ImageDraw.Draw(image)
        draw_shape = draw.rectangle if category == 3 else draw.ellipse
        draw_shape([x, y, x + side - 1, y + side - 1], fill=colour)
    segmentation = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    if category == 20:
        encoded = coco.rle.encode(np.asfortranarray(mask))
        segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    elif number % 4 == 2:
        segmentation = run_lengths(np.asarray(mask))
    return {"category_id": category, "bbox": [x, y, side, side], "iscrowd": 0, "segmentation": segmentation}


def run_lengths(mask):
    """(H, W) of 0 and 1 -> COCO's uncompressed run lengths."""
    values = mask.ravel("F")
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), values.size]
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": counts if values[0] == 0 else [0, *counts]}
