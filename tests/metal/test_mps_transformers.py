"""transformers after omniops.enable on the pretended MPS device: the CPU's results, within the rules.

Autograd does not know the pretended device, so a backward pass runs on "meta", without values.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mps_device import mps_device
from operator_calls import OperatorCalls
from torch import Tensor
from torch.testing import assert_close
from transformers_models import build, inputs

import omniops

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    omniops.enable("transformers")
    yield
    omniops.disable()


def attention(name: str) -> Any:
    """The last of the model's modules that have what is needed around the operator."""
    return [module for module in build(name).modules() if hasattr(module, "sampling_offsets")][-1]


def arguments(name: str, module: Any) -> dict[str, Any]:
    """For the module: queries, the pixels of all levels, boxes around which it looks."""
    generator = torch.Generator().manual_seed(0)
    levels = module.n_levels
    shapes = [(8, 6), (4, 3), (2, 2), (1, 2)][:levels]
    width, pixels = module.d_model, sum(h * w for h, w in shapes)
    return {
        "hidden_states": torch.randn((2, 5, width), generator=generator),
        "encoder_hidden_states": torch.randn((2, pixels, width), generator=generator),
        "reference_points": torch.rand(
            (2, 5, 1 if name.startswith(("D-FINE", "RT-DETRv2")) else levels, 4), generator=generator
        ),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }


def moved(values: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def made(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return {key: made(value) for key, value in values.items()}


NAMES = ("Deformable DETR", "RT-DETR", "RT-DETRv2", "RT-DETRv2 discrete", "D-FINE", "Grounding DINO")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_attention_of_a_model(name, dtype):
    module = attention(name)
    inputs = arguments(name, module)
    with torch.no_grad():
        expected = module(**inputs)[0]
        with mps_device(values=True) as device, OperatorCalls() as calls:
            found = module.to(device, dtype)(**moved(inputs, device, dtype))[0]
            assert (found.device.type, found.dtype) == ("mps", dtype)
            result = found.cpu().float()
    assert calls.counts == {"multi_scale_deform_attn": 1}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_its_backward_keeps_the_rules(name):
    module = attention(name)
    inputs = arguments(name, module)
    with mps_device(values=False):
        on_meta = moved(inputs, "meta", torch.float32)
        on_meta["spatial_shapes"] = inputs["spatial_shapes"]  # which transformers reads back and compares
        with OperatorCalls() as calls:
            module.to("meta")(**on_meta)[0].square().sum().backward()
    assert calls.counts == {"multi_scale_deform_attn": 1, "multi_scale_deform_attn_backward": 1}


def test_a_whole_model_keeps_the_rules():
    model = build("RT-DETR")
    with torch.no_grad(), mps_device(values=False) as device, OperatorCalls() as calls:
        model.to(device)(pixel_values=inputs("RT-DETR")["pixel_values"].to(device))
    assert calls.counts == {"multi_scale_deform_attn": 2}


def test_sam3s_masks():
    sam3 = importlib.import_module("transformers.models.sam3_video.modeling_sam3_video")
    generator = torch.Generator().manual_seed(0)
    mask, probs = torch.randn((3, 1, 13, 18), generator=generator), torch.rand(9, generator=generator)
    masks = torch.randn((9, 1, 4), generator=generator).repeat_interleave(5, 2)
    filled, kept = sam3.fill_holes_in_mask_scores(mask, 4), sam3.nms_masks(probs, masks, 0.1, 0.3)
    assert not torch.equal(filled, mask)
    assert 0 < kept.sum() < 9
    with mps_device(values=True) as device:
        assert_close(sam3.fill_holes_in_mask_scores(mask.to(device), 4).cpu(), filled, rtol=0, atol=0)
        assert torch.equal(sam3.nms_masks(probs.to(device), masks.to(device), 0.1, 0.3).cpu(), kept)
