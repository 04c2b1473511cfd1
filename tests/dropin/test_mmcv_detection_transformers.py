"""MMDetection's transformers of multi-scale deformable attention: with omniops.enable what they are without it.

The models are those of MMDetection's configs with fewer layers and queries, on small images.
"""

import functools
import importlib

import numpy as np
import pytest
import torch
from operator_calls import OperatorCalls
from torch import nn

import omniops

pytest.importorskip("mmdet", reason="MMDetection is not installed")

OPERATOR = "multi_scale_deform_attn"
BACKWARD = "multi_scale_deform_attn_backward"
# Each with how many layers of its attention are left.
CONFIGS = {
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": 4,
    "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py": 4,
    "dino/dino-4scale_r50_8xb2-12e_coco.py": 4,
    "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py": 4,
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": 2,
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py": 2,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SMALL = {"depth": 18, "num_layers": 2, "num_queries": 30, "max_per_img": 20, "max_per_image": 20}


@pytest.fixture
def attention():
    """mmcv's module of multi-scale attention, which cannot be imported without our other functions."""
    omniops.enable("mmcv")
    yield importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    omniops.disable("mmcv")


def shrink(config):
    """In place: fewer layers, queries and results, and nothing that is downloaded."""
    for key, value in list(config.items()):
        pretrained = key == "init_cfg" and isinstance(value, dict) and value.get("type") == "Pretrained"
        if key in SMALL:
            config[key] = SMALL[key]
        elif key == "in_channels" and isinstance(value, list):  # of the backbone's maps
            config[key] = [channels // 4 for channels in value]
        elif pretrained or key == "batch_augments":
            config[key] = None
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            for child in [item for item in values if isinstance(item, dict)]:
                shrink(child)


def built(name):
    config = importlib.import_module("mmengine.config").Config.fromfile(
        f"{importlib.import_module('mmdet').__path__[0]}/.mim/configs/{name}"
    )
    importlib.import_module("mmdet.utils").register_all_modules()
    shrink(config.model)
    torch.manual_seed(0)
    model = importlib.import_module("mmdet.registry").MODELS.build(config.model)
    model.init_weights()
    with torch.no_grad():  # what starts with zeros would have no share in the results, and no queries that differ
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for child_name, child in list(module.named_children()):
            # Where a ReLU's input is nearly 0, its gradient is decided by the last bit of what attention gave.
            if isinstance(child, nn.ReLU) and not name.startswith("backbone"):
                setattr(module, child_name, nn.SiLU())
    return model


def images(seed=0):
    """Two of different sizes, as the data preprocessor takes them, with objects in them."""
    structures, data = (importlib.import_module(f"mmdet.structures{suffix}") for suffix in ("", ".mask"))
    instances = importlib.import_module("mmengine.structures")
    generator = np.random.default_rng(seed)
    inputs, samples = [], []
    for height, width in ((96, 128), (80, 112)):
        inputs.append(torch.from_numpy(generator.integers(0, 256, (3, height, width), dtype=np.uint8)))
        boxes = torch.tensor([[10.0, 12, 60, 70], [40, 5, 100, 50], [3, 30, 33, 75]])
        masks = np.zeros((3, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = structures.DetDataSample(
            metainfo={
                "img_shape": (height, width),
                "ori_shape": (height, width),
                "batch_input_shape": (96, 128),
                "pad_shape": (96, 128),
                "scale_factor": (1.0, 1.0),
                "img_id": len(samples),
            }
        )
        sample.gt_instances = instances.InstanceData(
            bboxes=boxes, labels=torch.tensor([1, 7, 30]), masks=data.BitmapMasks(masks, height, width)
        )
        semantic = torch.full((1, height, width), 100, dtype=torch.long)
        for mask, label in zip(masks, (1, 7, 30), strict=True):
            semantic[0][torch.from_numpy(mask).bool()] = label
        sample.gt_sem_seg = instances.PixelData(sem_seg=semantic)
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def raw_results(model):
    """What the head gives, before detections are chosen and sorted of it."""
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(images(), training=False)
        return flat(model(**data, mode="tensor"))


def detections(model):
    model.eval()
    with torch.no_grad():
        return flat([sample.to_dict() for sample in model.test_step(images())])


def training_step(model, seed):
    """The losses, and the gradients of all parameters."""
    model.train()
    torch.manual_seed(seed)  # noisy queries, sampled points
    data = model.data_preprocessor(images(seed), training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return flat(losses), [gradient.clone() for gradient in gradients]


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results.detach().clone()]
    if hasattr(results, "values"):
        results = list(results.values())
    if hasattr(results, "all_items"):
        results = [value for _, value in results.all_items()]
    return [tensor for result in results for tensor in flat(result)] if isinstance(results, (list, tuple)) else []


def close(found, wanted):
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert difference(one, other) <= 1e-5 if one.is_floating_point() else one.equal(other)


def difference(found, wanted):
    """The largest, in units of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) if wanted.numel() else 0.0


def with_calls(expected_forward, expected_backward, step, model):
    with OperatorCalls() as calls:
        found = step(model)
    assert (calls.counts[OPERATOR], calls.counts[BACKWARD]) == (expected_forward, expected_backward)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_inference_and_a_training_step(attention, monkeypatch, name, device):
    model, layers = built(name).to(device), CONFIGS[name]
    modules = [module for module in model.modules() if isinstance(module, attention.MultiScaleDeformableAttention)]
    assert len(modules) == layers
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def compared(step, backwards):
        """What a step gives with the operator, and with mmcv's composition."""
        found = with_calls(layers, backwards * layers, step, model)
        with monkeypatch.context() as patch:
            composition = attention.multi_scale_deformable_attn_pytorch.__wrapped__
            patch.setattr(attention, composition.__name__, composition)
            # Which mmcv calls on CUDA.
            apply = staticmethod(lambda value, shapes, _, *others: composition(value, shapes, *others[:2]))
            patch.setattr(attention.MultiScaleDeformableAttnFunction, "apply", apply)
            return found, with_calls(0, 0, step, model)

    for step in (raw_results, detections):
        close(*compared(step, backwards=0))
    # A sample on a pixel has two slopes, and the last bit of its position decides for one: not in all of three batches.
    for seed in range(3):
        (losses, gradients), (wanted_losses, wanted) = compared(
            functools.partial(training_step, seed=seed), backwards=1
        )
        close(losses, wanted_losses)
        off = [difference(one, other) for one, other in zip(gradients, wanted, strict=True)]
        if max(off) <= 1e-5:
            break
    else:
        pytest.fail(f"gradients differ by up to {max(off)} of their scale")
    assert all(parameter.grad.any() for module in modules for parameter in module.parameters())
