"""What of the detectors TorchScript compiles: the parts with CARAFE, and torchvision's detectors with our pyramid."""

import pytest
import torch
from torchscripts import IGNORED, assert_as_eager, reloaded
from torchvision.models.detection import maskrcnn_resnet50_fpn
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


@pytest.mark.filterwarnings("ignore:RCNN always returns a :UserWarning")
@pytest.mark.slow
def test_torchvisions_detector_with_our_pyramid():
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96).eval()
    model.backbone.fpn = omniops.nn.FPNCarafe([256, 512, 1024, 2048], 256, extra_blocks=LastLevelMaxPool()).eval()
    compiled = reloaded(torch.jit.script(model))
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 60)]
    with torch.no_grad():
        for expected, (_, found) in ((model(images), compiled(images)) for _ in range(2)):
            assert len(expected[0]["boxes"]) > 0
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
