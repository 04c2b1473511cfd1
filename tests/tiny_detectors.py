"""Faster and Mask R-CNN with CARAFE of a thousandth of the parameters, built by the same arguments."""

from collections import OrderedDict

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead

from omniops import detection
from omniops.detection import CARAFERCNN, CARAFEMaskPredictor, load_checkpoint
from omniops.detection.heads import STRIDES
from omniops.nn import CARAFEPack

NAMES = ("faster_rcnn_resnet50_fpn_carafe", "mask_rcnn_resnet50_fpn_carafe")
CHANNELS = 32
SMALL = {
    "min_size": 64,
    "max_size": 96,
    "rpn_batch_size_per_image": 32,
    "box_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 40,
    "box_detections_per_img": 10,
}


class TinyBackbone(nn.Module):
    """Maps of few channels at the detectors' strides, the finest with the second finest upsampled by CARAFE."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.up = CARAFEPack(8, 2, compressed_channels=8)
        self.wide = nn.Conv2d(8, CHANNELS, 1)

    def forward(self, x):
        fine = self.stem(x)
        fine = fine + self.up(nn.functional.avg_pool2d(fine, 2))
        maps = [nn.functional.avg_pool2d(fine, stride // 4) for stride in STRIDES]
        return OrderedDict((str(number), self.wide(level.relu())) for number, level in enumerate(maps))


def build(masks, weights=None, num_classes=81, *, fresh=(), progress=True, **arguments):
    """As the package's functions."""
    arguments = {**SMALL, **arguments}
    model = CARAFERCNN(TinyBackbone(), num_classes, masks=masks, **arguments)
    model.rpn.head = RPNHead(CHANNELS, num_anchors=3)
    model.roi_heads.box_head = TwoMLPHead(CHANNELS * 7 * 7, 32)
    model.roi_heads.box_predictor = FastRCNNPredictor(32, num_classes)
    if masks:
        model.roi_heads.mask_head = MaskRCNNHeads(CHANNELS, (CHANNELS,), 1)
        model.roi_heads.mask_predictor = CARAFEMaskPredictor(CHANNELS, num_classes)
    if weights is not None:
        load_checkpoint(model, weights, fresh=fresh, progress=progress)
    return model


def faster_rcnn(*arguments, **more):
    """In place of ``faster_rcnn_resnet50_fpn_carafe``."""
    return build(False, *arguments, **more)


def mask_rcnn(*arguments, **more):
    """In place of ``mask_rcnn_resnet50_fpn_carafe``."""
    return build(True, *arguments, **more)


def replace(setattr=setattr):
    """Have the commands build these."""
    for name, function in zip(NAMES, (faster_rcnn, mask_rcnn), strict=True):
        setattr(detection, name, function)
