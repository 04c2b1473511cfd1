"""The models that ``selftest`` runs: tiny pictures, random weights of a fixed seed, and what is compared at the end."""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omniops import device as devices
from omniops.cli.common import CommandError, missing_packages, require_sam2

RESULT_TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""The largest error of a whole model's results, relative to the largest value of that result. The largest seen, of CPUs
and an H200 against the CPU in float32, were 1e-4, 5.3e-3 and 2e-2."""

Results = dict[str, Tensor]


class Model(ABC):
    """A model, and a small task for it."""

    name: str
    """What ``--only`` calls it."""
    title: str
    is_small = True
    """Whether one thread of the CPU has done it before several have found each other."""

    def dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """Those that it is checked in: float32, and half precision as the device's users have it."""
        half = () if device.type == "cpu" else (torch.float16,)
        return tuple(dict.fromkeys((torch.float32, *half, devices.autocast_dtype(device))))

    def missing(self) -> str:
        """Why it cannot be checked here, with the command that changes that; nothing where it can."""
        return ""

    @abstractmethod
    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model in evaluation, on the device."""

    @abstractmethod
    def reference(self, model: nn.Module) -> nn.Module:
        """In float32 on the CPU with the weights of that model."""

    @abstractmethod
    def run(self, model: nn.Module, dtype: torch.dtype) -> Results:
        """The task: results in float32 on the CPU, by name, in the order in which they are made."""


class FPNCARAFE(Model):
    """The feature pyramid alone."""

    name = "fpn-carafe"
    title = "FPNCarafe"

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Three levels and a further one."""
        from omniops.nn import FPNCarafe

        return randomise(FPNCarafe([16, 32, 64], 32, num_outs=4)).eval().to(device)

    def reference(self, model: nn.Module) -> nn.Module:
        """A copy: autocast alone makes half precision of it."""
        return copy.deepcopy(model).to("cpu")

    def run(self, model: nn.Module, dtype: torch.dtype) -> Results:
        """Maps of odd sizes."""
        device = next(model.parameters()).device
        maps = [torch.from_numpy(_noise(2, 16 << level, 33 + 2 >> level, 46 >> level)) for level in range(3)]
        with torch.inference_mode(), devices.autocast(device, dtype):
            results = model([level_map.to(device) for level_map in maps])
        return {f"level {level}": level_map.float().cpu() for level, level_map in enumerate(results)}


class Detector(Model):
    """Faster or Mask R-CNN."""

    def __init__(self, *, masks: bool) -> None:
        self.masks = masks
        self.name = f"{'mask' if masks else 'faster'}-rcnn"
        self.title = f"{'Mask' if masks else 'Faster'} R-CNN with CARAFE"

    def missing(self) -> str:
        """What the extra would install, or why it is of no use."""
        if "torchvision" in missing_packages("detect"):
            return "torchvision is not installed: pip install 'omniops[detect]'"
        try:
            import_module("omniops.detection")
        except Exception as error:  # whatever a torchvision made for another torch raises
            return str(error).strip().partition("\n")[0]
        return ""

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """With few classes and proposals."""
        from omniops import detection

        make = detection.mask_rcnn_resnet50_fpn_carafe if self.masks else detection.faster_rcnn_resnet50_fpn_carafe
        model = make(
            num_classes=5,
            min_size=96,
            max_size=128,
            rpn_pre_nms_top_n_test=40,
            rpn_post_nms_top_n_test=12,
            box_detections_per_img=6,
        )
        return randomise(model).eval().to(device)

    def reference(self, model: nn.Module) -> nn.Module:
        """A copy: autocast alone makes half precision of it."""
        return copy.deepcopy(model).to("cpu")

    def run(self, model: nn.Module, dtype: torch.dtype) -> Results:
        """Its parts with given boxes, which no comparison of scores decides on; in float32 also its detections."""
        model_: Any = model
        device = next(model.parameters()).device
        images = [torch.from_numpy(picture(*size)).to(device).permute(2, 0, 1) / 255 for size in ((80, 100), (96, 72))]
        boxes = [torch.tensor(corners, device=device) for corners in _BOXES]
        with torch.inference_mode(), devices.autocast(device, dtype):
            batch, _ = model_.transform(images)
            maps = model_.backbone(batch.tensors)
            results = {f"pyramid, level {level}": level_map for level, level_map in enumerate(maps.values())}
            objectness, differences = model_.rpn.head(list(maps.values()))
            results |= {"objectness": torch.cat([of_level.flatten() for of_level in objectness])}
            results |= {"proposals' differences": torch.cat([of_level.flatten() for of_level in differences])}
            heads = model_.roi_heads
            pooled = heads.box_roi_pool(maps, boxes, batch.image_sizes)
            results["class logits"], results["boxes' differences"] = heads.box_predictor(heads.box_head(pooled))
            if self.masks:
                pooled = heads.mask_roi_pool(maps, boxes, batch.image_sizes)
                results["mask logits"] = heads.mask_predictor(heads.mask_head(pooled))
            for number, detections in enumerate(model(images)):
                # In half precision the last digits decide which boxes are kept.
                if dtype == torch.float32:
                    results |= {f"image {number}, {name}": tensor for name, tensor in detections.items()}
        return {name: tensor.float().cpu() for name, tensor in results.items()}


_BOXES = (
    [[4.0, 6.0, 90.0, 80.0], [30.0, 20.0, 55.0, 61.0], [70.0, 3.0, 119.0, 40.0]],
    [[0.0, 0.0, 95.0, 127.0], [11.0, 60.0, 40.0, 90.0]],
)


class SAM2(Model):
    """SAM 2.1 tiny, with small pictures."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.is_small = image_size < 512

    def missing(self) -> str:
        """What the extra would install, or why it is of no use."""
        try:
            require_sam2()
        except CommandError as error:
            return str(error)
        return ""

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """As ``load`` would make it."""
        weights = _sam2("cpu", torch.float32, self.image_size)
        randomise(weights)
        with torch.no_grad():
            # Else every other object would be nowhere, its mask a constant.
            for last in _last_layers(weights, "pred_obj_score_head"):
                last.bias.add_(10)
            # Masks that are stable, and scores that are unlike: what is chosen by them does not depend on last digits.
            for last in _last_layers(weights, "output_hypernetworks_mlps"):
                last.weight.mul_(64)
            for last in _last_layers(weights, "iou_prediction_head"):
                last.bias.add_(torch.tensor([0.0, -1.0, 1.0, 0.0]))
            # What is remembered of an object must show in its next mask.
            for name, weight in weights.named_parameters():
                if "cross_attn_image.v_proj" in name:
                    weight.mul_(4)
        model = _sam2(device, dtype, self.image_size)
        model.load_state_dict(weights.state_dict())
        return model

    def reference(self, model: nn.Module) -> nn.Module:
        """Its weights as they were rounded."""
        reference = _sam2("cpu", torch.float32, self.image_size)
        reference.load_state_dict(model.state_dict())
        return reference


class SAM2Image(SAM2):
    """A picture, a point, and a box with a mask."""

    name = "sam2-image"
    title = "SAM 2 image"

    def run(self, model: nn.Module, dtype: torch.dtype) -> Results:
        """Three masks of the points, one of the box."""
        from omniops.sam2 import SAM2ImagePredictor

        network: Any = model
        predictor = SAM2ImagePredictor(network)
        predictor.set_image(picture(90, 140))
        point = predictor.predict(np.array([[44.0, 40.0], [100.0, 70.0]]), np.array([1, 0]), return_logits=True)
        side = self.image_size // 4
        mask = 8 * _noise(1, 8, 8).repeat(side // 8, 1).repeat(side // 8, 2)
        box = predictor.predict(
            box=np.array([60, 20, 120, 80]), mask_input=mask, multimask_output=False, return_logits=True
        )
        results = {"image embedding": predictor.get_image_embedding().float().cpu()}
        for prompt, arrays in (("points", point), ("a box and a mask", box)):
            for name, array in zip(("mask logits", "scores"), arrays, strict=False):
                results[f"{name} of {prompt}"] = torch.from_numpy(array)
        return results


class SAM2Video(SAM2):
    """Three frames and two objects."""

    name = "sam2-video"
    title = "SAM 2 video"

    def run(self, model: nn.Module, dtype: torch.dtype) -> Results:
        """Both objects' masks on each frame, at the size of the video."""
        from omniops.sam2 import SAM2VideoPredictor

        # Without holes filled: whether a hole is small enough is decided by last digits.
        network: Any = model
        predictor = SAM2VideoPredictor(network, fill_hole_area=0)
        with _video() as folder:
            state = predictor.init_state(folder)
            predictor.add_new_points_or_box(state, 0, "point", [[44, 40]], [1])
            predictor.add_new_points_or_box(state, 0, "box", box=[60, 20, 120, 80])
            return {
                f"mask logits of {name} on frame {frame}": mask.float().cpu()
                for frame, names, masks in predictor.propagate_in_video(state)
                for name, mask in zip(names, masks, strict=True)
            }


def models(image_size: int) -> tuple[Model, ...]:
    """All, the simplest first."""
    return (FPNCARAFE(), Detector(masks=False), Detector(masks=True), SAM2Image(image_size), SAM2Video(image_size))


def randomise(model: nn.Module) -> nn.Module:
    """Give a model weights under which every part matters and no value is large; from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            is_product = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            is_norm = "Norm" in type(module).__name__
            for name, weight in module.named_parameters(recurse=False):
                if is_product and name == "weight":
                    fan_in = len(weight) if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
                    weight.normal_(0, fan_in**-0.5, generator=generator)
                elif is_norm or is_product:
                    weight.normal_(float(is_norm and name == "weight"), 0.1, generator=generator)
                else:
                    weight.normal_(0, 0.5, generator=generator)
    return model


def _last_layers(model: nn.Module, name: str) -> list[nn.Linear]:
    """The last of the network of that name, or of each of a list of networks."""
    found = []
    for path, module in model.named_modules():
        if path.endswith(f".{name}"):
            networks = module if isinstance(module, nn.ModuleList) else [module]
            found += [[layer for layer in one.modules() if isinstance(layer, nn.Linear)][-1] for one in networks]
    return found


def picture(height: int, width: int, frame: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3): two objects that move over waves and noise."""
    y, x = np.mgrid[:height, :width] / 20
    image = 128 + 80 * np.stack([np.sin(x), np.cos(y + x / 2), np.sin(x * y)], axis=2) + 12 * _noise(height, width, 3)
    image[30:60, 25 + 6 * frame : 55 + 6 * frame] = [220, 40, 30]
    image[25:70, 80 - 5 * frame : 110 - 5 * frame] = [20, 200, 60]
    return image.clip(0, 255).astype(np.uint8)


def _noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _sam2(device: torch.device | str, dtype: torch.dtype, image_size: int) -> nn.Module:
    from omniops.sam2 import build_sam2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the Fourier features of positions
        model: nn.Module = build_sam2("sam2.1_hiera_t.yaml", device=device, dtype=dtype, image_size=image_size)
    return model


@contextmanager
def _video() -> Iterator[Path]:
    """A folder of three frames."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for frame in range(3):
            Image.fromarray(picture(90, 140, frame)).save(Path(folder) / f"{frame}.png")
        yield Path(folder)
