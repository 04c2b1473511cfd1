"""The operators in ONNX: what ``torch.onnx.export`` writes for them; one file an operator.

PyTorch has no public registry for other libraries' operators: a table goes with each call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export`` writes for the operators of omniops, in standard ONNX, for any opset from 18 on.

    deform_conv2d becomes ``DeformConv``, which opset 19 brought; for opset 18 it is made of ``GridSample`` and
    ``MatMul``, which compute the same. multi_scale_deform_attn becomes a ``GridSample`` for each level, carafe and
    carafe_downsample a ``MatMul`` for each row of their kernel, and connected_components, which fill_holes and
    remove_small_components call, a ``Loop``. Batch and sizes may be dynamic. float16 and bfloat16 are computed in
    float32, as omniops does. The operators of backward passes are not translated.

    It needs onnx and onnxscript: ``pip install 'omniops[export]'``.

    Returns:
        The table for the argument ``custom_translation_table`` of ``torch.onnx.export``, a new one.

    Raises:
        ImportError: without onnxscript.

    Example:
        >>> model = omniops.CARAFEPack(channels=8, scale_factor=2).eval()
        >>> program = torch.onnx.export(  # needs: onnxscript
        ...     model,
        ...     (torch.randn(1, 8, 6, 6),),
        ...     dynamo=True,
        ...     verbose=False,
        ...     custom_translation_table=omniops.onnx.translations(),
        ... )
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "omniops.onnx.translations needs onnx and onnxscript: pip install 'omniops[export]'"
        ) from error
    names = ("carafe", "connected_components", "deform_conv2d", "multi_scale_deform_attn")
    import_module("omniops.ops")
    return {
        getattr(torch.ops.omniops, name).default: getattr(import_module(f"{__name__}.{name}"), name) for name in names
    }
