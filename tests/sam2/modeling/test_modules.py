"""Modules of the network against the official package's, one by one, with the same weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from omniops.sam2.modeling.memory_attention import MemoryAttention
from omniops.sam2.modeling.position_encoding import PositionEmbeddingSine

SIDE = 64
MAP = SIDE // 16


@pytest.fixture
def models(twins):
    return twins(image_size=SIDE)


def assert_alike(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "version"),
    [
        ("tiny", "2.1"),
        pytest.param("base-plus", "2.0", marks=pytest.mark.slow),
        pytest.param("large", "2.1", marks=pytest.mark.slow),
    ],
)
def test_image_encoder(twins, size, version):
    """Equal to the bit, but for the fine stages: their convolutions and the mask decoder's are one here."""
    official, ours = twins(size, version, 128)
    images = torch.randn(2, 3, 128, 128, generator=torch.manual_seed(1))
    expected = official.forward_image(images)["backbone_fpn"]
    features = ours.forward_image(images)
    assert torch.equal(features.image_embed, expected[2])
    for found, fine in zip(features.high_res_feats, expected, strict=False):
        assert_alike(found, fine)


@torch.no_grad()
def test_position_encodings(models):
    official, ours = models
    like = torch.zeros(1, 256, MAP, MAP)
    for theirs, module in (
        (official.image_encoder.neck, ours.image_encoder.neck),
        (official.memory_encoder, ours.memory_encoder),
    ):
        expected = theirs.position_encoding(like)
        assert torch.equal(module.position_encoding(MAP, MAP, like.device), expected)
    assert torch.equal(ours.sam_prompt_encoder.get_dense_pe(), official.sam_prompt_encoder.get_dense_pe())


@torch.no_grad()
@pytest.mark.parametrize("labels", [[1], [0, 1, -1], [2, 3], [2, 3, 1, 0]])
def test_prompts(models, labels):
    official, ours = models
    torch.manual_seed(1)
    points, labels = torch.rand(2, len(labels), 2) * SIDE, torch.tensor([labels, labels[::-1]])
    masks = torch.randn(2, 1, MAP * 4, MAP * 4)
    sparse, dense = official.sam_prompt_encoder(points=(points, labels), boxes=None, masks=masks)
    assert torch.equal(ours.sam_prompt_encoder.embed_points(points, labels), sparse)
    assert_alike(ours.sam_prompt_encoder.embed_masks(masks), dense)
    _, dense = official.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)
    assert torch.equal(ours.sam_prompt_encoder.embed_masks(None).expand(2, -1, MAP, MAP), dense)


@torch.no_grad()
@pytest.mark.parametrize("projected_after", [set(), {("cpu", torch.float32)}])
@pytest.mark.parametrize("num_obj_ptr_tokens", [0, 8])
@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("objects", [1, 3])
def test_memory_attention(models, monkeypatch, objects, memories, num_obj_ptr_tokens, projected_after):
    monkeypatch.setattr("omniops.sam2.modeling.memory_attention._PROJECTED_AFTER", projected_after)
    official, ours = models
    torch.manual_seed(1)
    tokens = memories * MAP**2 + num_obj_ptr_tokens
    curr, curr_pos = torch.randn(1, MAP**2, 256), torch.randn(1, MAP**2, 256)
    memory, memory_pos = torch.randn(objects, tokens, 64), torch.randn(tokens, 64)
    expected = [
        official.memory_attention(
            curr=curr.transpose(0, 1),
            curr_pos=curr_pos.transpose(0, 1),
            memory=of_object[:, None],
            memory_pos=memory_pos[:, None],
            num_obj_ptr_tokens=num_obj_ptr_tokens,
        ).transpose(0, 1)
        for of_object in memory
    ]
    found = ours.memory_attention(curr + 0.1 * curr_pos, memory, memory_pos, (MAP, MAP), num_obj_ptr_tokens)
    assert_alike(found, torch.cat(expected))


@torch.no_grad()
def test_memory_encoder(models):
    official, ours = models
    torch.manual_seed(1)
    features, masks = torch.randn(1, 256, MAP, MAP), 20 * torch.rand(3, 1, SIDE, SIDE) - 10
    expected = official.memory_encoder(features, masks, skip_mask_sigmoid=True)["vision_features"]
    assert_alike(ours.memory_encoder(features, masks), expected)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sharper", [1, 300])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (3, 1), (3, 3)])
def test_mask_decoder(models, prompts, images, multimask, sharper, training):
    """Single masks are not stable as the weights are, and stable where they are much sharper."""
    theirs, ours = (copy.deepcopy(model.sam_mask_decoder).train(training) for model in models)
    for decoder in (theirs, ours):
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= sharper
    torch.manual_seed(1)
    image, image_pe = torch.randn(prompts, 256, MAP, MAP), torch.randn(1, 256, MAP, MAP)
    high_res = torch.randn(images, 32, 4 * MAP, 4 * MAP), torch.randn(images, 64, 2 * MAP, 2 * MAP)
    sparse = torch.randn(prompts, 2, 256)
    found = ours(image, image_pe, sparse, high_res, multimask_output=multimask)
    masks, ious, tokens, object_score_logits = theirs(
        image_embeddings=image,
        image_pe=image_pe,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=torch.zeros_like(image),
        multimask_output=multimask,
        repeat_image=False,
        high_res_features=[features.expand(prompts, -1, -1, -1) for features in high_res],
    )
    for value, expected in zip(found, (masks, ious, tokens, object_score_logits), strict=True):
        assert_alike(value, expected)


@torch.no_grad()
def test_copies_and_files_have_no_encodings_of_a_device():
    """Those of CUDA could not be read where there is none."""
    sines, attention = PositionEmbeddingSine(8), MemoryAttention(8, 4, num_layers=1, dim_feedforward=8)
    expected = sines(2, 3, torch.device("cpu"))
    arguments = torch.ones(1, 6, 8), torch.ones(1, 6, 4), torch.ones(6, 4), (2, 3), 0
    attended = attention(*arguments)
    assert sines._cache
    assert attention._rotations
    for make_copy in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        copied, copied_attention = make_copy(sines), make_copy(attention)
        assert not copied._cache
        assert not copied_attention._rotations
        assert torch.equal(copied(2, 3, torch.device("cpu")), expected)
        assert torch.equal(copied_attention(*arguments), attended)
    assert sines._cache
    assert attention._rotations
