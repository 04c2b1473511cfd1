"""What a program around SAM 2's files does with them: a click on a picture, and the next frame of a video."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from omniops.sam2.architectures import HieraSize
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.transforms import resize

SIDE = 128
SMALL = HieraSize(16, 1, (1, 1, 1, 1), (2, 2, 2))

Run = Callable[..., tuple[np.ndarray, ...]]
"""Of a part's name and its inputs, arrays by position -> its outputs."""


def small_model(version: str = "2.1") -> SAM2Base:
    """A network with a small trunk, whose masks differ from point to point, and which sees an object everywhere."""
    torch.manual_seed(0)
    model = SAM2Base(SMALL, version, SIDE).eval()
    decoder = model.sam_mask_decoder
    for layers in (model.memory_attention.layers, decoder.transformer.layers):
        del layers[:-1]  # they are alike, and take long to compile
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.abs().max() < 1e-4:  # which would hide what it is multiplied with
                torch.nn.init.normal_(parameter, std=0.05)
        for perceptron in decoder.output_hypernetworks_mlps:
            perceptron.layers[-1].weight *= 40
        for parameter in decoder.transformer.parameters():
            if parameter.dim() == 2:
                parameter *= 2
        decoder.iou_prediction_head.layers[-1].weight *= 20
        decoder.pred_obj_score_head.layers[-1].bias += 2
    return model


def pixels_of(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) of uint8 -> the image encoder's input."""
    return resize(image, SIDE, torch.device("cpu"))[None].numpy()


def prompts_of(coords: list[list[float]], labels: list[int], size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Points in pixels of a picture (H, W) -> the mask decoder's last four inputs."""
    scaled = np.array(coords, np.float32) / np.array([size[1], size[0]], np.float32) * SIDE
    return (
        scaled[None],
        np.array(labels, np.int64)[None],
        np.zeros((1, 1, SIDE // 4, SIDE // 4), np.float32),
        np.zeros(1, np.float32),
    )


def predict(run: Run, image: np.ndarray, coords: list[list[float]], labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The three masks of a prompt, logits at the picture's size, and their scores."""
    image_embed, *high_res_feats, _ = run("image_encoder", pixels_of(image))
    masks, ious, _, _ = run("mask_decoder", image_embed, *high_res_feats, *prompts_of(coords, labels, image.shape[:2]))
    upsampled = F.interpolate(torch.from_numpy(masks), image.shape[:2], mode="bilinear", align_corners=False)
    return upsampled[0, 1:].numpy(), ious[0, 1:]


def best_of_three(outputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mask decoder's outputs -> low_res_masks (B, 1, ...), obj_ptr (B, 256) and object_score_logits of the best."""
    masks, ious, pointers, scores = outputs
    objects = np.arange(len(ious))
    best = 1 + ious[:, 1:].argmax(axis=1)
    logits = np.where(scores[..., None, None] > 0, masks[objects, best][:, None], np.float32(-1024))
    return logits, pointers[objects, best], scores


def rounded(memory: np.ndarray) -> np.ndarray:
    """As the video predictor keeps it."""
    return torch.from_numpy(memory).bfloat16().float().numpy()


def track(run: Run, frames: list[np.ndarray], coords: list[list[float]], labels: list[int]) -> dict[str, np.ndarray]:
    """A click on the first of two frames of an object -> what is known of it on the second."""
    image_embed, *high_res_feats, pix_feat = run("image_encoder", frames[0])
    prompts = prompts_of(coords, labels, (SIDE, SIDE))
    masks, pointer, score = best_of_three(run("mask_decoder", image_embed, *high_res_feats, *prompts))
    (memory,) = run("memory_encoder", pix_feat, masks, score, np.ones(1, np.float32))

    _, *high_res_feats, pix_feat = run("image_encoder", frames[1])
    times = np.zeros(1, np.int64), np.ones(1, np.float32)  # of a video of two frames
    (image_embed,) = run("memory_attention", pix_feat, rounded(memory)[None], times[0], pointer[None], times[1])
    none = prompts_of([[0, 0]], [-1], (SIDE, SIDE))
    masks, pointer, score = best_of_three(run("mask_decoder", image_embed, *high_res_feats, *none))
    (memory,) = run("memory_encoder", pix_feat, masks, score, np.zeros(1, np.float32))
    return {"pred_masks": masks, "obj_ptr": pointer, "object_score_logits": score, "maskmem_features": memory}


def inputs_of(name: str, count: int, number: int) -> tuple[torch.Tensor, ...]:
    """Inputs for ``count`` pictures, prompts or objects, with ``number`` points or memories each."""
    torch.manual_seed(1)
    side = SIDE // 16
    low_res = torch.randn(count, 1, SIDE // 4, SIDE // 4) * 8
    flags = torch.arange(count) % 2.0
    return {
        "image_encoder": lambda: (torch.rand(count, 3, SIDE, SIDE),),
        "mask_decoder": lambda: (
            torch.randn(1, 256, side, side),
            torch.randn(1, 32, SIDE // 4, SIDE // 4),
            torch.randn(1, 64, SIDE // 8, SIDE // 8),
            torch.rand(count, number, 2) * SIDE,
            torch.arange(count * number).reshape(count, number) % 5 - 1,
            low_res,
            flags,
        ),
        "memory_attention": lambda: (
            torch.randn(1, 256, side, side),
            torch.randn(number, count, 64, side, side),
            torch.arange(number) % 7,
            torch.randn(number + 1, count, 256),
            torch.arange(number + 1) / 15,
        ),
        "memory_encoder": lambda: (
            torch.randn(1, 256, side, side),
            low_res,
            torch.linspace(-1, 1, count)[:, None],
            flags,
        ),
    }[name]()
