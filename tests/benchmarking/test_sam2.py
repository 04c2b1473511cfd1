"""SAM 2's times: what is timed, beside whom, and what is made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

pytest.importorskip("omniops.sam2.architectures", exc_type=ImportError, reason="needs transformers")
pytest.importorskip("av", reason="needs PyAV")

from sam2_times import SOURCE, times_of

from omniops.benchmarking import sam2, sam2_plot
from omniops.benchmarking.sam2 import COMPILED, OFFICIAL, OPEN, OURS, PREDICT, SET_IMAGE, TOTAL, VIDEO, Time

CPU = torch.device("cpu")
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),  # the official package's, as the next
    pytest.mark.filterwarnings("ignore:cannot import name '_C':UserWarning"),
]
needs_sam2 = pytest.mark.skipif(sam2.find_spec("sam2") is None, reason="needs the official package, sam2 from PyPI")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def _folder(tmp_path, picture):
    folder = tmp_path / "clip"
    folder.mkdir(exist_ok=True)
    for i in range(3):
        Image.open(picture).save(folder / f"{i:05}.jpg")
    return folder


@needs_sam2
def test_both_packages_have_the_same_weights_and_do_the_same(picture, tmp_path):
    official, note = sam2.official_model(CONFIG, 64)
    assert note == ""
    ours, theirs = sam2.build_contenders(CONFIG, official, CPU, torch.float32, 64, False)
    assert (ours.name, theirs.name) == (OURS, OFFICIAL)
    ours.video.fill_hole_area = 0  # which the official package cannot without its extension
    pixels = np.array(Image.open(picture))
    made = []
    for contender in (ours, theirs):
        contender.image.set_image(pixels)
        masks = contender.image.predict(np.array([[20, 15]]), np.array([1]))
        state = contender.video.init_state(str(_folder(tmp_path, picture)))
        contender.video.add_new_points_or_box(state, 0, 1, points=[[20, 15]], labels=[1])
        made.append((masks[1], masks[2], *(logits for _, _, logits in contender.video.propagate_in_video(state))))
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * abs(other).max())


@needs_sam2
def test_the_official_package_runs_under_autocast_to_our_dtype():
    official, _ = sam2.official_model(CONFIG, 64)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = sam2.build_contenders(CONFIG, official, CPU, dtype, 64, False)
        assert ours.image.model.dtype == dtype
        assert next(official.parameters()).dtype == torch.float32
        enabled = []
        for contender in (ours, theirs):
            sam2.call_under(
                contender.precision, lambda enabled=enabled: enabled.append(torch.is_autocast_enabled("cpu"))
            )
        assert enabled == [False, dtype == torch.bfloat16]


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
    contender = sam2.Contender(OURS, predictor, predictor, sam2.nullcontext)
    pixels = np.zeros((30, 40, 3), np.uint8)
    steps = sam2.build_steps([contender], pixels, sam2.Clip(Path("folder"), 7, 20, 10, 3))
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
    assert [prompt["points"].tolist() for _, _, prompt in video[1:4]] == [[[5, 5]], [[10, 5]], [[15, 5]]]
    assert [prompt["obj_id"] for _, _, prompt in video[1:4]] == [0, 1, 2]
    assert list(sam2.build_steps([contender], pixels, None)) == [SET_IMAGE, PREDICT]


def test_a_video_that_is_open_is_encoded_anew(monkeypatch, tmp_path, picture):
    from omniops.sam2.modeling.sam2 import SAM2Base

    (contender,) = sam2.build_contenders(CONFIG, None, CPU, torch.float32, 64, False)
    video = sam2.Video(contender.video, sam2.Clip(_folder(tmp_path, picture), 3, 40, 30, 1))
    video.open_and_follow()
    encoded, encode = [], SAM2Base.forward_image

    def counted(model, pixels):
        encoded.append(len(pixels))
        return encode(model, pixels)

    monkeypatch.setattr(SAM2Base, "forward_image", counted)
    video.follow()
    assert sum(encoded) == 3


def test_a_videos_time_is_that_of_a_frame(monkeypatch):
    monkeypatch.setattr(sam2.timing, "milliseconds", lambda calls, *_: {key: [30.0, 60.0, 90.0] for key in calls})
    step = sam2.Step({OURS: lambda: None}, frames=6)
    (time,) = sam2.time_step(step, VIDEO, CPU, torch.float32, 0)
    assert time == Time("cpu", "float32", OURS, VIDEO, 10.0, 7.5, 12.5, 3)


def test_speed_ups_are_over_the_first_device():
    times = times_of(SOURCE)
    (ours, theirs) = sam2.speed_ups(times)
    assert (ours["device"], ours["over"], ours["contender"]) == ("mps", "cpu", OURS)
    assert [round(ours["ratios"][step], 1) for step in (SET_IMAGE, PREDICT, TOTAL)] == [2.0, 1.5, 2.0]
    assert theirs["ratios"][PREDICT] == 2
    assert sam2.speed_ups(times[:3]) == []
    lost = [Time("mps", "float32", OURS, SET_IMAGE, None, error="no")]
    assert sam2.speed_ups([*times[:3], *lost]) == []


def test_the_plot_has_a_bar_for_each_contender_and_step(monkeypatch, tmp_path):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or save(self, path))
    sam2_plot.draw([*times_of(SOURCE), Time("cpu", "float32", OURS, VIDEO, 50.0)], "title", tmp_path / "plot.png")
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
    monkeypatch.setattr(sam2, "find_spec", lambda name: None)
    official, note = sam2.official_model(CONFIG, None)
    assert official is None
    assert "pip install sam2" in note
    monkeypatch.setattr(sam2, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "sam2.build_sam", None)
    official, note = sam2.official_model(CONFIG, None)
    assert official is None
    assert note.startswith("sam2 is installed but cannot be used")
    (ours,) = sam2.build_contenders(CONFIG, None, CPU, torch.float32, 64, False)
    assert ours.name == OURS


def test_the_encoder_is_compiled_where_it_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    ours, ours_compiled = sam2.build_contenders(CONFIG, None, CPU, torch.float32, 64, True)
    assert (ours.name, ours_compiled.name) == (OURS, COMPILED)
    assert compiled == [ours_compiled.image.model.image_encoder.trunk]
    for name, value in ours.image.model.state_dict().items():
        assert torch.equal(value, ours_compiled.image.model.state_dict()[name])
