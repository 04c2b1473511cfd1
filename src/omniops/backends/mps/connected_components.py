"""Connected components in Metal: launches the kernels; ``omniops.ops.connected_components`` says what they compute.

Four launches, or two where the image is one tile, whatever the masks hold; connected_components.metal says what each
does.
"""

import torch
from torch import Tensor

from omniops.backends import as_signed, empty
from omniops.backends.mps._library import library

# These stand in connected_components.metal too, which says what they are.
TILE_WORDS = 4
TILE_ROWS = 64
WRITTEN_ROWS = 4

_METAL_TYPES = {torch.int8: "char", torch.int16: "short", torch.int32: "int", torch.int64: "long"}
PIXEL_GROUP = (32, 8, 1)
WORD_GROUP = (64, 1)


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    n, _, h, w = mask.shape
    labels, counts = (empty(mask.shape, like=mask, dtype=torch.int32) for _ in range(2))
    mask = as_signed(mask).contiguous()
    words = -(-w // 32)
    bits, subcomponents = (torch.empty((n, h, words), dtype=torch.int32, device=mask.device) for _ in range(2))
    sizes = [h, w, words, connectivity]
    tiles = -(-words // TILE_WORDS), -(-h // TILE_ROWS)
    metal = library("connected_components")
    getattr(metal, f"label_tiles_{_METAL_TYPES[mask.dtype]}")(
        mask,
        bits,
        subcomponents,
        labels,
        counts,
        sizes,
        threads=(tiles[0] * PIXEL_GROUP[0], tiles[1] * PIXEL_GROUP[1], n),
        group_size=PIXEL_GROUP,
        arg_casts={5: "int32"},
    )
    if borders := (tiles[1] - 1) * w + (tiles[0] - 1) * h:
        metal.merge_tiles(bits, labels, sizes, threads=(borders, n), group_size=WORD_GROUP, arg_casts={2: "int32"})
        metal.count_subcomponents(
            subcomponents, labels, counts, sizes, threads=(h * words, n), group_size=WORD_GROUP, arg_casts={3: "int32"}
        )
    metal.write_result(
        bits,
        labels,
        counts,
        sizes,
        threads=(words * 32, -(-h // WRITTEN_ROWS), n),
        group_size=PIXEL_GROUP,
        arg_casts={3: "int32"},
    )
    return labels, counts
