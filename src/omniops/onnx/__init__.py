"""The operators in ONNX: what ``torch.onnx.export`` writes for them; one file an operator.

PyTorch has no public registry for other libraries' operators: a table goes with each call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export`` writes for the operators of omniops: standard ONNX, with dynamic batch and sizes.

    ``deform_conv2d`` becomes ``DeformConv``; opset 18, which has none, gets ``GridSample`` and ``MatMul``, which
    compute the same. ``multi_scale_deform_attn`` becomes a ``GridSample`` for each level, ``carafe`` and
    ``carafe_downsample`` one ``MatMul``, and ``connected_components``, which ``fill_holes`` and
    ``remove_small_components`` call, a ``Loop``. float16 and bfloat16 are computed in float32, as omniops does. An
    infinite pixel makes NaN of all results in the tiles of CARAFE that see it, which are eight pixels wide.

    PyTorch writes opsets from 16 on where it can convert the rest of the model, and otherwise says that it writes 18.
    PyTorch 2.7 makes translations for opset 18 and converts them to later ones, so that there is no ``DeformConv``.
    Backward passes are not translated. Beside ``GridSample`` the rounding of positions differs by some 1e-5 pixels in a
    map of a hundred. It needs onnx and onnxscript: ``pip install 'omniops[export]'``.

    Returns:
        A new table, for the argument ``custom_translation_table``.

    Raises:
        ImportError: without onnxscript.
        ValueError: while exporting, for dynamic channels, kernels, heads or numbers of points; only batch, queries,
            sizes of maps and of levels may be dynamic.

    Example:
        >>> import onnx
        >>> model, x = omniops.DeformConv2dPack(4, 6, kernel_size=3, padding=1).eval(), torch.randn(1, 4, 8, 8)
        >>> program = torch.onnx.export(
        ...     model, (x,), dynamo=True, verbose=False, custom_translation_table=omniops.onnx.translations()
        ... )
        >>> {node.domain for node in program.model_proto.graph.node}  # of no operators but the standard's
        {''}
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "omniops.onnx.translations needs onnx and onnxscript: pip install 'omniops[export]'"
        ) from error
    table = {}
    for name in ("carafe", "connected_components", "deform_conv2d", "multi_scale_deform_attn"):
        import_module(f"omniops.ops.{name}")  # registers the operator
        table[getattr(torch.ops.omniops, name).default] = getattr(import_module(f"omniops.onnx.{name}"), name)
    return table
