"""Clips as the official network has them in training, whatever was prompted and corrected."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniops import device as devices
from omniops.sam2.architectures import cast, new
from omniops.sam2.training import box_points, clip_step, image_step, interaction, sample_frames, sample_prompt, steps

SIDE = 64


def moving_squares(frames, objects=2):
    """(T, 3, S, S) and (T, B, S, S)."""
    targets = torch.zeros(frames, objects, SIDE, SIDE)
    for t in range(frames):
        for b in range(objects):
            targets[t, b, 8 + 3 * t : 28 + 3 * t, 10 + 20 * b : 30 + 20 * b] = 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(frames, 3, SIDE, SIDE, generator=generator)
    return noise + 2 * targets.sum(dim=1, keepdim=True), targets


@pytest.fixture
def model():
    torch.manual_seed(0)
    return new("tiny", image_size=SIDE).train()


@pytest.fixture
def pair(twins):
    """The official network in training and ours, with the same weights, which find every object."""
    official, ours = twins(image_size=SIDE)
    official.train()
    ours.train()
    biases = [network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias for network in (official, ours)]
    before = [bias.detach().clone() for bias in biases]
    rates = {module: module.p for module in official.modules() if isinstance(module, nn.Dropout)}
    with torch.no_grad():
        for bias in biases:
            bias.fill_(9)
    for module in official.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    attentions = {module: module.dropout_p for module in official.modules() if hasattr(module, "dropout_p")}
    for module in attentions:
        module.dropout_p = 0.0
    yield official, ours
    for module, rate in rates.items():
        module.p = rate
    for module, rate in attentions.items():
        module.dropout_p = rate
    with torch.no_grad():
        for bias, values in zip(biases, before, strict=True):
            bias.copy_(values)
    official.eval()
    ours.eval()


class Official:
    """The official network on a clip, with clicks that were drawn before."""

    def __init__(self, network, frames, targets, clicks):
        self.network, self.targets, self.clicks = network, targets, iter(clicks)
        self.features = network.forward_image(frames)
        self.outputs = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        self.masks = []

    def run(self, prompt, prompted, corrected, number):
        frames = range(len(self.targets))
        for t in (*prompted, *(t for t in frames if t not in prompted)):
            self.frame(t, prompt, t in prompted, number if t in corrected and prompt != "mask" else 0)
            is_cond = t in prompted or t in corrected
            self.outputs["cond_frame_outputs" if is_cond else "non_cond_frame_outputs"][t] = self.output
        return self.masks

    def frame(self, t, prompt, is_prompted, number):
        network, targets = self.network, self.targets[t]
        one = {
            name: [x[t : t + 1].expand(len(targets), -1, -1, -1) for x in self.features[name]]
            for name in ("backbone_fpn", "vision_pos_enc")
        }
        _, features, positions, sizes = network._prepare_backbone_features(one)
        points = mask = None
        if is_prompted and prompt == "box":
            points = dict(zip(("point_coords", "point_labels"), box_points(targets), strict=True))
        elif is_prompted:
            mask = targets[:, None]
        self.output, found, high_res_features, pix_feat = network._track_step(
            t, is_prompted, features, positions, sizes, points, mask, self.outputs, len(self.targets), False, None
        )
        if mask is None:
            self.masks.append(found[0])
        for _ in range(number):
            coords, labels = next(self.clicks)
            if points is not None:
                coords, labels = (torch.cat(both, 1) for both in zip(points.values(), (coords, labels), strict=True))
            points = {"point_coords": coords, "point_labels": labels}
            found = network._forward_sam_heads(
                backbone_features=pix_feat,
                point_inputs=points,
                mask_inputs=found[3],
                high_res_features=high_res_features,
                multimask_output=network._use_multimask(is_prompted, points),
            )
            self.masks.append(found[0])
        self.remember(features, sizes, points, found)

    def remember(self, features, sizes, points, found):
        """As the official predictor, from masks at the decoder's size."""
        self.output.update(pred_masks=found[3], obj_ptr=found[5])
        high_res = F.interpolate(found[3], (SIDE, SIDE), mode="bilinear", align_corners=False)
        self.network._encode_memory_in_output(features, sizes, points, True, high_res, found[6], self.output)


@pytest.mark.parametrize(
    ("prompt", "frames", "prompted", "corrected"),
    [
        ("box", 5, 2, 3),
        ("mask", 9, 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("box", 4, 1, 1), ("mask", 4, 1, 1), ("box", 9, 1, 2))
        ),
    ],
)
def test_masks_are_the_official_ones(monkeypatch, pair, prompt, frames, prompted, corrected):
    official, ours = pair
    images, targets = moving_squares(frames)
    found, clicks = [], []
    losses, points = steps.sam2_losses, interaction.corrective_points

    def draw(*args):
        clicks.append(points(*args))
        return clicks[-1]

    monkeypatch.setattr(steps, "sam2_losses", lambda masks, expected: found.append(masks) or losses(masks, expected))
    monkeypatch.setattr(interaction, "corrective_points", draw)
    with torch.no_grad():
        clip_step(
            ours,
            images,
            targets,
            prompt,
            num_correction_pt_per_frame=2,
            num_init_cond_frames=prompted,
            num_frames_to_correct=corrected,
            generator=torch.Generator().manual_seed(1),
        )
        chosen = sample_frames(frames, prompted, corrected, generator=torch.Generator().manual_seed(1))
        expected = Official(official, images, targets, clicks).run(prompt, *chosen, 2)
    assert len(clicks) == (0 if prompt == "mask" else 2 * corrected)
    assert len(found) == frames - prompted if prompt == "mask" else len(found) == frames + 2 * corrected
    for masks, theirs in zip(found, expected, strict=True):
        assert (theirs > -1024).all()  # else the masks would not be seen
        assert (masks.low_res_masks - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_frames_are_drawn_as_officially():
    generator = torch.Generator().manual_seed(0)
    drawn = [
        sample_frames(8, 2, 3, rand_init_cond_frames=True, rand_frames_to_correct=True, generator=generator)
        for _ in range(300)
    ]
    assert {(len(prompted), len(corrected)) for prompted, corrected in drawn} == {
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 2),
        (2, 3),
    }
    for prompted, corrected in drawn:
        assert prompted[0] == 0
        assert corrected[: len(prompted)] == prompted
        assert len(set(corrected)) == len(corrected)
    assert {t for _, corrected in drawn for t in corrected} == set(range(8))
    assert sample_frames(1) == ([0], [0])
    for wrong in ((8, 0, 1), (8, 2, 1), (2, 1, 3)):
        with pytest.raises(ValueError, match="num_init_cond_frames, num_frames_to_correct"):
            sample_frames(*wrong)


def test_prompts_are_drawn_as_officially():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_prompt(0.5, 0.25, generator) for _ in range(2000)]
    shares = {prompt: drawn.count(prompt) / 2000 for prompt in steps.PROMPTS}
    assert shares == pytest.approx({"point": 0.375, "box": 0.125, "mask": 0.5}, abs=0.04)
    with pytest.raises(ValueError, match="prob_to_use_box_input must be a probability"):
        sample_prompt(1, 2)


def test_clicks_of_the_target(monkeypatch, model):
    images, targets = moving_squares(1)
    clicks = []
    points = interaction.corrective_points
    monkeypatch.setattr(interaction, "corrective_points", lambda *args: clicks.append(points(*args)) or clicks[-1])
    image_step(model, images, targets[:, 0], "box", num_correction_pt_per_frame=4, prob_to_sample_from_gt=1)
    assert len(clicks) == 4
    for coords, labels in clicks:
        x, y = coords[0, 0].long()
        assert targets[0, 0, y, x] == labels.item() == 1


def test_what_was_corrected_is_remembered_as_prompted_or_not(monkeypatch, model):
    images, targets = moving_squares(3, 1)
    times = []
    encode = model.encode_times
    monkeypatch.setattr(model, "encode_times", lambda *args: times.append(args) or encode(*args))
    options = {"num_correction_pt_per_frame": 1, "num_frames_to_correct": 3}
    clip_step(model, images, targets, "box", **options)
    clip_step(model, images, targets, "box", **options, add_all_frames_to_correct_as_cond=False)
    assert times == [([0], [1], 2), ([0, 0], [2, 1], 2), ([0], [1], 2), ([0, 1], [2, 1], 2)]


@pytest.mark.parametrize("step", ["pictures", "clip", "clip of a mask"])
def test_bfloat16(model, step):
    images, targets = moving_squares(2, 1)

    def loss(number):
        generator = torch.Generator().manual_seed(0)
        options = {"num_correction_pt_per_frame": number, "generator": generator}
        if step == "pictures":
            return image_step(model, images, targets[:, 0], "point", **options).total
        return clip_step(model, images, targets, "mask" if "mask" in step else "point", **options).total

    expected = loss(0)
    with devices.autocast("cpu", torch.bfloat16):
        found = loss(0)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=0.02)
        corrected = loss(1)
    corrected.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 290
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.any().item() for gradient in gradients) > 290


def refused(call, *messages):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(messages)):
        call()


def test_wrong_arguments_are_named(model):
    images, targets = moving_squares(2, 1)
    refused(lambda: image_step(model, images, targets[:, 0], "dot"), "prompt must be one of", "'dot'")
    refused(lambda: image_step(model, images[..., 1:], targets[:, 0]), r"images must be \(N, 3, 64, 64\)", "63")
    refused(lambda: image_step(model, images, targets), r"targets must be \(B, S, S\)", r"\(2, 64, 64\), got")
    refused(lambda: image_step(model, images, targets[:, 0], num_correction_pt_per_frame=-1), "num_correction", "-1")
    refused(lambda: image_step(model, images, targets[:, 0], prob_to_sample_from_gt=2), "prob_to_sample_from_gt", "2")
    refused(lambda: clip_step(model, images, targets[:, 0]), r"targets must be \(T, B, S, S\)", r"\(2, 64, 64\)")
    refused(lambda: clip_step(model, images, targets[:, :0]), "targets must be", r"got \(2, 0, 64, 64\)")
    refused(lambda: clip_step(model, images[:0], targets[:0]), "frames must be", "N >= 1")
    refused(lambda: clip_step(model, images, targets, num_frames_to_correct=3), "num_frames_to_correct", "1, 3 and 2")
    refused(lambda: clip_step(model, images, targets, "mask", num_init_cond_frames=2), "num_init_cond_frames", "less")
    refused(lambda: image_step(cast(model, torch.bfloat16), images, targets[:, 0]), "model must be in float32")
