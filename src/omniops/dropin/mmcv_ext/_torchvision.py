"""torchvision's operators, for the functions that use them."""

from __future__ import annotations

from typing import Any


def torchvision_ops(function: str) -> Any:
    """``torchvision.ops``; ImportError that names the function where torchvision is not installed."""
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(f"mmcv's {function} needs torchvision here: pip install torchvision ({error})") from error
    return torchvision.ops
