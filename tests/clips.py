"""What tests of SAM 2's videos share: a video, and how weights are made under which it matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 90, 140

# By which random weights are multiplied, so that memories, pointers and prompts change more of a mask than its last
# digits. With more, the rounding of memories to bfloat16 would make of a difference in the last digit a large one.
SHARPER = {
    "cross_attn_image": 2,
    "gamma": 10,
    "tpos_enc": 20,
    "no_obj": 20,
    "no_mem_embed": 20,
    "obj_ptr": 2,
    "obj_ptr_tpos_proj": 5,
    "sam_prompt_encoder.point_embeddings": 4,
    "sam_prompt_encoder.mask_downscaling.6": 8,
    "pred_obj_score_head.layers.2.weight": 20,
    "output_hypernetworks_mlps": 2,
}


def write_clip(folder: Path, count: int) -> Path:
    """Two objects that move over a background, without loss: PNG under the only name that the oracle takes."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    background = np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT)))
    for t in range(count):
        frame = background.copy()
        frame[30:60, 20 + 6 * t : 50 + 6 * t] = [220, 40, 30]
        frame[60:80, 100 - 6 * t : 120 - 6 * t] = [20, 200, 60]
        Image.fromarray(frame).save(folder / f"{t}.jpg", format="PNG")
    return folder
