"""The Metal sources beside this file, each compiled once a process, when first used."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

METAL_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
"""The dtypes of the kernels, as their names and PyTorch's own end."""


@cache
def library(name: str) -> Any:
    """The kernels of ``<name>.metal``, as attributes."""
    return torch.mps.compile_shader((Path(__file__).parent / f"{name}.metal").read_text(encoding="ascii"))
