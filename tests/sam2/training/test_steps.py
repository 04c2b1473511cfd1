"""Losses by hand, gradients, and weights that the official package loads."""

import errno
import math

import pytest
import torch

from omniops.sam2.architectures import new
from omniops.sam2.checkpoints import load
from omniops.sam2.training import (
    actual_iou,
    box_points,
    clip_step,
    corrective_points,
    dice_loss,
    image_step,
    save_checkpoint,
    sigmoid_focal_loss,
)

SIDE = 64
UNUSED = {"no_mem_pos_enc"}  # in the checkpoints, but used by no model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return new("tiny", image_size=SIDE).train()


@pytest.fixture
def batch():
    images, targets = torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, SIDE, SIDE)
    targets[0, 8:40, 8:40] = targets[1, 20:60, 16:48] = 1
    return images + 2 * targets[:, None], targets


def test_losses_by_hand():
    logits = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    expected = (0.25 + 3 * 0.75) / 4 * 0.25 * math.log(2)
    assert sigmoid_focal_loss(logits, targets).item() == pytest.approx(expected)
    assert dice_loss(logits, targets).item() == pytest.approx(1 - 2 / 4)
    assert actual_iou(targets - 0.5, torch.ones_like(targets)).item() == 0.25
    for loss in (sigmoid_focal_loss, dice_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, targets), logits)


def test_prompts_by_hand():
    targets = torch.zeros(1, 6, 8)
    targets[0, 1:4, 2:7] = 1
    coords, labels = box_points(targets)
    assert coords.tolist() == [[[2, 1], [6, 3]]]
    assert labels.tolist() == [[2, 3]]
    logits = targets * 2 - 1
    logits[0, 3, 6] = -1
    points, labels = corrective_points(logits, targets)
    assert (points.tolist(), labels.tolist()) == ([[[6, 3]]], [[1]])
    assert corrective_points(targets * 2 - 1, targets)[1].item() == -1


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["point", "box", "mask"])
def test_loss_falls(model, batch, prompt):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    values = []
    for _ in range(6):
        loss = image_step(
            model, *batch, prompt, num_correction_pt_per_frame=0, generator=torch.Generator().manual_seed(0)
        ).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_gradients_reach_every_parameter(model, batch):
    images, targets = batch
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(1)
    for prompt in ("point", "box", "mask"):
        image_step(model, *batch, prompt, num_correction_pt_per_frame=1).total.backward()
    clip_step(model, images, targets[:, None], num_correction_pt_per_frame=0).total.backward()
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-99)
    clip_step(model, images, targets[:, None], num_correction_pt_per_frame=0).total.backward()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == UNUSED


def test_saved_weights_load_in_the_official_package(model, twins, tmp_path):
    official, _ = twins(image_size=SIDE)
    path = tmp_path / "tuned.pt"
    save_checkpoint(model, path)
    state = torch.load(path, weights_only=True)["model"]
    assert official.state_dict().keys() == state.keys()
    ours = load(path, "cpu", "float32", image_size=SIDE).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


def test_a_file_that_cannot_be_written_leaves_the_one_before(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        save_checkpoint(model, tmp_path / "none" / "tuned.pt")
    path = tmp_path / "tuned.pt"
    path.write_bytes(b"before")

    def fail(value, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(model, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_official_package_computes_the_same_masks(model, twins, tmp_path):
    official, _ = twins(image_size=SIDE)
    before = {name: tensor.clone() for name, tensor in official.state_dict().items()}
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(9)
    path = tmp_path / "tuned.pt"
    save_checkpoint(model, path)
    try:
        official.load_state_dict(torch.load(path, weights_only=True)["model"], strict=True)
        images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        model.eval()
        points, labels = torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1, dtype=torch.int32)
        with torch.no_grad():
            features = model.forward_image(images)
            embed = model.add_no_mem_embed(features.image_embed)
            found = model.predict_masks(features, embed, points, labels, None, multimask_output=True).low_res_masks
            fine = official.forward_image(images)["backbone_fpn"][:2]
            expected = official._forward_sam_heads(
                embed, {"point_coords": points, "point_labels": labels}, high_res_features=fine, multimask_output=True
            )[0]
        assert (expected > -1024).all()  # else the masks would not be seen
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        official.load_state_dict(before)
