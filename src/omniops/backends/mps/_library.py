"""The Metal sources beside this file, each compiled once a process and dtype, when first used."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

METAL_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
"""The dtypes of the kernels, as Metal calls them."""


@cache
def library(name: str, dtype: torch.dtype | None = None) -> Any:
    """The kernels of ``<name>.metal``, as attributes; those for a floating dtype, which the source calls SCALAR."""
    source = (Path(__file__).parent / f"{name}.metal").read_text(encoding="ascii")
    if dtype is not None:
        source = f"#define SCALAR {METAL_TYPES[dtype]}\n{source}"
    return torch.mps.compile_shader(source)
