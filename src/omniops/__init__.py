"""Vision operators that PyTorch leaves on CUDA, on every device: see README.md."""

from omniops import nn
from omniops.nn import CARAFE, CARAFENaive, CARAFEPack
from omniops.ops.carafe import carafe, carafe_downsample, carafe_naive

__all__ = ["CARAFE", "CARAFENaive", "CARAFEPack", "carafe", "carafe_downsample", "carafe_naive", "nn"]
