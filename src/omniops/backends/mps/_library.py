"""The Metal sources beside this file, each compiled once a process and dtype, when first used."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

METAL_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
"""The dtypes of the kernels, as Metal calls them."""

_FOLDER = Path(__file__).parent


def source(name: str) -> str:
    """The text of ``<name>.metal`` with that of the files beside it that it includes: PyTorch finds its own alone."""

    def included(line: re.Match[str]) -> str:
        return (_FOLDER / line[1]).read_text(encoding="ascii")

    text = (_FOLDER / f"{name}.metal").read_text(encoding="ascii")
    return re.sub(r'^#include "(.+)"$', included, text, flags=re.MULTILINE)


@cache
def library(name: str, dtype: torch.dtype | None = None) -> Any:
    """The kernels of ``<name>.metal``, as attributes; those for a floating dtype, which the source calls SCALAR."""
    text = source(name)
    if dtype is not None:
        text = f"#define SCALAR {METAL_TYPES[dtype]}\n{text}"
    return torch.mps.compile_shader(text)
