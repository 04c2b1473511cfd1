"""Connected components of masks, and what SAM 2's post-processing makes of them: holes filled, specks removed."""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.backends import as_signed
from omniops.ops import _checks, _torchscript
from omniops.ops._library import Result, define
from omniops.ops._torchscript import is_scripting, is_tracing


def connected_components(mask: Tensor, connectivity: int = 8) -> tuple[Tensor, Tensor]:
    """Label the connected components of each mask and count their pixels.

    The labels are canonical, the same on every device: a component's label is 1 + the smallest flat index y * W + x
    among its pixels. They are unique within a mask but not consecutive; ``unique(return_inverse=True)`` numbers them.

    Args:
        mask: (N, 1, H, W), bool or any integer dtype, in any memory layout. What is not zero is foreground.
        connectivity: 8, where pixels that touch at a corner are connected, or 4, where only those that share a side
            are.

    Returns:
        ``labels`` and ``counts``, both (N, 1, H, W) in int32: each pixel's label, and the number of pixels in its
        component. Both are 0 on the background.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape or connectivity, or masks of 2**31 pixels or more.

    Example:
        >>> mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]])
        >>> labels, counts = omniops.connected_components(mask[None, None])
        >>> labels[0, 0].tolist()
        [[1, 1, 0, 0], [0, 0, 0, 8], [0, 0, 0, 8]]
        >>> counts[0, 0].tolist()
        [[2, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]]
    """
    if is_scripting():  # TorchScript compiles nothing below
        scripted: tuple[Tensor, Tensor] = torch.ops.omniops.connected_components(mask, connectivity)
        return scripted
    _checks.tensor(mask=mask)
    (connectivity,) = _checks.an_int(connectivity=connectivity)
    _check_connectivity(connectivity)
    labels, counts = _connected_components(mask, connectivity)
    return labels, counts


def fill_holes(mask_logits: Tensor, max_area: int) -> Tensor:
    """Fill the small holes of masks, as sam2's ``fill_holes_in_mask_scores``.

    A hole is an 8-connected component of the background, where the logit is not above 0. Its logits become 0.1.

    Args:
        mask_logits: (..., H, W), float64, float32, float16 or bfloat16, foreground where it is above 0.
        max_area: the area in pixels up to which holes are filled, at least 1.

    Returns:
        A tensor like ``mask_logits``; gradients reach the pixels that it left alone.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape or number.

    Example:
        >>> logits = torch.tensor([[5.0, 5.0, 5.0], [5.0, -5.0, 5.0], [5.0, 5.0, 5.0]])
        >>> omniops.fill_holes(logits, max_area=8)[1].tolist()
        [5.0, 0.10000000149011612, 5.0]
    """
    if is_scripting():
        _torchscript.check_area("max_area", max_area)
        _torchscript.check_floating("mask_logits", mask_logits)
    else:
        _checks.tensor(mask_logits=mask_logits)
        (max_area,) = _checks.integer(max_area=max_area)
        if not mask_logits.is_floating_point():
            raise TypeError(
                f"mask_logits must be of a floating dtype, got {_checks.dtype_name(mask_logits)}: pass the logits, "
                "or fill the holes of a mask by ~remove_small_components(mask == 0, max_area + 1)"
            )
        _checks.alike(mask_logits=mask_logits)
    # The logit that sam2's fill_holes_in_mask_scores sets.
    return torch.where(_small("mask_logits", mask_logits <= 0, max_area), 0.1, mask_logits)


def remove_small_components(mask: Tensor, min_area: int) -> Tensor:
    """Remove the small specks of masks: 8-connected components of the foreground with less than ``min_area`` pixels.

    Args:
        mask: (..., H, W). bool or an integer dtype, foreground where it is not zero: what is removed becomes 0. Or
            logits in float64, float32, float16 or bfloat16, foreground where they are above 0: what is removed becomes
            -0.1.
        min_area: the area in pixels from which components stay, at least 1.

    Returns:
        A tensor like ``mask``; gradients reach the pixels that it left alone.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape or number.

    Example:
        >>> mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1]])
        >>> omniops.remove_small_components(mask, min_area=2).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    if is_scripting():
        _torchscript.check_area("min_area", min_area)
    else:
        _checks.tensor(mask=mask)
        (min_area,) = _checks.integer(min_area=min_area)
    if mask.is_floating_point():
        if is_scripting():
            _torchscript.check_floating("mask", mask)
        else:
            _checks.alike(mask=mask)
        return torch.where(_small("mask", mask > 0, min_area - 1), -0.1, mask)
    if is_scripting():
        _torchscript.check_integers("mask", mask)
    else:
        _check_integers("mask", mask)
    if is_scripting() or is_tracing():  # TorchScript compiles nothing below
        # It has no view of another dtype, and PyTorch fills no integers of more than 8 bits without a sign.
        return mask.to(torch.int64).masked_fill(_small("mask", mask != 0, min_area - 1), 0).to(mask.dtype)
    if mask.dtype == torch.bool:  # torch.compile cannot view it as another dtype in torch 2.7 to 2.11
        return mask & ~_small("mask", mask, min_area - 1)
    if mask.dtype not in (torch.uint16, torch.uint32, torch.uint64):  # which PyTorch has no ``where`` for
        return torch.where(_small("mask", mask != 0, min_area - 1), 0, mask)
    integers = as_signed(mask)
    return torch.where(_small("mask", integers != 0, min_area - 1), 0, integers).view(mask.dtype)


def _small(name: str, foreground: Tensor, max_area: int) -> Tensor:
    """The pixels of components of at most ``max_area`` pixels; foreground: (..., H, W)."""
    if foreground.dim() < 2:
        shape = _torchscript.shape_of(foreground)
        raise ValueError(f"{name} must have at least 2 dimensions (..., H, W), got shape {shape}")
    masks = foreground[None] if foreground.dim() == 2 else foreground.flatten(0, -3)
    areas = connected_components(masks[:, None])[1].view(foreground.shape)
    # No area is larger than int32, whose largest number this is, and a larger one would wrap around where it meets it.
    return foreground & (areas <= min(max_area, 2147483647))


def _check_integers(name: str, value: Tensor) -> None:
    if value.dtype not in _checks.INTEGERS:
        raise TypeError(
            f"{name} must be bool or of an integer dtype of 8 to 64 bits, got {_checks.dtype_name(value)}: "
            f"compare it with a threshold first, as in {name} > 0"
        )


def _check_connectivity(connectivity: int) -> None:
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")


def _results(mask: Tensor, connectivity: int) -> list[Result]:
    _check_integers("mask", mask)
    _checks.four_dimensional(mask=mask)
    n, c, h, w = mask.shape
    if c != 1:
        raise ValueError(
            f"mask must have shape (N, 1, H, W), got {tuple(mask.shape)}: "
            "make a batch of the channels with mask.flatten(0, 1).unsqueeze(1)"
        )
    _check_connectivity(connectivity)
    if h * w >= 2**31:
        raise ValueError(
            f"mask must have H * W below 2**31, as labels are int32, got shape {tuple(mask.shape)}: cut it into tiles"
        )
    return [Result((n, 1, h, w), like=mask, dtype=torch.int32)] * 2


_connected_components = define(
    "connected_components(Tensor mask, int connectivity) -> (Tensor labels, Tensor counts)",
    file="connected_components",
    results=_results,
    flops=lambda *_: 0,  # of floating point
)
