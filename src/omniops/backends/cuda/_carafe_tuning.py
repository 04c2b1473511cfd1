"""CARAFE in Triton: tiles, warps and limits on registers of each kernel.

They were chosen by timing on one NVIDIA H200. docs/benchmarks.md has the times with them (2026-11-29, torch
2.11.0+cu130, Triton 3.6.0), and what was tried and slower.
"""

from __future__ import annotations

from typing import NamedTuple


class PairsTile(NamedTuple):
    """What a program of ``_carafe_pairs`` takes of its PAIRS pairs of pixels, and what it gets."""

    channels: int
    """Of a step; of backward_masks those whose loads are in flight together."""
    warps: int
    max_registers: int
    """Of a thread: with more of them fewer programs run at once."""


PAIRS = 32
"""The pairs of centres or pixels of a tile of ``_carafe_pairs``: one for each thread of a warp."""

FORWARD_PAIRS = {8: PairsTile(8, 2, 168), 4: PairsTile(16, 2, 168), 2: PairsTile(16, 2, 168)}
"""``_carafe_pairs.forward`` by the bytes of an element."""

BACKWARD_FEATURES_PAIRS = {8: PairsTile(16, 4, 168), 4: PairsTile(32, 4, 168), 2: PairsTile(32, 4, 128)}
"""``_carafe_pairs.backward_features`` by the bytes of an element."""

BACKWARD_FEATURES_PAIRS_WIDE = BACKWARD_FEATURES_PAIRS | {2: PairsTile(32, 4, 168)}
"""The same for kernels larger than 5 x 5, whose threads hold more weights."""

BACKWARD_MASKS_PAIRS = PairsTile(8, 2, 128)
"""``_carafe_pairs.backward_masks``."""


class ForwardTile(NamedTuple):
    """What a program of ``_carafe_any.forward`` takes."""

    warps: int
    lanes: int
    """Centres."""
    sums: int
    """The results that a thread keeps at most, which say how many channels a tile has."""
    steps: int
    """Tiles of channels that a program takes one after the other."""


FORWARD = ForwardTile(2, 32, 32, 8)
FORWARD_CHANNELS_LAST = ForwardTile(4, 4, 16, 1)
"""``_carafe_any.forward`` for results along rows, and along channels."""


class BackwardTile(NamedTuple):
    """What a program of the gradients in ``_carafe_any`` takes."""

    warps: int
    lanes: int
    """Of backward_features pixels times the results of a centre's row; of backward_masks columns of results."""
    channels: int
    """At most."""
    steps: int = 1
    """Tiles of channels that a program takes one after the other."""


BACKWARD_FEATURES = BackwardTile(4, 64, 16, 4)
BACKWARD_FEATURES_CHANNELS_LAST = BackwardTile(2, 4, 128)
"""``_carafe_any.backward_features`` for gradients along rows, and along channels."""

BACKWARD_MASKS = BackwardTile(1, 32, 1)
BACKWARD_MASKS_CHANNELS_LAST = BackwardTile(1, 4, 32)
"""``_carafe_any.backward_masks`` for gradients along rows, and along channels."""

BACKWARD_MASKS_SUMS = 10
"""Taps times rows of results of a program of ``_carafe_any.backward_masks``, where a row is not more alone."""

MAX_LINES = 4
"""The rows of results of a centre that a program of ``_carafe_any`` takes at once, where there are no more."""
