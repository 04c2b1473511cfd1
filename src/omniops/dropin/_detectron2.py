"""detectron2: its compiled module ``detectron2._C``, which it imports for everything, and what runs without it.

Ours are the deformable convolutions, and where the module is missing rotated boxes too. Later versions call these
through PyTorch's dispatcher, where the compiled module registers them, and so does the stand-in.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from omniops._torch_private import destroy
from omniops.dropin import _deform_conv
from omniops.dropin._extension import Extension, StandIn
from omniops.dropin.mmcv_ext import deform_conv as mmcv_ext
from omniops.dropin.mmcv_ext import rotated

_OPERATORS = (
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    "nms_rotated(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align_rotated_forward(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio) -> Tensor",
    "roi_align_rotated_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int batch_size, int channels, int height, int width, int sampling_ratio) -> Tensor",
)
"""What the compiled module registers with PyTorch's dispatcher."""


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The intersection over the union of each box of the first with each of the second, (M, N), float32.

    Boxes are (x, y) of the centre, width, height, and the angle in degrees from the x axis away from the y axis.

    Raises:
        ValueError: for a wrong shape.
    """
    first, second = _in_radians(boxes1=boxes1), _in_radians(boxes2=boxes2)
    overlaps = torch.empty(len(first) * len(second), dtype=torch.float32, device=boxes1.device)
    rotated.box_iou_rotated(first, second, overlaps, mode_flag=0, aligned=False)
    return overlaps.view(len(first), len(second))


def nms_rotated(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of the boxes, (N, 5), that no better one overlaps by more than ``iou_threshold``, best first.

    Raises:
        ValueError: for a wrong shape, or a box that is not a number.
    """
    boxes = _in_radians(dets=dets)
    if scores.shape != dets.shape[:1]:
        raise ValueError(f"scores must have shape (N,) = ({len(dets)},), got {tuple(scores.shape)}")
    order = scores.sort(descending=True, stable=True).indices
    return rotated.nms_rotated(boxes, scores, order, boxes[order], order, iou_threshold, multi_label=False)


def _in_radians(**boxes: Tensor) -> Tensor:
    """As rotated boxes of mmcv, whose angle goes the other way round."""
    ((name, tensor),) = boxes.items()
    if tensor.dim() != 2 or tensor.shape[1] != 5:
        raise ValueError(f"{name} must have shape (N, 5), x, y, width, height and angle, got {tuple(tensor.shape)}")
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return torch.cat([tensor[:, :4], tensor[:, 4:] * (-math.pi / 180)], 1)


def get_compiler_version() -> str:
    """Stands where detectron2 names the compiler of its module."""
    return "none: omniops stands in for detectron2._C"


def get_cuda_version() -> str:
    """Stands where detectron2 names the CUDA that its module was compiled with."""
    return "none: omniops stands in for detectron2._C"


def has_cuda() -> bool:
    """Whether the module has code for CUDA that could be looked at."""
    return False


def _register_operators(extension: Extension, module: ModuleType) -> None:
    if not isinstance(module, StandIn):
        return
    library = torch.library.Library("detectron2", "FRAGMENT")
    extension.undo(partial(destroy, library))
    for schema in _OPERATORS:
        name = library.define(schema)
        library.impl(name, extension.functions[name], "CompositeExplicitAutograd")


def _free_deform_conv(extension: Extension, module: ModuleType) -> None:
    _deform_conv.free(extension, module, "_DeformConv", "_ModulatedDeformConv")


def _use_pycocotools(extension: Extension, module: ModuleType) -> None:
    """Leave COCO evaluation, whose fast form is compiled, to pycocotools, as detectron2 does without the module."""
    if isinstance(vars(module).get("_C"), StandIn):
        extension.replace(module, "COCOeval_opt", module.COCOeval)


detectron2 = Extension(
    "detectron2._C",
    {
        "deform_conv_forward": mmcv_ext.deform_conv_forward,
        "deform_conv_backward_input": mmcv_ext.deform_conv_backward_input,
        "deform_conv_backward_filter": mmcv_ext.deform_conv_backward_parameters,
        "modulated_deform_conv_forward": mmcv_ext.modulated_deform_conv_forward,
        "modulated_deform_conv_backward": mmcv_ext.modulated_deform_conv_backward,
    },
    changes={
        "detectron2._C": _register_operators,
        "detectron2.layers.deform_conv": _free_deform_conv,
        "detectron2.evaluation.fast_eval_api": _use_pycocotools,
    },
    of_stand_in={
        "box_iou_rotated": box_iou_rotated,
        "nms_rotated": nms_rotated,
        "get_compiler_version": get_compiler_version,
        "get_cuda_version": get_cuda_version,
        "has_cuda": has_cuda,
    },
    lacking=(
        "roi_align_forward",
        "roi_align_backward",
        "roi_align_rotated_forward",
        "roi_align_rotated_backward",
        "COCOevalAccumulate",
        "COCOevalEvaluateImages",
        "ImageEvaluation",
        "InstanceAnnotation",
    ),
)
