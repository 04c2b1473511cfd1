"""Annotations in each format, read back by others or as they read it."""

import json

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures need Pillow")

from PIL import Image

from omniops.annotations import (
    Annotation,
    Annotations,
    Format,
    cut_out,
    davis_palette,
    files_of,
    from_masks,
    group_by_frame,
    label_image,
    save,
    to_coco,
    to_frame,
    to_labelme,
    to_yolo,
)
from omniops.sam2 import rle


def _fill(points, shape):
    """As ultralytics and LabelMe fill polygons, which cut off fractions."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV fills polygons")
    filled = np.zeros(shape, np.uint8)
    cv2.fillPoly(filled, [np.array(points).astype(np.int32)], 1)
    return filled > 0


def _read_yolo(path, shape):
    """The class and the mask of each line."""
    read = []
    for line in path.read_text().splitlines():
        label, *numbers = line.split()
        assert len(numbers) >= 6  # with fewer ultralytics takes it for a box
        points = np.array(numbers, np.float32).reshape(-1, 2)
        assert ((points >= 0) & (points <= 1)).all()
        pixels = points * np.array(shape[::-1], np.float32)
        assert np.array_equal(np.trunc(pixels), np.round(pixels))  # as other readers do
        read.append((int(label), _fill(points * np.array(shape[::-1], np.float32), shape)))
    return read


@pytest.mark.parametrize("format", ["coco", "coco-polygons"])
def test_pycocotools_reads_the_masks(annotations, masks, tmp_path, format):
    coco_module = pytest.importorskip("pycocotools.coco", reason="pycocotools reads COCO's JSON")
    (path,) = save(annotations, tmp_path / "out", format)
    assert path == tmp_path / f"out-{format}.json"
    coco = coco_module.COCO(path)
    assert coco.loadImgs([1]) == [{"id": 1, "file_name": "a.jpg", "width": 41, "height": 30}]
    assert coco.getAnnIds() == [4, 9]
    found = {record["id"]: record for record in coco.loadAnns([4, 9])}
    for number, mask, label, score in ((4, masks[0], "truck", 0.75), (9, masks[1], "wheel", 0.5)):
        record = found[number]
        assert isinstance(record["segmentation"], list if format == "coco-polygons" else dict)
        assert np.array_equal(coco.annToMask(record), mask)
        assert (record["area"], record["score"], record["iscrowd"]) == (int(mask.sum()), score, 0)
        assert coco.loadCats(record["category_id"])[0]["name"] == label
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, width, height = record["bbox"]
        assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_pycocotools_evaluates_masks_as_their_own_results(annotations, tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco", reason="pycocotools reads COCO's JSON")
    from pycocotools.cocoeval import COCOeval

    truth = coco_module.COCO(*save(annotations, tmp_path / "truth", "coco"))
    (polygons,) = save(annotations, tmp_path / "found", "coco-polygons")
    results = truth.loadRes(json.loads(polygons.read_text())["annotations"])
    evaluation = COCOeval(truth, results, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_pictures_of_a_data_set_share_their_classes(masks):
    first = from_masks(masks[:1], labels=["dog"], file_name="a.jpg")
    second = from_masks(masks[:2], labels=["cat", "dog"], file_name="b.jpg")
    coco = to_coco([first, second], categories=["cat", "dog", "cow"])
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg"]
    keys = ("id", "image_id", "category_id")
    assert [tuple(record[key] for key in keys) for record in coco["annotations"]] == [(1, 1, 2), (2, 2, 1), (3, 2, 2)]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog", "cow"]
    assert to_yolo(second, categories=["cat", "dog", "cow"]).splitlines()[1].startswith("1 ")
    for write in (lambda: to_coco([second], categories=["dog"]), lambda: to_yolo(second, categories=["dog"])):
        with pytest.raises(ValueError, match="categories must have all labels, and cat is not among them"):
            write()


def test_yolo_has_a_line_for_each_object(annotations, masks, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the classes")
    text, classes = save(annotations, tmp_path / "labels" / "a", "yolo")
    (truck, wheel) = _read_yolo(text, (30, 41))
    assert (truck[0], wheel[0]) == (0, 1)
    assert np.array_equal(truck[1], masks[0])
    # Two parts, and the line between them: from row 9 to row 22.
    assert wheel[1][masks[1]].all()
    added = np.argwhere(wheel[1] & ~masks[1])
    assert added[:, 0].tolist() == list(range(10, 22))
    assert yaml.safe_load(classes.read_text())["names"] == {0: "truck", 1: "wheel"}


def test_yolo_names_the_folder_of_the_pictures_and_classes_whatever_they_are(masks, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the classes")
    names = ['a "b": c', "naïve\n#", "no"]
    found = from_masks(masks[:2], labels=names[:2], file_name=str(tmp_path / "images" / "a.jpg"))
    _, classes = save(found, tmp_path / "labels" / "a", "yolo", categories=names)
    assert yaml.safe_load(classes.read_text()) == {
        "train": "../images",
        "val": "../images",
        "names": dict(enumerate(names)),
    }


@pytest.mark.parametrize("size", [(1, 1), (640, 640), (1200, 1800), (4999, 7001)])
def test_yolo_is_exact_whatever_the_size_of_the_picture(size, tmp_path):
    mask = np.zeros(size, bool)
    mask[0, 0] = mask[-1, -1] = True
    mask[size[0] // 3 : size[0] // 2, size[1] // 7 : size[1] // 2] = True
    for part in ((slice(None, size[0] // 2), slice(None)), (slice(size[0] // 2, None), slice(None))):
        found = np.zeros(size, bool)
        found[part] = mask[part]
        (path, _) = save(from_masks([found]), tmp_path / "a", "yolo", overwrite=True)
        for _, filled in _read_yolo(path, size):
            assert filled[found].all()
            assert (filled & ~found).sum() <= max(size)  # a line between two parts


def test_labelme_has_a_shape_for_each_part(annotations, masks):
    labelme = to_labelme(annotations)
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} == set(labelme)
    assert (labelme["imageHeight"], labelme["imageWidth"], labelme["imagePath"]) == (30, 41, "images/a.jpg")
    shapes = labelme["shapes"]
    assert [(shape["label"], shape["group_id"]) for shape in shapes] == [("truck", 4), ("wheel", 9), ("wheel", 9)]
    assert {shape["shape_type"] for shape in shapes} == {"polygon"}
    for number, mask in ((4, masks[0]), (9, masks[1])):
        parts = [_fill(shape["points"], mask.shape) for shape in shapes if shape["group_id"] == number]
        assert np.array_equal(np.any(parts, 0), mask)


def test_labelme_finds_the_picture_from_its_own_folder(masks, tmp_path):
    found = from_masks(masks, file_name=str(tmp_path / "images" / "a.jpg"))
    (path,) = save(found, tmp_path / "new" / "a", "labelme")
    assert json.loads(path.read_text())["imagePath"] == "../images/a.jpg"


def test_the_palette_is_the_one_of_davis():
    palette = davis_palette()
    assert len(set(palette)) == 256
    known = {
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {index: palette[index] for index in known} == known


def test_the_labels_are_ids_and_the_smallest_object_is_on_top(annotations, masks, tmp_path):
    (path,) = save(annotations, tmp_path / "out", "labels")
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), np.where(masks[1], 9, np.where(masks[0], 4, 0)))
        assert picture.convert("RGB").getpixel((5, 25)) == davis_palette()[9]
    one = label_image(from_masks(masks[:1]))
    assert (one.mode, np.array(one).max()) == ("P", 1)
    many = label_image(from_masks(masks, ids=[1, 2, 256]))
    assert (many.mode, np.array(many).max()) == ("I;16", 2)
    with pytest.raises(ValueError, match="ids must be at most 65535 in a picture, got 65536"):
        label_image(from_masks(masks[:1], ids=[65536]))


def test_each_object_has_a_picture_of_its_mask(annotations, masks, tmp_path):
    paths = save(annotations, tmp_path / "out", "masks")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [f"out-masks/{i}.png" for i in (4, 9, 7)]
    for path, mask in zip(paths, masks, strict=True):
        assert np.array_equal(np.array(Image.open(path)), mask * np.uint8(255))


def test_objects_are_cut_out_without_what_is_around_them(annotations, masks, pixels, tmp_path):
    paths = save(annotations, tmp_path / "out", "cutouts", pixels=pixels)
    assert [path.name for path in paths] == ["4.png", "9.png"]
    with Image.open(paths[0]) as picture:
        assert picture.mode == "RGBA"
        found = np.array(picture)
    box = (slice(2, 20), slice(3, 30))
    assert np.array_equal(found[..., 3], masks[0][box] * np.uint8(255))
    assert np.array_equal(found[..., :3], pixels[box] * masks[0][box][..., None])


def test_what_cannot_be_cut_out_is_named(annotations, pixels):
    with pytest.raises(TypeError, match="cutouts need pixels"):
        next(files_of(annotations, "out", "cutouts"))
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape \(30, 41, 3\), got uint8 \(29, 41, 3\)"):
        cut_out(pixels[1:], annotations.objects[0])
    with pytest.raises(ValueError, match="object 7 has no pixel to cut out"):
        cut_out(pixels, annotations.objects[2])


@pytest.mark.parametrize("format", list(Format))
def test_files_are_those_that_the_format_names_and_none_is_replaced(annotations, pixels, tmp_path, format):
    paths = save(annotations, tmp_path / "out.v2", format, pixels=pixels)
    named = format.paths(tmp_path / "out.v2")
    assert {path.parent for path in paths} == set(named) if format.is_folder else paths == named
    paths[-1].write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        save(annotations, tmp_path / "out.v2", format, pixels=pixels)
    assert paths[-1].read_bytes() == b"another's"
    save(annotations, tmp_path / "out.v2", format, pixels=pixels, overwrite=True)
    assert paths[-1].read_bytes() != b"another's"


@pytest.mark.parametrize("format", list(Format))
def test_nothing_found_is_written_as_nothing(masks, pixels, tmp_path, format):
    paths = save(from_masks(masks[2:]), tmp_path / "out", format, pixels=pixels)
    assert len(paths) == {"yolo": 2, "cutouts": 0}.get(format.value, 1)
    if format is Format.YOLO:
        assert paths[0].read_bytes() == b""


def test_an_unknown_format_is_refused(annotations):
    with pytest.raises(ValueError, match="'voc' is not a valid Format"):
        save(annotations, "out", "voc")


def test_a_frame_has_its_objects_with_what_is_known_of_them(annotations, masks):
    line = json.loads(json.dumps(to_frame(annotations, 3, 0.12)))
    assert (line["frame"], line["time"]) == (3, 0.12)
    assert [found["id"] for found in line["objects"]] == [4, 9, 7]
    for found, mask, score in zip(line["objects"], masks, (0.75, 0.5, 0.1), strict=True):
        assert np.array_equal(rle.decode(found["segmentation"]), mask)
        assert (found["area"], found["predicted_iou"]) == (int(mask.sum()), score)
    assert [found["bbox"] for found in line["objects"]] == [[3, 2, 27, 18], [5, 8, 9, 21], [0, 0, 0, 0]]
    numbers = Annotations(30, 41, [Annotation(1, rle.encode(masks[0]), score=np.float32(0.5))])
    assert json.loads(json.dumps(to_frame(numbers, 0, np.float32(0.5))))["objects"][0]["predicted_iou"] == 0.5
    unknown = to_frame(from_masks(masks), 0)
    assert set(unknown) == {"frame", "objects"}
    assert set(unknown["objects"][0]) == {"id", "bbox", "area", "segmentation"}


def test_records_of_a_video_become_a_line_for_each_frame(masks):
    records = [
        {"frame": frame, "time": frame / 25, "id": number, "segmentation": rle.encode(mask), "area": int(mask.sum())}
        for frame in (0, 1)
        for number, mask in ((1, masks[0]), (2, masks[1]))
    ]
    lines = list(group_by_frame(records))
    assert [(line["frame"], line["time"]) for line in lines] == [(0, 0), (1, 0.04)]
    for line in lines:
        assert [found["id"] for found in line["objects"]] == [1, 2]
        assert [found["segmentation"] for found in line["objects"]] == [rle.encode(mask) for mask in masks[:2]]
