"""detectron2: its compiled module ``detectron2._C``, of which the deformable convolutions are ours.

detectron2 imports it for everything, so that without it nothing runs, a Mask R-CNN neither, which needs no function
of it.
"""

from __future__ import annotations

from types import ModuleType

from omniops.dropin import _deform_conv
from omniops.dropin._extension import Extension, StandIn
from omniops.dropin.mmcv_ext import deform_conv as mmcv_ext


def _free_deform_conv(extension: Extension, module: ModuleType) -> None:
    _deform_conv.free(extension, module, "_DeformConv", "_ModulatedDeformConv")


def _use_pycocotools(extension: Extension, module: ModuleType) -> None:
    """Leave COCO evaluation, whose fast form is compiled, to pycocotools, as detectron2 does without the module."""
    if isinstance(vars(module).get("_C"), StandIn):
        extension.replace(module, "COCOeval_opt", module.COCOeval)


def get_compiler_version() -> str:
    """Stands where detectron2 names the compiler of its module."""
    return "none: omniops stands in for detectron2._C"


def get_cuda_version() -> str:
    """Stands where detectron2 names the CUDA that its module was compiled with."""
    return "none: omniops stands in for detectron2._C"


def has_cuda() -> bool:
    """Whether the module has code for CUDA that could be looked at."""
    return False


detectron2 = Extension(
    "detectron2._C",
    {
        "deform_conv_forward": mmcv_ext.deform_conv_forward,
        "deform_conv_backward_input": mmcv_ext.deform_conv_backward_input,
        "deform_conv_backward_filter": mmcv_ext.deform_conv_backward_parameters,
        "modulated_deform_conv_forward": mmcv_ext.modulated_deform_conv_forward,
        "modulated_deform_conv_backward": mmcv_ext.modulated_deform_conv_backward,
        "get_compiler_version": get_compiler_version,
        "get_cuda_version": get_cuda_version,
        "has_cuda": has_cuda,
    },
    changes={
        "detectron2.layers.deform_conv": _free_deform_conv,
        "detectron2.evaluation.fast_eval_api": _use_pycocotools,
    },
    lacking=(
        "box_iou_rotated",
        "nms_rotated",
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
