"""Training of SAM 2: the losses of pictures and of clips, prompts drawn from masks, weights shared among processes.

Example:
    >>> from omniops.sam2 import load
    >>> model = load("tiny", "cpu", "float32", image_size=64, random_weights=True).train()
    >>> targets = torch.zeros(1, 64, 64)
    >>> targets[:, 16:48, 16:48] = 1
    >>> image_step(model, torch.randn(1, 3, 64, 64), targets, num_correction_pt_per_frame=1).total.backward()
"""

from omniops.sam2.training.checkpoints import save_checkpoint
from omniops.sam2.training.losses import Losses, actual_iou, dice_loss, sam2_losses, sigmoid_focal_loss
from omniops.sam2.training.sampling import box_points, corrective_points, sample_frames, sample_points, sample_prompt
from omniops.sam2.training.sharding import fully_shard_step
from omniops.sam2.training.steps import clip_step, image_step

__all__ = [
    "Losses",
    "actual_iou",
    "box_points",
    "clip_step",
    "corrective_points",
    "dice_loss",
    "fully_shard_step",
    "image_step",
    "sam2_losses",
    "sample_frames",
    "sample_points",
    "sample_prompt",
    "save_checkpoint",
    "sigmoid_focal_loss",
]
