"""The steps that are written anew here against transformers' own forward methods, module by module."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")

from omniops.sam2 import architectures
from omniops.sam2.mask_decoder import decode_masks
from omniops.sam2.memory_attention import look_back

SIDE = 64
PLACES = SIDE // 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = architectures.new("tiny", image_size=SIDE)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return made


def assert_alike(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("projected_after", [set(), {("cpu", torch.float32)}])
@pytest.mark.parametrize("still", [0, 8])
@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("objects", [1, 3])
def test_a_look_back(model, monkeypatch, objects, memories, still, projected_after):
    monkeypatch.setattr("omniops.sam2.memory_attention._PROJECTED_AFTER", projected_after)
    torch.manual_seed(1)
    attention, count = model.memory_attention, PLACES**2
    frame = torch.randn(1, count, 256)
    memory = torch.randn(objects, memories * count + still, 64)
    places = torch.randn(memories * count + still, 64)
    expected = [
        attention(
            current_vision_features=frame.transpose(0, 1),
            memory=each[:, None],
            memory_posision_embeddings=places[:, None],
            num_object_pointer_tokens=still,
        ).reshape(1, count, 256)
        for each in memory
    ]
    assert_alike(look_back(attention, frame, memory, places, still), torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sharper", [1, 300])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (3, 1), (3, 3)])
def test_masks(model, prompts, images, multimask, sharper, training):
    """Single masks are not stable as the weights are, and stable where they are much sharper."""
    torch.manual_seed(1)
    decoder = copy.deepcopy(model.mask_decoder).train(training)
    for perceptron in decoder.output_hypernetworks_mlps:
        perceptron.proj_out.weight *= sharper
    image, places = torch.randn(prompts, 256, PLACES, PLACES), torch.randn(1, 256, PLACES, PLACES)
    fine = torch.randn(images, 32, 4 * PLACES, 4 * PLACES), torch.randn(images, 64, 2 * PLACES, 2 * PLACES)
    tokens = torch.randn(prompts, 2, 256)
    found = decode_masks(decoder, image, places, fine, tokens, multimask=multimask)
    expected = decoder(
        image_embeddings=image,
        image_positional_embeddings=places,
        sparse_prompt_embeddings=tokens[:, None],
        dense_prompt_embeddings=torch.zeros(1),
        multimask_output=multimask,
        high_resolution_features=[each.expand(prompts, -1, -1, -1) for each in fine],
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_alike(ours, theirs.squeeze(1))
