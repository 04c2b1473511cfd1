"""Fine-tuning of the detectors on a data set in COCO's format: what ``omniops detect-train`` calls."""

from omniops.detection.training.checkpoints import BEST, HISTORY, LAST, read_checkpoint
from omniops.detection.training.dataset import CocoDataset, hold_out
from omniops.detection.training.fit import Observer, evaluate, fit
from omniops.detection.training.loop import Step, Training
from omniops.detection.training.settings import Settings
from omniops.detection.training.start import build, renew_heads

__all__ = [
    "BEST",
    "HISTORY",
    "LAST",
    "CocoDataset",
    "Observer",
    "Settings",
    "Step",
    "Training",
    "build",
    "evaluate",
    "fit",
    "hold_out",
    "read_checkpoint",
    "renew_heads",
]
