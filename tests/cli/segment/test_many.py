"""omniops segment of many: pictures, folders, patterns, lists, a pipe, and what is written of them."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="needs PyAV")

from segment_files import half, noise, read_frames, read_json, run, write_picture, write_video

from omniops.sam2 import SAM2ImagePredictor, rle

POINT = ("--point", "1,2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abc"):
        write_picture(Path("in") / f"{name}.png", seed=i)
    return tmp_path


def test_each_of_several_gets_its_files_in_one_folder(omniops, scripted, folder):
    result = run(omniops, "in/b.png", "in/a.png", *POINT)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[:2] == ["in/b.png -> omniops-masks/b.png: 1 object", "in/a.png -> omniops-masks/a.png: 1 object"]
    assert lines[2].startswith("2 pictures in ")
    assert lines[3] == "Wrote what was found to omniops-masks"
    assert sorted(path.name for path in Path("omniops-masks").iterdir()) == [
        "a-overlay.jpg", "a.json", "a.png", "b-overlay.jpg", "b.json", "b.png",
    ]  # fmt: skip
    assert read_json(Path("omniops-masks/a.json"))[0]["area"] == 20 * 30


def test_the_masks_of_each_are_its_own(omniops, loaded, folder):
    assert run(omniops, "in/?.png", "--point", "10,20", "--save", "json", "--out", "out").status == 0
    predictor = SAM2ImagePredictor(loaded)
    for i, name in enumerate("abc"):
        predictor.set_image(noise(seed=i))
        masks, scores, _ = predictor.predict([[10, 20]], [1])
        (record,) = read_json(Path(f"out/{name}.json"))
        assert np.array_equal(rle.decode(record["segmentation"]), masks[scores.argmax()] > 0)


def test_the_model_is_loaded_once(omniops, folder, monkeypatch, model):
    from omniops.cli.segment import model as segment_model

    loads = []
    monkeypatch.setattr(segment_model, "load_model", lambda *args: loads.append(args) or model)
    write_video(Path("in/v.mp4"))
    assert run(omniops, "in/a.png", "in/v.mp4", "in/b.png", *POINT, "--out", "out").status == 0
    assert len(loads) == 1
    assert len(read_frames(Path("out/v.mp4"))) == 6


def test_pictures_of_a_folder(omniops, scripted, folder):
    assert run(omniops, "in", *POINT, "--pictures", "--save", "mask", "--out", "out").status == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png", "c.png"]


def test_everything_takes_the_pictures_of_a_folder(omniops, loaded, folder):
    thresholds = ("--pred-iou-thresh", "0", "--stability-score-thresh", "0")
    result = run(omniops, "in", "--everything", "--grid", "2", *thresholds, "--save", "json", "--out", "out")
    assert result.status == 0
    assert len(read_json(Path("out/c.json"))) > 0


def test_lists_from_stdin(omniops, scripted, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("in/c.png\nin/a.png\n"))
    result = run(omniops, "--files-from", "-", *POINT, "--save", "json", "--out", "out")
    assert [line.partition(" ")[0] for line in result.out.splitlines()[:2]] == ["in/c.png", "in/a.png"]


def _pipe(monkeypatch, content):
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)))
    monkeypatch.setattr(sys, "stdin", stdin)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_from_a_pipe(omniops, scripted, folder, monkeypatch, kind):
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, format=kind)
    _pipe(monkeypatch, file.getvalue())
    assert run(omniops, "-", *POINT, "--out", "out.png").status == 0
    assert np.array_equal(np.array(Image.open("out.png")) > 0, half(30, 40, "left"))


def test_a_damaged_picture_from_a_pipe(omniops, never_loaded, folder, monkeypatch):
    _pipe(monkeypatch, Path("in/a.png").read_bytes()[:300])
    result = run(omniops, "-", *POINT, "--out", "out.png")
    assert (result.status, "cannot read stdin" in result.err) == (2, True)


def test_what_fails_is_named_and_the_others_are_done(omniops, scripted, folder):
    Path("in/b.png").write_bytes(Path("in/b.png").read_bytes()[:300])
    write_picture(Path("in/d.png"), (1, 1))
    result = run(omniops, "in/?.png", *POINT, "--save", "mask", "--out", "out")
    assert result.status == 1
    damaged, small, last = result.err.splitlines()
    assert damaged.startswith("omniops: error: cannot read in/b.png")
    assert small == "omniops: error: --point 1,2: it is outside: in/d.png has 1 x 1 pixels"
    assert last == "omniops: error: 2 of 4 failed"
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "c.png"]


def test_a_disk_that_is_full_is_named_for_each(omniops, scripted, folder, monkeypatch):
    from omniops.cli import errors
    from omniops.cli.segment import results

    def full(path, value, overwrite, indent=None):
        raise errors.CommandError(f"cannot write {path}: No space left on device", status=1)

    monkeypatch.setattr(results, "write_json", full)
    result = run(omniops, "in/?.png", *POINT, "--save", "json", "--out", "out")
    assert result.status == 1
    assert "cannot write out/a.json: No space left on device" in result.err
    assert result.err.endswith("3 of 3 failed\n")


def test_an_interruption_keeps_what_is_done(omniops, scripted, folder, monkeypatch):
    from omniops.cli.segment.picture import _Segmenter

    segment = _Segmenter.segment
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(self, *arguments)

    monkeypatch.setattr(_Segmenter, "segment", interrupted)
    result = run(omniops, "in/?.png", *POINT, "--save", "mask", "--save", "coco", "--out", "out")
    assert result.status == 130
    assert result.err == "omniops: error: interrupted: 2 of 3 were done\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png", "coco.json"]
    assert len(read_json(Path("out/coco.json"))["images"]) == 2


def test_pictures_of_one_name_are_numbered(omniops, scripted, folder):
    write_picture(Path("other/a.png"))
    write_picture(Path("third/A.jpg"))
    files = ("in/a.png", "other/a.png", "third/A.jpg")
    assert run(omniops, *files, *POINT, "--save", "mask", "--out", "out").status == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["A-3.png", "a-2.png", "a.png"]


@pytest.mark.parametrize(("arguments", "reason"), [
    (("in/a.png", "none.png"), "no such file: none.png"),
    (("*.tiff",), "nothing there is called *.tiff"),
    (("in/a.png", "-"), "- is a picture or a video from stdin, and is read alone"),
    (("in/a.png", "rtsp://127.0.0.1/x"), "rtsp://127.0.0.1/x is a live video, which is read alone"),
    (("in/a.png", "--camera", "0"), "--camera is read alone"),
    ((), "nothing to read"),
    (("in/a.png", "in/b.png", "--out", "in/a.png"), "--out in/a.png must be a folder"),
    (("in/a.png", "in/b.png", "--out", "out.png"), "--out out.png must be a folder"),
    (("in/a.png", "--frames", "3"), "--frames is for live video"),
    (("in/a.png", "--show"), "--show is for live video"),
    (("in/a.png", "--save", "jsonl"), "--save jsonl: of a picture, in/a.png, one can save mask, overlay, json, coco"),
    (("in/v.mp4", "--save", "yolo"), "--save yolo: of a video, in/v.mp4, one can save overlay, json, jsonl, labels"),
    (("in/a.png", "--label", "a", "--label", "b"), "--label b: a is the class of all objects"),
    (("in/a.png", "--label", "a#0"), "--label must be NAME or NAME#OBJECT, once for each object, got 'a#0'"),
    (("in/a.png", "--label", " "), "--label must not be empty"),
])  # fmt: skip
def test_wrong_use(fails, never_loaded, folder, arguments, reason):
    write_video(Path("in/v.mp4"))
    assert reason in fails("segment", *arguments, *POINT, "--device", "cpu", status=2)


def test_pictures_in_a_folder_are_its_frames_without_pictures(omniops, tracker, folder):
    assert run(omniops, "in", *POINT, "--out", "out.mp4").status == 0
    assert len(read_frames(Path("out.mp4"))) == 3


def test_formats_of_one_picture_are_beside_each_other(omniops, scripted, folder):
    saves = ("coco", "coco-polygons", "yolo", "masks", "labels", "cutouts", "labelme")
    options = [option for save in saves for option in ("--save", save)]
    command = ("in/a.png", *POINT, "--point", "30,2#2", "--label", "leaf", "--label", "stem#2", *options)
    result = run(omniops, *command, "--out", "out/a.png")
    assert (result.status, result.err) == (0, "")
    assert sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*.*")) == [
        "a-coco-polygons.json", "a-coco.json", "a-cutouts/1.png", "a-cutouts/2.png", "a-labelme.json", "a-labels.png",
        "a-masks/1.png", "a-masks/2.png", "a.txt", "a.yaml",
    ]  # fmt: skip
    assert [category["name"] for category in read_json(Path("out/a-coco.json"))["categories"]] == ["leaf", "stem"]
    assert read_json(Path("out/a-labelme.json"))["imagePath"] == "../in/a.png"
    assert np.array_equal(np.array(Image.open("out/a-masks/1.png")) == 255, half(30, 40, "left"))
    assert [line.split()[0] for line in Path("out/a.txt").read_text().splitlines()] == ["0", "1"]


def test_folders_of_masks_are_not_mixed_with_those_of_another_run(omniops, scripted, folder):
    command = ("in/a.png", *POINT, "--save", "masks", "--out", "out/a.png")
    assert run(omniops, *command, "--point", "30,2#7").status == 0
    again = run(omniops, *command)
    assert (again.status, "out/a-masks is there already" in again.err) == (2, True)
    Path("out/a-masks/notes.txt").touch()
    assert run(omniops, *command, "--overwrite").status == 0
    assert sorted(path.name for path in Path("out/a-masks").iterdir()) == ["1.png", "notes.txt"]


def test_many_pictures_share_cocos_file_and_yolos_classes(omniops, scripted, folder):
    write_picture(Path("in/more/d.png"))
    files = ("in/a.png", "in/b.png", "in/more/d.png")
    saves = ("--save", "coco", "--save", "yolo", "--label", "leaf")
    result = run(omniops, *files, *POINT, *saves, "--out", "out")
    assert result.out.endswith("Wrote what was found to out, and out/coco.json, out/data.yaml\n")
    coco = read_json(Path("out/coco.json"))
    assert [image["file_name"] for image in coco["images"]] == ["../in/a.png", "../in/b.png", "../in/more/d.png"]
    assert [record["image_id"] for record in coco["annotations"]] == [1, 2, 3]
    assert Path("out/data.yaml").read_text().splitlines()[0] == 'train: "../in"'
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.txt", "b.txt", "coco.json", "d.txt", "data.yaml"]


def test_a_video_as_lines_and_labels(omniops, tracker, folder):
    write_video(Path("in/v.mp4"))
    saves = ("--save", "jsonl", "--save", "labels")
    result = run(omniops, "in/v.mp4", "--point", "1,2@2", "--point", "40,2@2#2", *saves, "--out", "out/v.mp4")
    assert result.out.splitlines()[-1] == "Wrote out/v.jsonl and out/v-labels"
    lines = [json.loads(line) for line in Path("out/v.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(6))  # and not as they were found, back from frame 2
    assert lines[3]["time"] == pytest.approx(3 / 25)
    assert [(found["id"], found["bbox"], found["area"], found["predicted_iou"]) for found in lines[3]["objects"]] == [
        (1, [0, 0, 24, 32], 24 * 32, 0.5), (2, [24, 0, 24, 32], 24 * 32, 0.25),
    ]  # fmt: skip
    assert sorted(path.name for path in Path("out/v-labels").iterdir()) == [f"{i:05d}.png" for i in range(6)]
    labels = np.array(Image.open("out/v-labels/00003.png"))
    assert (labels[:, :24] == 1).all()
    assert (labels[:, 24:] == 2).all()
    assert not Path("out/v.mp4").exists()


def test_a_video_keeps_its_sound(omniops, tracker, folder):
    import av

    path = Path("in/v.mp4")
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=25), container.add_stream("aac", rate=48000)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for i in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 9 * i, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48000
        container.mux(sound.encode(samples))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    assert run(omniops, path, *POINT, "--out", "out.mp4").status == 0
    with av.open("out.mp4") as container:
        assert container.streams.audio[0].codec.canonical_name == "aac"
        assert float(container.streams.audio[0].duration * container.streams.audio[0].time_base) > 0.9
    assert len(read_frames(Path("out.mp4"))) == 25


def test_a_picture_may_be_called_as_the_file_of_all_pictures(omniops, scripted, tmp_path):
    for name in ("coco", "a"):
        write_picture(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    result = run(omniops, str(tmp_path / "*.png"), "--point", "1,2", "--save", "json", "--save", "coco", "--out", out)
    assert result.status == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.json", "coco-2.json", "coco.json"]
    assert len(read_json(out / "coco.json")["images"]) == 2


def test_lines_name_files_that_are_there(omniops, scripted, tmp_path):
    for name in "ab":
        write_picture(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    result = run(omniops, str(tmp_path / "*.png"), "--point", "1,2", "--save", "coco", "--out", out)
    assert f"{tmp_path}/a.png -> {out}/coco.json: 1 object" in result.out
    assert [path.name for path in out.iterdir()] == ["coco.json"]
