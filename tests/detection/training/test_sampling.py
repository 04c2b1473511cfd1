"""Anchors and proposals are drawn for each picture by its own seed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from omniops.detection.training.sampling import SeededSampler


def _sampler(size=8, fraction=0.25):
    return SeededSampler(BalancedPositiveNegativeSampler(size, fraction))


def _matched(positive, negative, ignored=5):
    values = torch.tensor([1] * (positive // 2) + [3] * (positive - positive // 2) + [0] * negative + [-1] * ignored)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(9, 90, (2, 6)), (1, 90, (1, 7)), (0, 90, (0, 8)), (9, 3, (2, 3)), (0, 0, (0, 0))],
)
def test_as_many_as_torchvision_draws(positive, negative, expected):
    sampler, matched = _sampler(), _matched(positive, negative)
    sampler.seeds = [7]
    theirs = BalancedPositiveNegativeSampler(8, 0.25)([matched])
    (own_positive,), (own_negative,) = sampler([matched])
    assert (own_positive.sum().item(), own_negative.sum().item()) == expected
    assert tuple(mask[0].sum().item() for mask in theirs) == expected
    assert (matched[own_positive.bool()] >= 1).all()
    assert (matched[own_negative.bool()] == 0).all()
    assert (sampler.positive, sampler.drawn) == (expected[0], sum(expected))


def test_a_picture_s_sample_does_not_depend_on_its_batch():
    sampler, pictures = _sampler(), [_matched(9, 90), _matched(20, 50)]
    sampler.seeds = [1, 2]
    together = sampler(pictures)
    assert (sampler.positive, sampler.drawn) == (4, 16)
    for number, picture in enumerate(pictures):
        sampler.seeds = [number + 1]
        alone = sampler([picture])
        assert all(torch.equal(masks[number], own[0]) for masks, own in zip(together, alone, strict=True))
    sampler.seeds = [3]
    assert not torch.equal(sampler(pictures[:1])[1][0], together[1][0])


def test_all_are_drawn_evenly():
    sampler, counts = _sampler(), torch.zeros(20)
    for seed in range(2000):
        sampler.seeds = [seed]
        counts += sampler([torch.zeros(20)])[1][0]
    assert ((counts / 2000 - 8 / 20).abs() < 0.05).all()
