"""omniops demo: few steps, and every error."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from omniops.cli.demo import command as demo


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
