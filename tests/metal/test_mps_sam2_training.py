"""A training step of SAM 2 at full size, forward and backward, within the rules of MPS.

Autograd does not know the pretended device, so all is on "meta", without values and without autocast, and the ways
around what MPS gets wrong, which ask for "mps", are changed to ask for that.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mps_device import mps_device
from mps_rules import RuleError
from planted import planted

from omniops import device as devices
from omniops.sam2.architectures import new
from omniops.sam2.modeling import attention, hiera, layers, mask_decoder, memory_attention, transformer
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.training import clip_step, image_step

SIDE = 1024
ATTENTION = attention.scaled_dot_product_attention
AROUND = [
    (devices, "without_single_row", devices.without_single_row),
    (mask_decoder, "_product", mask_decoder._product),
    (SAM2Base, "predict_masks", SAM2Base.predict_masks),
    (layers.Linear, "forward", layers.Linear.forward),
    *((module, "scaled_dot_product_attention", ATTENTION) for module in (hiera, memory_attention, transformer)),
]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    for owner, name, function in AROUND:
        monkeypatch.setattr(owner, name, planted(function, '"mps"', '"meta"'))
    with mps_device(values=False):
        yield torch.device("meta")


def train(device: torch.device, step: str, prompt: str) -> SAM2Base:
    model = new("tiny", image_size=SIDE).to(device).train()
    images, targets = torch.empty(3, 3, SIDE, SIDE, device=device), torch.empty(3, SIDE, SIDE, device=device)
    if step == "pictures":
        losses = image_step(model, images, targets, prompt, num_correction_pt_per_frame=1)
    else:
        losses = clip_step(
            model,
            images,
            torch.stack((targets, targets), dim=1),
            prompt,
            num_correction_pt_per_frame=1,
            num_frames_to_correct=2,
        )
    losses.total.backward()
    return model


@pytest.mark.parametrize(
    ("step", "prompt"),
    [
        ("pictures", "box"),
        ("clip", "mask"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("pictures", "point"), ("pictures", "mask"), ("clip", "point"), ("clip", "box"))
        ),
    ],
)
def test_a_training_step(rules: torch.device, step: str, prompt: str) -> None:
    model = train(rules, step, prompt)
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 290


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rule"),
    [
        (0, "a single row with a bias"),
        (1, "a large side of a product"),
        (2, "an expanded operand"),
        (3, "a long reduction"),
    ],
)
def test_without_a_way_around_the_fault_is_found(
    rules: torch.device, monkeypatch: pytest.MonkeyPatch, place: int, rule: str
) -> None:
    monkeypatch.setattr(*AROUND[place])
    with pytest.raises(RuleError, match=f": {rule}: "):
        train(rules, "clip", "point")


def test_sums_of_gradients_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, rows = layers.Linear(5, 3).double(), torch.randn(2, 21, 5, dtype=torch.float64, requires_grad=True)
    weights, columns = (torch.randn(2, *sides, dtype=torch.float64, requires_grad=True) for sides in ((3, 4), (4, 21)))
    inputs = (rows, *layer.parameters(), weights, columns)

    def results() -> list[torch.Tensor]:
        made = (layer(rows), mask_decoder._product(weights, columns))
        return [*made, *torch.autograd.grad(sum(result.square().sum() for result in made), inputs)]

    expected = results()
    for module in (layers, mask_decoder):
        monkeypatch.setattr(module, "LONGEST_SUM", 8)
    monkeypatch.setattr(layers.Linear, "forward", planted(layers.Linear.forward, '"mps"', '"cpu"'))
    monkeypatch.setattr(mask_decoder, "_product", planted(mask_decoder._product, '"mps"', '"cpu"'))
    sums = []
    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: sums.append(len(args[0])) or product(*args))
    for found, value in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, value)
    assert sums == [7] * 6
