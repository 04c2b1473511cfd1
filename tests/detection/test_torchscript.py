"""What of the detectors TorchScript compiles: the parts with CARAFE, and torchvision's detectors with our pyramid."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchscripts import IGNORED, assert_as_eager, reloaded
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import omniops
from omniops import detection
from omniops.detection.carafe_rcnn import Backbone

pytestmark = pytest.mark.filterwarnings(*IGNORED)


def test_mask_predictor():
    predictor = detection.CARAFEMaskPredictor(16, num_classes=3)
    calls = [[torch.randn(n, 16, 5, 5, requires_grad=True)] for n in (2, 3)]
    assert_as_eager(torch.jit.script(predictor), predictor, calls, dict(predictor.named_parameters()))


@pytest.mark.slow
def test_backbone():
    backbone = Backbone(None, 5, frozen_statistics=False).eval()
    with torch.no_grad():
        assert_as_eager(torch.jit.script(backbone), backbone, [[torch.rand(1, 3, 64, w)] for w in (64, 96)])


@pytest.mark.slow
def test_torchvisions_detector_with_our_pyramid():
    torch.manual_seed(0)
    stages = {"0": nn.Conv2d(3, 8, 4, 4), "1": nn.Conv2d(8, 16, 2, 2), "2": nn.Conv2d(16, 16, 2, 2)}
    backbone = BackboneWithFPN(nn.Sequential(OrderedDict(stages)), {name: name for name in stages}, [8, 16, 16], 16)
    backbone.fpn = omniops.nn.FPNCarafe([8, 16, 16], 16, num_outs=4, extra_blocks=LastLevelMaxPool())
    model = MaskRCNN(backbone, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.3).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 60)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RCNN always returns a ")
        compiled = reloaded(torch.jit.script(model))
        expected, (_, found) = model(images), compiled(images)
    assert len(expected[0]["boxes"]) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
