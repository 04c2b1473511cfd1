"""omniops bench sam2: what is timed, beside whom, and what is said of it."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

pytest.importorskip("omniops.sam2.architectures", exc_type=ImportError, reason="needs transformers")
pytest.importorskip("av", reason="needs PyAV")

from omniops.cli import bench_sam2 as bench
from omniops.cli.bench_sam2 import COMPILED, OFFICIAL, OPEN, OURS, PREDICT, SET_IMAGE, STEPS, TOTAL, VIDEO, Time
from omniops.device import title

CPU = torch.device("cpu")
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
QUICK = ("bench", "sam2", "--devices", "cpu", "--image-size", "64", "--seconds", "0", "--dtype", "float32")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),  # the official package's, as the next
    pytest.mark.filterwarnings("ignore:cannot import name '_C':UserWarning"),
]
needs_sam2 = pytest.mark.skipif(bench.find_spec("sam2") is None, reason="needs the official package, sam2 from PyPI")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def alone(monkeypatch):
    """Without the official package, which takes time to build."""
    monkeypatch.setattr(bench, "_official", lambda *args: (None, "alone"))


@needs_sam2
def test_it_times_both_packages(omniops, tmp_path, picture):
    (tmp_path / "frames").mkdir()
    for i in range(4):
        Image.open(picture).rotate(5 * i).save(tmp_path / "frames" / f"{i}.png")
    files = ("--json", str(tmp_path / "new" / "s.json"), "--plot", str(tmp_path / "s.png"))
    result = omniops(
        *QUICK, str(picture), "--video", str(tmp_path / "frames"), "--frames", "3", "--objects", "2", *files
    )
    assert (result.status, result.err.strip()) == (0, "")
    report = json.loads((tmp_path / "new" / "s.json").read_text())
    assert {"date", "command", "device", "hardware", "versions"} < set(report)
    assert report["devices"] == {"cpu": title(CPU)}
    assert report["model"] == {"size": "tiny", "image_size": 64, "weights": "random"}
    assert report["picture"] == {"file": "a.png", "width": 40, "height": 30}
    assert report["video"] == {"file": "frames", "frames": 3, "objects": 2}
    assert report["speed_up"] == []
    times = {(each["contender"], each["step"]): each for each in report["results"]}
    assert set(times) == {(name, step) for name in (OURS, OFFICIAL) for step in STEPS}
    for (name, step), each in times.items():
        assert (each["device"], each["dtype"], each["error"]) == ("cpu", "float32", "")
        if step == TOTAL:
            parts = times[name, SET_IMAGE]["median_ms"] + times[name, PREDICT]["median_ms"]
            assert each["median_ms"] == pytest.approx(parts)
        else:
            assert each["samples"] >= 3
            assert 0 < each["lower_quartile_ms"] <= each["median_ms"] <= each["upper_quartile_ms"]
    lines = result.out.splitlines()
    assert lines[0] == f"cpu: {title(CPU)}"
    assert lines[1].startswith("SAM 2.1 tiny, 40 x 30 pixels")
    heads = next(line for line in lines if line.split()[:2] == ["device", "dtype"])
    assert heads.split() == ["device", "dtype", "set_image", "predict", "total", "video", "open", "video"]
    assert "frames/s" in result.out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@needs_sam2
def test_both_packages_have_the_same_weights_and_do_the_same(picture, tmp_path):
    official, note = bench._official(CONFIG, 64)
    assert note == ""
    ours, theirs = bench._contenders(CONFIG, official, CPU, torch.float32, 64, False)
    assert (ours.name, theirs.name) == (OURS, OFFICIAL)
    ours.video.fill_hole_area = 0  # which the official package cannot without its extension
    pixels = np.array(Image.open(picture))
    made = []
    for each in (ours, theirs):
        each.image.set_image(pixels)
        masks = each.image.predict(np.array([[20, 15]]), np.array([1]))
        state = each.video.init_state(str(_folder(tmp_path, picture)))
        each.video.add_new_points_or_box(state, 0, 1, points=[[20, 15]], labels=[1])
        made.append((masks[1], masks[2], *(logits for _, _, logits in each.video.propagate_in_video(state))))
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * abs(other).max())


def _folder(tmp_path, picture):
    folder = tmp_path / "clip"
    folder.mkdir(exist_ok=True)
    for i in range(3):
        Image.open(picture).save(folder / f"{i:05}.jpg")
    return folder


@needs_sam2
def test_the_official_package_runs_under_autocast_to_our_dtype():
    official, _ = bench._official(CONFIG, 64)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = bench._contenders(CONFIG, official, CPU, dtype, 64, False)
        assert ours.image.model.vision_encoder.dtype == dtype
        assert next(official.parameters()).dtype == torch.float32
        seen = []
        for each in (ours, theirs):
            bench._call(each.precision, lambda seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        assert seen == [False, dtype == torch.bfloat16]


class Predictor:
    """In place of all predictors: it notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        masks = [(0, [0], self)] if name == "propagate_in_video" else []
        return lambda *args, **kwargs: self.asked.append((name, args, kwargs)) or masks

    def __gt__(self, zero):
        return self


def test_what_is_timed():
    predictor = Predictor()
    contender = bench.Contender(OURS, predictor, predictor, bench.nullcontext)
    pixels = np.zeros((30, 40, 3), np.uint8)
    steps = bench._steps([contender], pixels, bench.Clip(Path("folder"), 7, 20, 10, 3))
    assert list(steps) == [SET_IMAGE, PREDICT, VIDEO, OPEN]
    for step in steps.values():
        step.calls[OURS]()
    (_, image, _), (_, _, click), opening, *video = predictor.asked
    assert image[0] is pixels
    assert click["point_coords"].tolist() == [[20, 15]]
    assert click["point_labels"].tolist() == [1]
    assert opening[:2] == ("init_state", ("folder",))
    follow = ["reset_state", *["add_new_points_or_box"] * 3, "propagate_in_video", "cpu"]
    assert [name for name, _, _ in video] == follow * 2
    assert [each["points"].tolist() for _, _, each in video[1:4]] == [[[5, 5]], [[10, 5]], [[15, 5]]]
    assert [each["obj_id"] for _, _, each in video[1:4]] == [0, 1, 2]
    assert list(bench._steps([contender], pixels, None)) == [SET_IMAGE, PREDICT]


def test_a_video_that_is_open_is_encoded_anew(monkeypatch, tmp_path, picture):
    from omniops.sam2 import network

    (contender,) = bench._contenders(CONFIG, None, CPU, torch.float32, 64, False)
    video = bench.Video(contender.video, bench.Clip(_folder(tmp_path, picture), 3, 40, 30, 1))
    video.open_and_follow()
    encoded, encode = [], network.encode
    monkeypatch.setattr(network, "encode", lambda model, pixels: encoded.append(len(pixels)) or encode(model, pixels))
    video.follow()
    assert sum(encoded) == 3


def test_a_videos_time_is_that_of_a_frame(monkeypatch):
    monkeypatch.setattr(bench.timing, "milliseconds", lambda calls, *_: {key: [30.0, 60.0, 90.0] for key in calls})
    step = bench.Step({OURS: lambda: None}, frames=6)
    (time,) = bench._timed(step, VIDEO, CPU, torch.float32, 0)
    assert time == Time("cpu", "float32", OURS, VIDEO, 10.0, 7.5, 12.5, 3)


def test_frames_and_objects_need_a_video(omniops, picture):
    for option in ("--frames", "--objects"):
        result = omniops(*QUICK, str(picture), option, "3")
        assert result.status == 2
        assert "--video" in result.err


def test_a_contender_that_cannot_run_is_reported(omniops, monkeypatch, picture, alone, tmp_path):
    def refuse(self, *args, **kwargs):
        raise NotImplementedError("not on this device\nat all")

    monkeypatch.setattr("omniops.sam2.SAM2ImagePredictor.predict", refuse)
    files = ("--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png"))
    result = omniops(*QUICK, str(picture), *files)
    assert result.status == 0
    assert "omniops on cpu cannot run: not on this device\n" in result.out
    times = json.loads((tmp_path / "s.json").read_text())["results"]
    assert [(each["step"], each["median_ms"] is None) for each in times] == [(SET_IMAGE, False), (PREDICT, True)]


def _times(milliseconds):
    """Of every step, by device and contender; the total is the sum."""
    times = []
    for (device, contender), (first, second) in milliseconds.items():
        for step, median in ((SET_IMAGE, first), (PREDICT, second), (TOTAL, first + second)):
            times.append(Time(device, "float32", contender, step, median))
    return times


SOURCE = {
    ("cpu", OURS): (711, 31),
    ("cpu", OFFICIAL): (1422, 62),
    ("mps", OURS): (349, 21),
    ("mps", OFFICIAL): (349, 31),
}


def test_speed_ups_are_over_the_first_device():
    times = _times(SOURCE)
    (ours, theirs) = bench._speed_ups(times)
    assert (ours["device"], ours["over"], ours["contender"]) == ("mps", "cpu", OURS)
    assert [round(ours["ratios"][step], 1) for step in (SET_IMAGE, PREDICT, TOTAL)] == [2.0, 1.5, 2.0]
    assert theirs["ratios"][PREDICT] == 2
    assert bench._speed_ups(times[:3]) == []
    lost = [Time("mps", "float32", OURS, SET_IMAGE, None, error="no")]
    assert bench._speed_ups([*times[:3], *lost]) == []


def test_the_table_is_the_sources(capsys, monkeypatch):
    bench.output().print(bench._table(_times(SOURCE), "what"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip(" ─\n")]
    assert lines == [
        "what: medians, and how many times omniops' time",
        "device dtype set_image predict total",
        "cpu float32 omniops 0.711 s 0.0310 s 0.742 s",
        "sam2 1.42 s 2.00x 0.0620 s 2.00x 1.48 s 2.00x",
        "mps float32 omniops 0.349 s 0.0210 s 0.370 s",
        "sam2 0.349 s 1.00x 0.0310 s 1.48x 0.380 s 1.03x",
        "mps over cpu omniops 2.0x 1.5x 2.0x",
        "mps over cpu sam2 4.1x 2.0x 3.9x",
    ]


def test_the_plot_has_a_bar_for_each_contender_and_step(monkeypatch, tmp_path):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or save(self, path))
    bench._draw([*_times(SOURCE), Time("cpu", "float32", OURS, VIDEO, 50.0)], "title", tmp_path / "plot.png")
    image, video = figures[0].axes
    bars = [(bar.get_x(), bar.get_width()) for bar in image.patches]
    assert bars[:4] == [(0, 0.711), (0, 1.422), (0, 0.349), (0, 0.349)]
    assert sum(bars[4:6], ()) == pytest.approx((0.711, 0.031, 1.422, 0.062))
    assert [text.get_text() for text in image.get_yticklabels()] == [
        "omniops, cpu",
        "sam2, cpu",
        "omniops, mps",
        "sam2, mps",
    ]
    assert [text.get_text() for text in video.texts] == ["0.0500 s", *["cannot run"] * 3]


def test_without_the_official_package_it_stands_alone(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    official, note = bench._official(CONFIG, None)
    assert official is None
    assert "pip install sam2" in note
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "sam2.build_sam", None)
    official, note = bench._official(CONFIG, None)
    assert official is None
    assert note.startswith("sam2 is installed but cannot be used")
    (ours,) = bench._contenders(CONFIG, None, CPU, torch.float32, 64, False)
    assert ours.name == OURS


def test_the_note_is_printed_and_kept(omniops, picture, alone, tmp_path):
    result = omniops(*QUICK, str(picture), "--json", str(tmp_path / "s.json"))
    assert result.status == 0
    assert result.out.splitlines()[-1] == "alone"
    assert json.loads((tmp_path / "s.json").read_text())["note"] == "alone"


def test_the_encoder_is_compiled_where_it_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    ours, ours_compiled = bench._contenders(CONFIG, None, CPU, torch.float32, 64, True)
    assert (ours.name, ours_compiled.name) == (OURS, COMPILED)
    assert compiled == [ours_compiled.image.model.vision_encoder.backbone]
    for name, value in ours.image.model.state_dict().items():
        assert torch.equal(value, ours_compiled.image.model.state_dict()[name])


def test_devices_are_the_cpu_and_the_gpu_unless_named(omniops, monkeypatch, alone):
    monkeypatch.setattr(bench, "NOISE", (30, 40))
    chosen = []
    choose = bench.choose_device
    monkeypatch.setattr(bench, "choose_device", lambda name: chosen.append(name) or choose("cpu"))
    arguments = ("bench", "sam2", "--image-size", "64", "--seconds", "0")
    result = omniops(*arguments)
    assert result.status == 0
    assert chosen == ["cpu", "auto"]
    assert "40 x 30 pixels" in result.out
    assert omniops(*arguments, "--devices", "cpu, mps").status == 0
    assert chosen[2:] == ["cpu", "mps"]


def test_wrong_use(fails, monkeypatch, tmp_path, picture):
    monkeypatch.setattr(bench, "_official", functools.partial(pytest.fail, "it went on"))
    assert "got 'huge'" in fails("bench", "sam2", "--model", "huge", status=2)
    assert "--model tiny, small, base-plus, large" in fails("bench", "sam2", "--model", "huge", status=2)
    assert "unknown device 'foo'" in fails("bench", "sam2", "--devices", "cpu,foo", status=2)
    assert "--devices must name a device" in fails("bench", "sam2", "--devices", ",", status=2)
    assert "--image-size must be" in fails("bench", "sam2", "--image-size", "65", status=2)
    assert "no such file" in fails("bench", "sam2", str(tmp_path / "none.png"), status=2)
    assert "it is a folder" in fails("bench", "sam2", "--json", str(tmp_path), status=2)
    assert "a picture's name ends" in fails("bench", "sam2", "--plot", "plot.txt", status=2)
    assert "omniops bench sam2 [IMAGE]" in fails("bench", "--device", "cpu", "sam2", status=2)


def test_a_video_that_is_none(fails, alone, tmp_path, picture):
    (tmp_path / "v.mp4").write_text("hello")
    assert "v.mp4 is not a video" in fails(*QUICK, str(picture), "--video", str(tmp_path / "v.mp4"), status=2)
    assert "no video at" in fails(*QUICK, str(picture), "--video", str(tmp_path / "none.mp4"), status=2)


@pytest.mark.parametrize("module", ["transformers", "av"])
def test_a_missing_package_is_named_before_the_work(fails, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert fails("bench", "sam2", status=1).endswith("pip install 'omniops[sam2]'")


def test_its_help_and_that_of_bench(omniops):
    result = omniops("bench", "sam2", "--help")
    assert result.status == 0
    usage = next(line for line in result.out.splitlines() if "Usage:" in line)
    assert usage.strip() == "Usage: omniops bench sam2 [OPTIONS] [IMAGE]"
    assert "Example: omniops bench sam2" in result.out
    assert "omniops bench sam2 --help" in " ".join(omniops("bench", "--help").out.split())
    assert "bench sam2" not in omniops("--help").out


def test_the_script_is_the_command(monkeypatch, capsys, alone, picture):
    script = Path(__file__).parents[2] / "benchmarks" / "sam2_predictors.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK[2:], str(picture)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "SAM 2.1 tiny, 40 x 30 pixels" in capsys.readouterr().out
