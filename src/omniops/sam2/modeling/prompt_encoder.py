"""The prompt encoder: points, corners of boxes and masks, as the mask decoder takes them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops.sam2.modeling.layers import LayerNorm2d
from omniops.sam2.modeling.position_encoding import PositionEmbeddingRandom

NOT_A_POINT = -1
"""The label of a point that is to be ignored."""


class PromptEncoder(nn.Module):
    """Sparse embeddings of points, dense ones of masks.

    Args:
        embed_dim: channels C.
        image_size: the side S in pixels of the square that images are resized to.
        mask_in_chans: hidden channels of what encodes masks.
    """

    def __init__(self, embed_dim: int, image_size: int, mask_in_chans: int = 16) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        # By label: outside, inside, and the first and the second corner of a box.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        layers: list[nn.Module] = []
        for channels, wider in itertools.pairwise((1, mask_in_chans // 4, mask_in_chans)):
            layers += [nn.Conv2d(channels, wider, kernel_size=2, stride=2), LayerNorm2d(wider), nn.GELU()]
        self.mask_downscaling = nn.Sequential(*layers, nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1))
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """(1, C, S/16, S/16), the encoding of the positions of an image embedding."""
        side = self.image_size // 16
        return self.pe_layer.of_grid(side, side)

    def embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(B, P + 1, C): one for each point, and one that is to be ignored.

        Args:
            coords: (B, P, 2), x and y in pixels of the resized image.
            labels: (B, P): 1 inside, 0 outside, 2 and 3 the corners of a box, -1 to ignore.
        """
        coords = torch.cat((coords + 0.5, coords.new_zeros(coords.shape[0], 1, 2)), dim=1)
        labels = torch.cat((labels, labels.new_full((labels.shape[0], 1), NOT_A_POINT)), dim=1)[..., None]
        encoding = self.pe_layer(coords / self.image_size)
        embeddings: list[nn.Embedding] = [self.not_a_point_embed, *self.point_embeddings]
        by_label = torch.cat([embedding.weight for embedding in embeddings])
        encoding = torch.where(labels == NOT_A_POINT, 0, encoding)
        return encoding + F.embedding(labels[..., 0] - NOT_A_POINT, by_label)

    def embed_masks(self, masks: Tensor | None) -> Tensor:
        """(B, 1, S/4, S/4), logits -> (B, C, S/16, S/16); None -> (1, C, 1, 1), the embedding of there being none."""
        if masks is None:
            return self.no_mask_embed.weight.reshape(1, -1, 1, 1)
        embedded: Tensor = self.mask_downscaling(masks)
        return embedded
