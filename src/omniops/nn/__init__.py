"""Modules."""

from omniops.nn.carafe import CARAFE, CARAFENaive, CARAFEPack

__all__ = ["CARAFE", "CARAFENaive", "CARAFEPack"]
