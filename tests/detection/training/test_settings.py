"""Settings: the schedule, and every number that cannot be."""

from __future__ import annotations

import pytest

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from omniops.detection.training import Settings


def test_the_rate_rises_and_falls_in_steps():
    settings = Settings(batch=4, warmup=4)
    rates = [settings.lr_at(step, 120) for step in range(120)]
    assert rates[0] == pytest.approx(5e-6)
    assert rates[2] == pytest.approx(5e-3 * (0.001 + 0.999 / 2))
    assert set(rates[4:80]) == {0.005}
    assert rates[80:110] == pytest.approx([0.0005] * 30)
    assert rates[110:] == pytest.approx([0.00005] * 10)


def test_the_rate_falls_along_a_cosine():
    settings = Settings(lr=1.0, warmup=0, schedule="cosine")
    assert [settings.lr_at(step, 4) for step in range(4)] == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (5, 0), (100_000, 500)])
def test_the_default_warmup(steps, warmup):
    rates = [Settings().lr_at(step, steps) for step in range(warmup + 1)]
    assert rates == sorted(rates)
    assert rates[-1] == 0.0025
    assert all(rate < 0.0025 for rate in rates[:-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch": 1.5}, "batch must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"lr": float("nan")}, "lr must be a number of at least 0"),
        ({"lr": -1}, "lr must be a number"),
        ({"momentum": 1}, "momentum must be a number of at least 0 and below 1"),
        ({"max_norm": float("inf")}, "max_norm must be"),
        ({"schedule": "linear"}, "schedule must be one of step, cosine, got 'linear'"),
        ({"dtype": "half"}, "dtype must be one of float32, bfloat16, float16"),
        ({"flip": 1}, "flip must be True or False"),
    ],
)
def test_what_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        Settings(**change)
