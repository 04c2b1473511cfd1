"""The operators in PyTorch's core ATen, for what leaves Python: a file for each, as in ``omniops.backends``.

The kernels in ``omniops.backends.reference`` loop over taps to save memory, and CARAFE's write in place. Here a call is
few operators without changes in place, which exporters take, and its tensors have at most five axes, which is Core ML's
limit. Sampling is ``grid_sample``, which most runtimes have. The gradients of deformable convolution and attention are
those kernels themselves.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

# These register the operators.
import omniops.ops.carafe
import omniops.ops.connected_components
import omniops.ops.deform_conv2d
import omniops.ops.multi_scale_deform_attn  # noqa: F401
from omniops.backends.reference import deform_conv2d as deform_conv2d_kernels
from omniops.backends.reference import multi_scale_deform_attn as multi_scale_deform_attn_kernels
from omniops.decomposed.carafe import carafe, carafe_backward
from omniops.decomposed.deform_conv2d import deform_conv2d
from omniops.decomposed.multi_scale_deform_attn import multi_scale_deform_attn

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Any]:
    """The operators of omniops in core ATen, and PyTorch's own decompositions: for ``run_decompositions``.

    A program that was exported leaves none of omniops' operators behind, and runs where omniops is not installed.
    PyTorch has no place where a library could leave its decompositions for all programs, so they are an argument.

    Sampling is PyTorch's ``grid_sample``: positions differ from the operators' own by the rounding of coordinates from
    -1 to 1, some 1e-5 pixels in a map of a hundred, and one that is not a number gives 0 or a number instead of none.
    CARAFE is a product of tiles, eight pixels wide: an infinite pixel makes NaN of all results in those that see it.

    Returns:
        A new table, ``torch.export.default_decompositions()`` with omniops' operators and their gradients.

    Raises:
        NotImplementedError: from ``run_decompositions``, of a program with connected components (``fill_holes`` and
            ``remove_small_components`` too), whose number of steps depends on the mask.

    Example:
        >>> model, x = omniops.CARAFEPack(channels=8, scale_factor=2), torch.randn(1, 8, 6, 6)
        >>> program = torch.export.export(model, (x,)).run_decompositions(omniops.decompositions())
        >>> any("omniops" in str(node.target) for node in program.graph.nodes)
        False
    """
    operators = torch.ops.omniops
    return {
        **torch.export.default_decompositions(),
        operators.carafe.default: carafe,
        operators.carafe_backward.default: carafe_backward,
        operators.deform_conv2d.default: deform_conv2d,
        operators.deform_conv2d_backward.default: deform_conv2d_kernels.deform_conv2d_backward,
        operators.multi_scale_deform_attn.default: multi_scale_deform_attn,
        operators.multi_scale_deform_attn_backward.default: (
            multi_scale_deform_attn_kernels.multi_scale_deform_attn_backward
        ),
        operators.connected_components.default: _connected_components,
    }


def _connected_components(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "omniops::connected_components, which fill_holes and remove_small_components call, has no decomposition: how "
        "many steps it takes depends on the mask. Export the model without it and call it on the result, or delete "
        "torch.ops.omniops.connected_components.default from the table and run the program where omniops is installed"
    )
