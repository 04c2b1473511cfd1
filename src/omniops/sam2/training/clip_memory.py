"""What the frames of a clip remember of those before, with gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omniops.sam2.modeling.sam2 import SAM2Base, SAMOutput


class FrameMemory(NamedTuple):
    """Of B objects on a frame."""

    maskmem_features: Tensor
    """(B, 64, S/16, S/16)"""
    obj_ptr: Tensor
    """(B, 256)"""


class ClipMemory:
    """The memories and object pointers that the official training attends to.

    Other than in prediction a frame attends to the pointers of prompted frames that come after it too.

    Args:
        model: the network.
        num_frames: of the clip.
    """

    def __init__(self, model: SAM2Base, num_frames: int) -> None:
        self.model = model
        self.max_obj_ptrs = min(num_frames, model.max_obj_ptrs_in_encoder)
        self.cond_frames: dict[int, FrameMemory] = {}
        self.non_cond_frames: dict[int, FrameMemory] = {}

    def add(self, t: int, image_embed: Tensor, output: SAMOutput, *, is_cond: bool) -> None:
        """Remember what was found on frame t, of whose (1, 256, S/16, S/16) features it is."""
        maskmem_features = self.model.encode_unrounded_memory(
            image_embed, output.low_res_masks, output.object_score_logits, is_mask_from_pts=False
        )
        frames = self.cond_frames if is_cond else self.non_cond_frames
        frames[t] = FrameMemory(maskmem_features, output.obj_ptr)

    def attend(self, t: int, image_embed: Tensor) -> Tensor:
        """(1, 256, S/16, S/16) of frame t, by itself -> (B, 256, S/16, S/16), which the memories conditioned."""
        before = {t - other: memory for other, memory in self.non_cond_frames.items()}
        memories = [(0, memory.maskmem_features) for memory in self.cond_frames.values()]
        memories += [
            (ago, before[ago].maskmem_features) for ago in range(self.model.num_maskmem - 1, 0, -1) if ago in before
        ]
        pointers = [(t - other, memory.obj_ptr) for other, memory in self.cond_frames.items()]
        pointers += [(ago, before[ago].obj_ptr) for ago in range(1, self.max_obj_ptrs) if ago in before]
        maskmem_tpos_index, obj_ptr_pos = self.model.encode_times(
            [ago for ago, _ in memories], [ago for ago, _ in pointers], self.max_obj_ptrs - 1
        )
        return self.model.prepare_memory_conditioned_features(
            image_embed,
            torch.stack([features for _, features in memories]),
            maskmem_tpos_index,
            torch.stack([pointer for _, pointer in pointers]),
            obj_ptr_pos,
        )
