"""omniops bench sam2: what is timed, beside whom, and what is said of it."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="needs PyAV")

from sam2_times import SOURCE, times_of

from omniops.benchmarking.sam2 import OFFICIAL, OURS, PREDICT, SET_IMAGE, STEPS, TOTAL
from omniops.cli.bench import sam2 as bench
from omniops.device import title

CPU = torch.device("cpu")
QUICK = ("bench", "sam2", "--devices", "cpu", "--image-size", "64", "--seconds", "0", "--dtype", "float32")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),  # the official package's, as the next
    pytest.mark.filterwarnings("ignore:cannot import name '_C':UserWarning"),
]
needs_sam2 = pytest.mark.skipif(find_spec("sam2") is None, reason="needs the official package, sam2 from PyPI")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def alone(monkeypatch):
    """Without the official package, which takes time to build."""
    monkeypatch.setattr(bench, "official_model", lambda *args: (None, "alone"))


@pytest.mark.slow
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
    times = {(result["contender"], result["step"]): result for result in report["results"]}
    assert set(times) == {(name, step) for name in (OURS, OFFICIAL) for step in STEPS}
    for (name, step), time in times.items():
        assert (time["device"], time["dtype"], time["error"]) == ("cpu", "float32", "")
        if step == TOTAL:
            total_ms = times[name, SET_IMAGE]["median_ms"] + times[name, PREDICT]["median_ms"]
            assert time["median_ms"] == pytest.approx(total_ms)
        else:
            assert time["samples"] >= 3
            assert 0 < time["lower_quartile_ms"] <= time["median_ms"] <= time["upper_quartile_ms"]
    lines = result.out.splitlines()
    assert lines[0] == f"cpu: {title(CPU)}"
    assert lines[1].startswith("SAM 2.1 tiny, 40 x 30 pixels")
    heads = next(line for line in lines if line.split()[:2] == ["device", "dtype"])
    assert heads.split() == ["device", "dtype", "set_image", "predict", "total", "video", "open", "video"]
    assert "frames/s" in result.out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


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
    assert [(time["step"], time["median_ms"] is None) for time in times] == [(SET_IMAGE, False), (PREDICT, True)]


def test_the_table_is_the_sources(capsys, monkeypatch):
    bench.output().print(bench._table(times_of(SOURCE), "what"))
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


def test_the_note_is_printed_and_kept(omniops, picture, alone, tmp_path):
    result = omniops(*QUICK, str(picture), "--json", str(tmp_path / "s.json"))
    assert result.status == 0
    assert result.out.splitlines()[-1] == "alone"
    assert json.loads((tmp_path / "s.json").read_text())["note"] == "alone"


def test_devices_are_the_cpu_and_the_gpu_unless_named(omniops, monkeypatch, alone):
    monkeypatch.setattr("omniops.benchmarking.sam2.NOISE", (30, 40))
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
    monkeypatch.setattr(bench, "official_model", functools.partial(pytest.fail, "it went on"))
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


@pytest.mark.parametrize("module", ["huggingface_hub", "av"])
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
    script = Path(__file__).parents[3] / "benchmarks" / "sam2_predictors.py"
    monkeypatch.setattr(sys, "argv", [str(script), *QUICK[2:], str(picture)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "SAM 2.1 tiny, 40 x 30 pixels" in capsys.readouterr().out
