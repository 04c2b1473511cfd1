"""The mask decoder: an image embedding and the embeddings of prompts -> masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniops.sam2.modeling.layers import LONGEST_SUM, MLP, LayerNorm2d, project_rows
from omniops.sam2.modeling.transformer import TwoWayTransformer

_OBJ_SCORE, _IOU, _FIRST_MASK = 0, 1, 2  # the order of the decoder's own tokens, which come before those of the prompt


class Masks(NamedTuple):
    """What is found of B prompts: M masks each, 3 with multimask_output, else 1."""

    low_res_masks: Tensor
    """(B, M, S/4, S/4), logits"""
    ious: Tensor
    """(B, M), the predicted IoU of each mask."""
    sam_output_tokens: Tensor
    """(B, M, 256), of which object pointers are made."""
    object_score_logits: Tensor
    """(B, 1), above 0 where the object is in the image."""


class MaskDecoder(nn.Module):
    """Masks by the products of each pixel's features with the weights that a small perceptron makes of each mask token.

    Args:
        transformer_dim: channels C.
        num_multimask_outputs: masks where a prompt may mean several things; one more is for where it does not.
    """

    def __init__(self, transformer_dim: int, num_multimask_outputs: int = 3) -> None:
        super().__init__()
        dim = transformer_dim
        self.num_mask_tokens = num_multimask_outputs + 1
        self.transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=2048)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, dim)
        self.obj_score_token = nn.Embedding(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.conv_s0 = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8, num_layers=3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(dim, 256, self.num_mask_tokens, num_layers=3, sigmoid_output=True)
        self.pred_obj_score_head = MLP(dim, dim, 1, num_layers=3)
        self.dynamic_multimask_via_stability = True
        self.dynamic_multimask_stability_delta = 0.05
        self.dynamic_multimask_stability_thresh = 0.98

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        high_res_features: tuple[Tensor, Tensor],
        *,
        multimask_output: bool,
    ) -> Masks:
        """The masks of B prompts.

        Args:
            image_embeddings: (B, C, S/16, S/16), of an image, with the dense embedding of each prompt added.
            image_pe: (1, C, S/16, S/16), the encoding of positions.
            sparse_prompt_embeddings: (B, T, C), the tokens of each prompt.
            high_res_features: (1 or B, C/8, S/4, S/4) and (1 or B, C/4, S/8, S/8).
            multimask_output: three masks, else one: where the mask meant for one is not stable, the best of the three.
        """
        falls_back = self.dynamic_multimask_via_stability and not multimask_output and not self.training
        chosen = slice(1 if multimask_output else 0, None if multimask_output or falls_back else 1)
        found = self.decode(image_embeddings, image_pe, sparse_prompt_embeddings, high_res_features, chosen)
        if not falls_back:
            return found
        masks, ious = self.choose_stable(found.low_res_masks, found.ious)
        return Masks(masks, ious, found.sam_output_tokens[:, :1], found.object_score_logits)

    def decode(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        high_res_features: tuple[Tensor, Tensor],
        chosen: slice,
    ) -> Masks:
        """As ``forward``, the masks of those tokens: the first is for prompts that mean one thing."""
        own = torch.cat((self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own.expand(sparse_prompt_embeddings.shape[0], -1, -1), sparse_prompt_embeddings), dim=1)
        queries, keys = self.transformer(image_embeddings, image_pe, tokens)
        upscaled = self._upscale(keys.transpose(1, 2).unflatten(2, image_embeddings.shape[-2:]), high_res_features)

        ious = project_rows(self.iou_prediction_head, queries[:, _IOU])
        object_score_logits = project_rows(self.pred_obj_score_head, queries[:, _OBJ_SCORE])
        mask_tokens = queries[:, _FIRST_MASK : _FIRST_MASK + self.num_mask_tokens][:, chosen]
        weights = torch.stack(
            [project_rows(mlp, mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps[chosen])],
            dim=1,
        )
        masks = _product(weights, upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return Masks(masks, ious[:, chosen], mask_tokens, object_score_logits)

    def _upscale(self, x: Tensor, high_res_features: tuple[Tensor, Tensor]) -> Tensor:
        """(B, C, S/16, S/16) -> (B, C/8, S/4, S/4)."""
        first_conv, norm, first_activation, second_conv, second_activation = self.output_upscaling
        stride_4, stride_8 = high_res_features
        x = first_activation(norm(first_conv(x) + stride_8))
        upscaled: Tensor = second_activation(second_conv(x) + stride_4)
        return upscaled

    def choose_stable(self, masks: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
        """Of each prompt's four masks the first where it is stable, else the best of the others: (B, 1, ...), (B, 1).

        A mask's stability is the IoU of what is surely inside and of what is perhaps inside.
        """
        delta = self.dynamic_multimask_stability_delta
        single = masks[:, 0].flatten(1)
        surely, perhaps = (single > delta).sum(dim=1).float(), (single > -delta).sum(dim=1).float()
        stability = torch.where(perhaps > 0, surely / perhaps, 1.0)
        is_stable = stability >= self.dynamic_multimask_stability_thresh
        best = torch.where(is_stable, 0, 1 + ious[:, 1:].argmax(dim=1))
        prompt = torch.arange(best.shape[0], device=best.device)
        return masks[prompt, best][:, None], ious[prompt, best][:, None]


def _product(weights: Tensor, upscaled: Tensor) -> Tensor:
    """(B, M, C) and (B, C, P) -> (B, M, P), on MPS 2**15 columns at a time, or fewer where gradients sum over them.

    Before macOS 14.4 a matrix product of larger sides or strides is wrong there (pytorch issue 116769).
    """
    if upscaled.device.type != "mps":
        return weights @ upscaled
    columns_at_once = LONGEST_SUM if torch.is_grad_enabled() else 2**15
    products = [weights @ columns.contiguous() for columns in upscaled.split(columns_at_once, dim=2)]
    for product in products:
        if product.requires_grad:  # whose gradients are views of one for all columns, with its strides
            product.register_hook(Tensor.contiguous)
    return torch.cat(products, dim=2)
