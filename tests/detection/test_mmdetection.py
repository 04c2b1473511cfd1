"""The same weights in MMDetection and here: the same detections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image, ImageOps
from torch import Tensor, nn

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")
pytest.importorskip("mmdet", reason="the oracle: mmdet 3.3 with mmcv-lite")

import mmdet

from omniops import detection, dropin

SCALE = (333, 200)
KINDS = {
    "faster": ("faster-rcnn_r50_fpn-carafe_1x_coco.py", detection.faster_rcnn_resnet50_fpn_carafe),
    "mask": ("mask-rcnn_r50_fpn-carafe_1x_coco.py", detection.mask_rcnn_resnet50_fpn_carafe),
}
# How far the results of each layer are to spread, so that there are many sure detections of many sizes and classes.
SPREAD = {"rpn_cls": 2.0, "rpn_reg": 0.6, "fc_cls": 1.8, "fc_reg": 2.0, "conv_logits": 3.0}


def _randomise(model: nn.Module, image: np.ndarray) -> None:
    """Random weights, scaled layer by layer to what they give for an image, so that no layer dies or explodes."""
    from mmdet.apis import inference_detector

    torch.manual_seed(0)
    scaled = set()

    def scale(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
            module.running_var.copy_(inputs[0].var((0, 2, 3)))
            return F.batch_norm(inputs[0], module.running_mean, module.running_var, module.weight, module.bias)
        if name in scaled or name.startswith("backbone"):
            return output
        scaled.add(name)
        # Spread from box to box; a spread from class to class would be the same for every box.
        spread = output.std(dim=0).mean() if output.dim() == 2 else output.std()
        gain = SPREAD.get(name.rpartition(".")[2], 1.0) / spread
        module.weight.data.mul_(gain)
        module.bias.data.mul_(gain)
        return output * gain

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.register_forward_hook(functools.partial(scale, name))
    inference_detector(model, image)
    for module in model.modules():
        module._forward_hooks.clear()


@pytest.fixture(scope="module")
def mmcv() -> Iterator[None]:
    dropin.enable("mmcv")
    yield
    dropin.disable("mmcv")


@pytest.fixture(scope="module")
def photograph() -> Callable[[int, int], np.ndarray]:
    """The one that ships inside matplotlib, (H, W, 3), cut and resized to any size."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as opened:
        picture = opened.convert("RGB")
    return lambda height, width: np.array(ImageOps.fit(picture, (width, height)))


@pytest.fixture(scope="module", params=KINDS)
def models(request, mmcv, photograph, tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """MMDetection's model and ours, of the same weights, by way of a checkpoint."""
    from mmdet.apis import init_detector
    from mmengine.config import Config

    name, build = KINDS[request.param]
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / "carafe" / name)
    config.test_dataloader.dataset.pipeline[1].scale = SCALE
    with pytest.warns(UserWarning, match="checkpoint is None"):
        theirs = init_detector(config, None, device="cpu")
    _randomise(theirs, photograph(240, 360))
    path = tmp_path_factory.mktemp("checkpoints") / "random.pth"
    torch.save({"meta": theirs.dataset_meta, "state_dict": theirs.state_dict()}, path)
    return theirs, build(path, min_size=min(SCALE), max_size=max(SCALE)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(240, 360), (150, 100), (97, 301), (400, 600), (40, 40)])
def test_detections_are_mmdetections(models, photograph, size):
    from mmdet.apis import inference_detector

    theirs, ours = models
    image = photograph(*size)
    expected = inference_detector(theirs, np.ascontiguousarray(image[..., ::-1])).pred_instances
    with torch.no_grad():
        (found,) = ours([torch.from_numpy(image).permute(2, 0, 1) / 255])
    assert len(expected.scores) >= 10
    assert len(expected.labels.unique()) >= 3
    assert torch.equal(found["labels"], expected.labels + 1)
    torch.testing.assert_close(found["boxes"], expected.bboxes, rtol=0, atol=0.01)
    torch.testing.assert_close(found["scores"], expected.scores, rtol=0, atol=1e-4)
    assert ("masks" in found) == ("masks" in expected)
    if "masks" in found:
        masks = found["masks"][:, 0] >= 0.5
        common, either = (masks & expected.masks).sum((1, 2)), (masks | expected.masks).sum((1, 2))
        assert int(either.sum()) > 0
        assert (common >= 0.999 * either).all()


def test_labels_are_mmdetections_plus_one(mmcv):
    from mmdet.datasets import CocoDataset

    assert detection.COCO_CATEGORIES[1:] == CocoDataset.METAINFO["classes"]
