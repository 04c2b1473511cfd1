"""From a .metal file's text to preprocessed text, as Metal's preprocessor would leave it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._cpp_embed_headers import _embed_headers

from metalsim import toolchain
from metalsim.language import CompileError

_STANDARD = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*$", re.MULTILINE)
_OTHER = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"][^\n]*)$", re.MULTILINE)


DEFINITIONS = ("-D__METAL__=1", "-D__METAL_VERSION__=310")


def clang(text: str) -> str:
    """The text, preprocessed by the emulator's compiler."""
    command = (*toolchain.ZIG, "clang", "-target", toolchain.target(), "-E", "-undef", "-x", "c++", "-std=c++14")
    return toolchain.run((*command, *DEFINITIONS, "-"), text).stdout


def preprocess(source: str, run: Callable[[str], str] = clang) -> str:
    """Expand macros with ``run``, and embed PyTorch's c10/metal headers as ``torch.mps.compile_shader`` does."""
    if not _STANDARD.search(source) and re.search(r"\bmetal\b", source):
        raise CompileError("the source uses the namespace metal without #include <metal_stdlib>")
    include = Path(torch.__file__).parent / "include"
    text = _embed_headers([line + "\n" for line in source.split("\n")], [include], set())
    text = _STANDARD.sub("", text)
    text = _OTHER.sub(r"#error compile_shader finds no header \1, only those of Metal and of c10/metal", text)
    return run(text)
