"""Connected components in Metal: launches the kernels; ``omniops.ops.connected_components`` says what they compute.

Six launches whatever the masks hold; connected_components.metal says what each does.
"""

import torch
from torch import Tensor

from omniops.backends import as_signed, empty
from omniops.backends.mps._library import library

_METAL_TYPES = {torch.int8: "char", torch.int16: "short", torch.int32: "int", torch.int64: "long"}
PIXEL_GROUP = (32, 8, 1)
WORD_GROUP = (64, 1)


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    n, _, h, w = mask.shape
    labels, counts = (empty(mask.shape, like=mask, dtype=torch.int32) for _ in range(2))
    mask = as_signed(mask).contiguous()
    words = (w + 31) // 32
    bits = torch.empty((n, h, words), dtype=torch.int32, device=mask.device)
    sizes = [h, w, words]
    metal = library("connected_components")
    by_pixel = {"threads": (words * 32, h, n), "group_size": PIXEL_GROUP}
    by_word = {"threads": (h * words, n), "group_size": WORD_GROUP}
    getattr(metal, f"pack_mask_{_METAL_TYPES[mask.dtype]}")(mask, bits, sizes, arg_casts={2: "int32"}, **by_pixel)
    getattr(metal, f"link_runs_{connectivity}")(bits, labels, counts, sizes, arg_casts={3: "int32"}, **by_word)
    metal.flatten_runs(bits, labels, counts, sizes, arg_casts={3: "int32"}, **by_word)
    getattr(metal, f"merge_runs_{connectivity}")(bits, labels, sizes, arg_casts={2: "int32"}, **by_word)
    metal.flatten_and_count_runs(bits, labels, counts, sizes, arg_casts={3: "int32"}, **by_word)
    metal.write_result(bits, labels, counts, sizes, arg_casts={3: "int32"}, **by_pixel)
    return labels, counts
