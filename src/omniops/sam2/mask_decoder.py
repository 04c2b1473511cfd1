"""The mask decoder's steps, without the copies that transformers' ``Sam2VideoMaskDecoder.forward`` makes.

The weights are its modules'. It repeats the features of an image for every point of it, which copies them even where
there is one, 16 MB at 1024; and it decodes four masks where three are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMaskDecoder

from omniops import device as devices

_SCORES_AT, _MASKS_AT = 1, 2  # the tokens: whether the object is there, scores, masks, then those of the prompt


def decode_masks(
    decoder: Sam2VideoMaskDecoder,
    image: Tensor,
    places: Tensor,
    fine: tuple[Tensor, Tensor],
    prompt: Tensor,
    *,
    multimask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The masks of B prompts.

    Args:
        decoder: the model's.
        image: (B, 256, S/16, S/16), of one image with what each prompt says of its places.
        places: (1, 256, S/16, S/16), their encoding.
        fine: (1 or B, 32, S/4, S/4) and (1 or B, 64, S/8, S/8).
        prompt: (B, T, 256), the tokens of each prompt.
        multimask: three masks, else one: where the mask meant for one is not stable, the best of the three.

    Returns:
        Logits (B, M, S/4, S/4), scores (B, M), tokens (B, M, 256), and the logit of there being an object (B, 1).
    """
    own = torch.cat((decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens = torch.cat((own.expand(len(prompt), -1, -1), prompt), dim=1)
    queries, keys = decoder.transformer(
        point_embeddings=tokens[:, None],
        image_embeddings=image,
        image_positional_embeddings=places,
        attention_similarity=None,
    )
    queries = queries[:, 0]
    wide = keys[:, 0].transpose(1, 2).unflatten(2, image.shape[-2:])
    wide = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(wide) + fine[1]))
    wide = decoder.activation(decoder.upscale_conv2(wide) + fine[0])

    scores = project_rows(decoder.iou_prediction_head, queries[:, _SCORES_AT])
    is_there = project_rows(decoder.pred_obj_score_head, queries[:, 0])
    fall_back = decoder.dynamic_multimask_via_stability and not multimask and not decoder.training
    chosen = slice(1 if multimask else 0, None if multimask or fall_back else 1)
    found = queries[:, _MASKS_AT : _MASKS_AT + decoder.num_mask_tokens][:, chosen]
    weights = torch.stack(
        [project_rows(network, found[:, i]) for i, network in enumerate(decoder.output_hypernetworks_mlps[chosen])],
        dim=1,
    )
    logits, scores = _product(weights, wide.flatten(2)).unflatten(2, wide.shape[-2:]), scores[:, chosen]
    if fall_back:
        logits, scores, found = *_stable(decoder, logits, scores), found[:, :1]
    return logits, scores, found, is_there


def project_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """A perceptron of (N, C), none of whose linear layers sees a single row on MPS."""
    result: Tensor = module(devices.without_single_row(rows))
    return result if len(result) == len(rows) else result[: len(rows)]


def _product(weights: Tensor, wide: Tensor) -> Tensor:
    """(B, M, C) and (B, C, P) -> (B, M, P), on MPS in parts of 2**15 columns.

    Before macOS 14.4 a matrix product of larger sides or strides is wrong there (pytorch issue 116769).
    """
    if wide.device.type == "mps":
        return torch.cat([weights @ part.contiguous() for part in wide.split(2**15, dim=2)], dim=2)
    return weights @ wide


def _stable(decoder: Sam2VideoMaskDecoder, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each prompt's four masks the first where it is stable, else the best of the others: (B, 1, ...), (B, 1).

    A mask's stability is the IoU of what is surely inside and of what is perhaps inside.
    """
    margin = decoder.dynamic_multimask_stability_delta
    first = logits[:, 0].flatten(1)
    surely, perhaps = (first > margin).sum(dim=1).float(), (first > -margin).sum(dim=1).float()
    stability = torch.where(perhaps > 0, surely / perhaps, 1.0)
    is_stable = stability >= decoder.dynamic_multimask_stability_thresh
    best = torch.where(is_stable, 0, 1 + scores[:, 1:].argmax(dim=1))
    each = torch.arange(len(best), device=best.device)
    return logits[each, best][:, None], scores[each, best][:, None]
