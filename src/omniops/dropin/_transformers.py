"""transformers: the multi-scale deformable attention of its models, and what SAM 3 does to a video's masks.

Each model's module has a copy of the attention: a class ``MultiScaleDeformableAttention``, or a function
``multi_scale_deformable_attention`` or ``multi_scale_deformable_attention_v2``. Models hold these functions as well,
some as attributes, and ``kernelize`` binds them to modules, so it is their code that is replaced: then models serve
that were made before, after, or while this is enabled.

Hugging Face's kernel for CUDA takes the place of ``forward`` in modules one by one, where ``kernelize`` or
``use_kernels=True`` asks for it, so it stays. On the devices that are asked for its code is replaced too.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from omniops.dropin._extension import Changes
from omniops.ops.connected_components import connected_components

# The three functions run with the globals of the modules whose code they replace, so each imports what it calls.


def forward(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Of the class: the list of shapes is used, of which nothing has to be read back from the device."""
    from omniops.ops.multi_scale_deform_attn import multi_scale_deform_attn

    return multi_scale_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Tensor | list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Of Mask2Former and OneFormer, and until 4.48 of the others."""
    from omniops.ops.multi_scale_deform_attn import multi_scale_deform_attn

    return multi_scale_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Tensor | list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Of RT-DETRv2, D-FINE and DEIMv2, whose levels have different numbers of points."""
    from omniops.ops.multi_scale_deform_attn import multi_scale_deform_attn

    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # no gradient, where ours are zeros
    return multi_scale_deform_attn(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method
    )


class MultiScaleDeformableAttentionFunction:
    """Until 4.48: in place of the autograd function that calls the kernel compiled for CUDA."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As a function of the name has it."""
        return multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights)


def generic_nms(dets: Tensor, scores: Tensor, iou_threshold: float, use_iou_matrix: bool) -> Tensor:
    """The indices of the detections that no better one overlaps by more than ``iou_threshold``, best first: int64.

    Args:
        dets: (N, N), the intersection over the union of each with each, of any floating dtype.
        scores: (N,); of equal ones the first is better.
        iou_threshold: compared in float64.
        use_iou_matrix: True; ``torchvision.ops.nms`` is for boxes.

    Raises:
        ValueError: for a wrong shape, or boxes.
    """
    if not use_iou_matrix:
        raise ValueError("use_iou_matrix must be True, got False: torchvision.ops.nms takes boxes")
    if scores.dim() != 1 or dets.shape != (len(scores), len(scores)):
        raise ValueError(f"dets and scores must have shapes (N, N) and (N,), got {dets.shape} and {scores.shape}")
    # One detection after the other: on a GPU each step would cost more than the copy of the matrix.
    overlaps = dets.detach().cpu()
    order = scores.detach().cpu().sort(descending=True, stable=True).indices.tolist()
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for i in order:
        if not suppressed[i]:
            kept.append(i)
            suppressed |= overlaps[i].double() > iou_threshold
    return torch.tensor(kept, dtype=torch.int64, device=dets.device)


def cc_2d(inputs: Tensor, get_counts: bool) -> tuple[Tensor, Tensor]:
    """8-connected components of (N, 1, H, W), any integers or bool: labels and counts, both int32.

    Without ``get_counts`` the counts are zeros.
    """
    labels, counts = connected_components(inputs)
    return labels, counts if get_counts else torch.zeros_like(counts)


class CvUtils:
    """In place of ``cv_utils_kernel``, Hugging Face's kernel for CUDA, which serves CUDA where it can be loaded."""

    def __init__(self, changes: Changes, module: ModuleType) -> None:
        self._changes, self._module = changes, module
        self._theirs = module.cv_utils_kernel

    def generic_nms(self, dets: Tensor, scores: Tensor, iou_threshold: float, use_iou_matrix: bool = False) -> Any:
        """The function, theirs or ours."""
        theirs = self._kernel(dets)
        function = theirs.generic_nms if theirs else generic_nms
        return function(dets, scores, iou_threshold, use_iou_matrix)

    def cc_2d(self, inputs: Tensor, get_counts: bool) -> Any:
        """The function, theirs or ours."""
        theirs = self._kernel(inputs)
        function = theirs.cc_2d if theirs else cc_2d
        return function(inputs, get_counts)

    def _kernel(self, tensor: Tensor) -> Any:
        """Theirs, loaded when it is first needed; nothing where ours serve."""
        if tensor.device.type != "cuda" or "cuda" in self._changes.devices:
            return None
        if self._theirs is None:
            self._theirs = self._loaded()
        return self._theirs

    def _loaded(self) -> Any:
        """What their function loads, without its warnings of what would be skipped: nothing is."""
        load = self._module._load_cv_utils_kernel_once
        silent = SimpleNamespace(warning_once=lambda *_: None)
        names = {**vars(self._module), "cv_utils_kernel": None, "logger": silent}
        FunctionType(load.__code__, names)()
        return names["cv_utils_kernel"]


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": multi_scale_deformable_attention,
    "multi_scale_deformable_attention_v2": multi_scale_deformable_attention_v2,
}


def _serve(changes: Changes, module: ModuleType) -> None:
    """Replace what a module of a model has of all this; most have nothing."""
    names = vars(module)
    _serve_class(changes, module)
    for name, ours in _FUNCTIONS.items():
        if isinstance(names.get(name), FunctionType):
            _replace_code(changes, names[name], ours)
    name = MultiScaleDeformableAttentionFunction.__name__
    if name in names and "cuda" in changes.devices:
        changes.replace(module, name, MultiScaleDeformableAttentionFunction)
    if "cv_utils_kernel" in names and "_load_cv_utils_kernel_once" in names:
        changes.replace(module, "cv_utils_kernel", CvUtils(changes, module))


def _serve_kernel(changes: Changes, module: ModuleType) -> None:
    """Replace Hugging Face's kernel where ours are asked for."""
    if "cuda" in changes.devices:
        _serve_class(changes, module)


def _serve_class(changes: Changes, module: ModuleType) -> None:
    found = vars(module).get("MultiScaleDeformableAttention")
    if inspect.isclass(found) and isinstance(vars(found).get("forward"), FunctionType):
        _replace_code(changes, vars(found)["forward"], forward)


def _replace_code(changes: Changes, theirs: FunctionType, ours: Callable[..., Tensor]) -> None:
    """Let a function do what ours does, whoever holds it; one that another module has from there is done already."""
    function = inspect.unwrap(theirs)  # within its decorators
    before = function.__code__
    if before is ours.__code__:
        return
    if before.co_freevars or inspect.signature(function).parameters.keys() != inspect.signature(ours).parameters.keys():
        warnings.warn(
            f"omniops does not know the arguments of {theirs.__module__}.{theirs.__qualname__} in this version of "
            f"transformers: it is left as it is",
            stacklevel=2,
        )
        return
    function.__code__ = ours.__code__
    changes.undo(lambda: setattr(function, "__code__", before))


class _Transformers(Changes):
    def enable(self, devices: tuple[str, ...] | None) -> None:
        """Serve the models, whether they have been imported or not, and Hugging Face's kernels on ``devices`` too."""
        if self.devices != frozenset(devices or ()):
            self.disable()
        super().enable(devices)

    def serving(self) -> dict[str, str]:
        """For each type of device who serves, or would if this were enabled."""
        servers = super().serving()
        if "cuda" not in self.devices and find_spec("kernels"):
            servers["cuda"] = "kernels from the Hub where they are loaded, otherwise omniops"
        return servers


transformers = _Transformers(
    "transformers",
    {
        "transformers.models.*": _serve,
        "*deformable_detr*.layers": _serve_kernel,  # of kernels-community/deformable-detr, under a name with a hash
    },
)
