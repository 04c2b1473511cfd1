"""omniops demo: few steps, every error, and a comparison that is fair."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from omniops.cli import demo, demo_picture

CPU = torch.device("cpu")


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 255, (170, 164, 3), dtype=np.uint8)).save(path)
    return path


def test_it_reports_and_draws_matplotlibs_photo(omniops, tmp_path):
    out = tmp_path / "new" / "picture.png"
    result = omniops("demo", "--steps", "2", "--device", "cpu", "--out", str(out))
    assert result.status == 0
    assert f"Wrote {out}" in result.out
    assert len(re.findall(r"\d dB", result.out)) == 3
    assert all(name in result.out for name in demo.UPSAMPLERS)
    with Image.open(out) as picture:
        assert min(picture.size) > 1000


def test_any_photo_and_the_same_seed_gives_the_same_figures(omniops, photo, tmp_path):
    figures = []
    for seed in ("3", "3", "4"):
        out = omniops(
            "demo",
            str(photo),
            "--steps",
            "1",
            "--seed",
            seed,
            "--device",
            "cpu",
            "--out",
            str(tmp_path / f"{len(figures)}.png"),
        ).out
        figures.append(re.findall(r"[\d.]+ dB", out))
    assert figures[0] == figures[1] != figures[2]


def test_only_the_upsamplers_differ():
    networks = [demo._contestant(name, CPU, 1, seed=5).network for name in demo.UPSAMPLERS]
    shared = [name for name, _ in networks[0].named_parameters()]
    for network in networks[1:]:
        parameters = dict(network.named_parameters())
        for name in shared:
            torch.testing.assert_close(parameters[name], dict(networks[0].named_parameters())[name], rtol=0, atol=0)
        assert all(name in shared or name.startswith("to_") for name in parameters)


def test_no_crop_meets_what_is_held_out():
    marked = torch.zeros(3, 170, 164)
    held_out = demo.Box(20, 96, 50, 114)
    held_out.cut(marked).fill_(1)
    generator = torch.Generator().manual_seed(0)
    crops = [demo._crop(marked, held_out, generator) for _ in range(200)]
    assert all(crop.shape == (3, demo.CROP, demo.CROP) and not crop.any() for crop in crops)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 20), size=(160, 160), mode="bilinear")[0]
    contestant = demo._contestant("CARAFE", CPU, 12, seed=0)
    centred = demo.centred(picture)[None]

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.mse_loss(contestant.network(centred), centred))

    before = loss()
    demo._train([contestant], picture, demo.Box(0, 4, 0, 4), CPU, 12, seed=0)
    assert loss() < before
    assert len(contestant.seconds) == 12


def test_a_photo_that_is_missing_unreadable_or_small(fails, tmp_path):
    out = ("--out", str(tmp_path / "o.png"))
    missing, text, small = tmp_path / "none.jpg", tmp_path / "text.jpg", tmp_path / "small.png"
    assert fails("demo", str(missing), *out, status=2).endswith(f"no such file: {missing}")
    text.write_text("hello")
    assert fails("demo", str(text), *out, status=2).endswith(f"not a picture that Pillow can read: {text}")
    Image.new("RGB", (300, 40)).save(small)
    assert "too small: 300 x 40 pixels" in fails("demo", str(small), *out, status=2)
    assert "cannot read" in fails("demo", str(tmp_path), *out, status=2)


def test_a_truncated_photo(fails, photo, tmp_path):
    photo.write_bytes(photo.read_bytes()[:2000])
    assert f"cannot read {photo}" in fails("demo", str(photo), "--out", str(tmp_path / "o.png"), status=2)


def test_a_photo_of_16_bits_keeps_its_tones(tmp_path):
    tones = np.linspace(0, 65535, 200 * 180).reshape(200, 180)
    Image.fromarray(tones.astype(np.uint16)).save(tmp_path / "photo.png")
    picture = demo._read(tmp_path / "photo.png")
    expected = torch.from_numpy(tones / 65535).float().expand(3, -1, -1)
    torch.testing.assert_close(picture, expected, rtol=0, atol=1 / 255)


def test_matplotlib_without_its_photo(fails, monkeypatch, tmp_path):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("matplotlib.cbook.get_sample_data", missing)
    line = fails("demo", "--out", str(tmp_path / "o.png"), status=1)
    assert line.endswith("this matplotlib came without its sample photo: name one, omniops demo PHOTO")


def test_steps_must_be_positive(omniops):
    assert omniops("demo", "--steps", "0").status == 2


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
def test_a_seed_that_is_none_is_refused(omniops, seed):
    result = omniops("demo", "--seed", seed)
    assert result.status == 2
    assert "--seed" in result.err
    assert "Traceback" not in result.err


def test_the_largest_seed_is_one(omniops, photo, tmp_path):
    arguments = ("--steps", "1", "--device", "cpu", "--out", str(tmp_path / "o.png"))
    assert omniops("demo", str(photo), "--seed", str(2**63 - 1), *arguments).status == 0


def test_psnr_is_that_of_the_mean_squared_error():
    truth = torch.full((3, 8, 8), 0.5)
    contestant = demo._contestant("nearest", CPU, 1, seed=0)

    def judged(difference):
        """The network's numbers are four times the picture's; every other pixel is off by the difference."""
        off = torch.zeros(3, 8, 8)
        off[:, ::2] = difference
        contestant.network = lambda x: x + 4 * off
        demo._judge(contestant, truth, CPU)
        torch.testing.assert_close(contestant.rebuilt, truth + off.clamp(max=0.5))
        return contestant.psnr

    assert judged(0.1) == pytest.approx(10 * math.log10(1 / (0.1**2 / 2)), abs=1e-4)
    assert judged(-0.01) == pytest.approx(10 * math.log10(1 / (0.01**2 / 2)), abs=1e-3)
    # Beyond white is white.
    assert judged(0.9) == pytest.approx(10 * math.log10(1 / (0.5**2 / 2)), abs=1e-4)


def test_the_kernels_in_the_picture_stand_as_they_are_used():
    """Group 1 takes its upper right neighbour in the lower left of each block of results, and nothing else."""
    contestant = demo._contestant("CARAFE", CPU, 1, seed=0)
    pack = contestant.network.to_full
    k, s, group, (u, v), (a, b) = pack.up_kernel, pack.scale_factor, 1, (0, 2), (1, 0)
    torch.nn.init.zeros_(pack.content_encoder.weight)
    with torch.no_grad():
        pack.content_encoder.bias.view(pack.up_group, k, k, s, s)[group, u, v, a, b] = 100
    kernels = demo_picture._kernels(contestant, torch.rand(3, 16, 24), CPU)
    expected = torch.full((pack.up_group, 16, 24, k, k), 1 / k**2)
    expected[group, a::s, b::s] = 0
    expected[group, a::s, b::s, u, v] = 1
    torch.testing.assert_close(kernels, expected)
    # And so the operator uses them.
    features = torch.rand(1, pack.channels, 8, 12)
    channels = slice(group * pack.channels // pack.up_group, (group + 1) * pack.channels // pack.up_group)
    out = pack(features)
    torch.testing.assert_close(out[:, channels, a + s :: s, b:-s:s], features[:, channels, :-1, 1:])
