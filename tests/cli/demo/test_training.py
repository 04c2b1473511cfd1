"""The networks of omniops demo: a comparison that is fair."""

import math

import pytest
import torch

from omniops.cli.demo import training
from omniops.cli.demo.network import UPSAMPLERS

CPU = torch.device("cpu")


def test_only_the_upsamplers_differ():
    networks = [training.make_contestant(name, CPU, 1, seed=5).network for name in UPSAMPLERS]
    shared = [name for name, _ in networks[0].named_parameters()]
    for network in networks[1:]:
        parameters = dict(network.named_parameters())
        for name in shared:
            torch.testing.assert_close(parameters[name], dict(networks[0].named_parameters())[name], rtol=0, atol=0)
        assert all(name in shared or name.startswith("to_") for name in parameters)


def test_no_crop_meets_what_is_held_out():
    marked = torch.zeros(3, 170, 164)
    held_out = training.Box(20, 96, 50, 114)
    held_out.cut(marked).fill_(1)
    generator = torch.Generator().manual_seed(0)
    crops = [training._crop(marked, held_out, generator) for _ in range(200)]
    assert all(crop.shape == (3, training.CROP, training.CROP) and not crop.any() for crop in crops)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 20), size=(160, 160), mode="bilinear")[0]
    contestant = training.make_contestant("CARAFE", CPU, 12, seed=0)
    centred = training.centred(picture)[None]

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.mse_loss(contestant.network(centred), centred))

    before = loss()
    done = list(training.train([contestant], picture, training.Box(0, 4, 0, 4), CPU, 12, seed=0))
    assert done == list(range(1, 13))
    assert loss() < before
    assert len(contestant.seconds) == 12


def test_psnr_is_that_of_the_mean_squared_error():
    truth = torch.full((3, 8, 8), 0.5)
    contestant = training.make_contestant("nearest", CPU, 1, seed=0)

    def judged(difference):
        """The network's numbers are four times the picture's; every other pixel is off by the difference."""
        off = torch.zeros(3, 8, 8)
        off[:, ::2] = difference
        contestant.network = lambda x: x + 4 * off
        training.judge(contestant, truth, CPU)
        torch.testing.assert_close(contestant.rebuilt, truth + off.clamp(max=0.5))
        return contestant.psnr

    assert judged(0.1) == pytest.approx(10 * math.log10(1 / (0.1**2 / 2)), abs=1e-4)
    assert judged(-0.01) == pytest.approx(10 * math.log10(1 / (0.01**2 / 2)), abs=1e-3)
    # Beyond white is white.
    assert judged(0.9) == pytest.approx(10 * math.log10(1 / (0.5**2 / 2)), abs=1e-4)
