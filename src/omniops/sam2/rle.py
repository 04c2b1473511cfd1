"""Masks as COCO writes them: the lengths of the runs down the columns, of background and of mask by turns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Counts = NDArray[np.int64]
"""The lengths of a mask's runs, of background first, which may be none."""


def encode(mask: ArrayLike) -> dict[str, Any]:
    """A mask (H, W), foreground where it is not zero, as ``pycocotools.mask.encode``, with ``counts`` as str.

    Raises:
        ValueError: for another number of dimensions.
    """
    values = np.asarray(mask)
    if values.ndim != 2:
        raise ValueError(f"mask must be (H, W), got {values.shape}")
    # NumPy's work is one thread's, so that several threads encode masks without being in each other's way.
    columns = np.ascontiguousarray((values != 0).T).reshape(-1)
    changes = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=len(columns))
    if len(columns) and columns[0]:
        counts = np.append(0, counts)
    return {"size": list(values.shape), "counts": compress_counts(counts)}


def decode(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """The mask (H, W) of ``{"size": [H, W], "counts": ...}``, whose counts are numbers, or COCO's str or bytes.

    Raises:
        ValueError: for counts that are not those of H x W pixels, or not COCO's.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    lengths = decompress_counts(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"counts must be those of {height} x {width} pixels, got {lengths.sum()} in all")
    mask: NDArray[np.bool_] = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T
    return mask


def count_runs(masks: Tensor, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> list[Counts]:
    """The lengths of the runs of each mask, of background first, which may be none.

    Args:
        masks: (K, h, w), bool, on any device, which finds the few pixels where runs begin; the CPU does the rest.
        corner: the x and y in the picture of the masks' first pixel.
        size: the height and width of the picture; by default those of the masks.
    """
    k, h, w = masks.shape
    height, width = size or (h, w)
    # The runs of every column begin and end in it, so that the pixels of the picture between two columns need no care.
    # Where one run ends at the beginning of the next, both marks are removed below.
    changes = torch.empty((k, h + 1, w), dtype=torch.bool, device=masks.device)
    if h == 0:  # no first row can be copied
        changes.fill_(False)
    else:
        changes[:, 0], changes[:, h] = masks[:, 0], masks[:, -1]
        changes[:, 1:h] = masks[:, 1:] != masks[:, :-1]
    if changes.device.type == "mps" and changes.numel() > 2**24:
        changes = changes.cpu()  # MPS may give wrong indices for so many elements (pytorch issue 122916)
    mask, y, x = changes.nonzero().cpu().numpy().T
    pixels = height * width
    offsets = np.sort(mask * (pixels + 1) + (x + corner[0]) * height + (y + corner[1]))
    if len(offsets):
        is_repeated = offsets[1:] == offsets[:-1]
        offsets = offsets[~(np.append(is_repeated, False) | np.append(False, is_repeated))]

    starts = np.arange(k + 1) * (pixels + 1)
    all_counts = []
    for start, (first, last) in zip(starts, pairwise(np.searchsorted(offsets, starts)), strict=False):
        counts = np.diff(offsets[first:last] - start, prepend=0, append=pixels)
        # Where the last run of mask ends with the picture, no background comes after it.
        all_counts.append(counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts)
    return all_counts


def area(counts: Counts) -> int:
    """The pixels of the mask."""
    return int(counts[1::2].sum())


def box(counts: Counts, height: int) -> tuple[int, int, int, int] | None:
    """The first and last column and row with a pixel of the mask, as x0, y0, x1, y1; None where there is no pixel."""
    first = counts.cumsum()[:-1:2]
    if not len(first):
        return None
    last = first + counts[1::2] - 1
    (x0, y0), (x1, y1) = (np.divmod(ends, height) for ends in (first, last))
    if (x0 < x1).any():  # a run from the bottom of a column to the top of the next
        return int(x0[0]), 0, int(x1[-1]), height - 1
    return int(x0[0]), int(y0.min()), int(x1[-1]), int(y1.max())


def compress_counts(counts: Counts) -> str:
    """The runs as COCO's string, as pycocotools' ``rleToString``.

    From the fourth on a count is written as its difference to the last but one before it. A character holds six bits,
    from "0" on: five of the number, the lowest first, and one that says whether more follow.
    """
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    digits, has_digit = [], []
    more = np.ones(len(rest), dtype=bool)
    while more.any():
        has_digit.append(more)
        digit = rest & 31
        rest = rest >> 5
        more = more & (rest != np.where(digit & 16, -1, 0))
        digits.append(digit + 32 * more + 48)
    if not digits:
        return ""
    return bytes(np.stack(digits, 1)[np.stack(has_digit, 1)].astype(np.uint8)).decode("ascii")


def decompress_counts(counts: str | bytes) -> Counts:
    """The lengths of the runs in COCO's string, as pycocotools' ``rleFrString``.

    Raises:
        ValueError: for a string that is not COCO's.
    """
    text = counts.encode("ascii", "backslashreplace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any() or (len(codes) and codes[-1] & 32):
        raise ValueError(f"counts must be COCO's string of runs, got {text[:40]!r}")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)[: len(last)]
    position = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if (position > 11).any():
        raise ValueError("counts must be COCO's string of runs, got one of more than 60 bits")
    lengths = np.add.reduceat((codes & 31) << 5 * position, first) if len(first) else np.zeros(0, np.int64)
    lengths -= np.where(codes[last] & 16, 1 << 5 * (position[last] + 1), 0)
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    return lengths
