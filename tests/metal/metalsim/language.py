"""The Metal Shading Language's words, beside those of C++, and the tokens of its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_BUFFERS = 31
MAX_THREADS_PER_GROUP = 1024

# Attribute of a parameter -> its dimensions: a scalar, or up to three axes.
BUILTINS = {
    "thread_position_in_grid": 3,
    "threadgroup_position_in_grid": 3,
    "thread_position_in_threadgroup": 3,
    "threads_per_threadgroup": 3,
    "threadgroups_per_grid": 3,
    "threads_per_grid": 3,
    "thread_index_in_threadgroup": 1,
    "thread_index_in_simdgroup": 1,
    "simdgroup_index_in_threadgroup": 1,
    "simdgroups_per_threadgroup": 1,
    "threads_per_simdgroup": 1,
}

# Metal is C++14 without these.
REFUSED = {
    "double": "Metal has no double",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no dynamic_cast",
    "typeid": "Metal has no typeid",
    "new": "Metal has no new",
    "delete": "Metal has no delete",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "goto": "Metal has no goto",
    "thread_local": "Metal has no thread_local",
    "asm": "Metal has no asm",
}

ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
_SCALARS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float")
VECTORS = {f"{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)}
_ATOMICS = {"atomic_int", "atomic_uint", "atomic_float", "atomic_bool", "atomic_ulong"}
_PACKED = {f"packed_{vector}" for vector in VECTORS}
_ALIASES = {"size_t", "int8_t", "uint8_t", "int16_t", "uint16_t", "int32_t", "uint32_t", "int64_t", "uint64_t"}
BUILTIN_TYPES = {*_SCALARS, *VECTORS, *_ATOMICS, *_PACKED, *_ALIASES}

_TOKEN = re.compile(
    r"""
      (?P<space>\s+|//[^\n]*|/\*.*?\*/)
    | (?P<directive>^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<char>'(?:[^'\\\n]|\\.)*')
    | (?P<number>\.?[0-9](?:[eEpP][+-]|[0-9a-zA-Z_.'])*)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<mark>::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_LINE_MARKER = re.compile(r"\s*#\s*(?:line\s+)?(\d+)")
FLOAT = re.compile(r"(?:\d[\d']*\.[\d']*|\.\d[\d']*|\d[\d']*(?=[eE]))(?:[eE][+-]?\d+)?")


class CompileError(RuntimeError):
    """The source is not what Metal accepts."""


@dataclass
class Token:
    """A piece of the text, white space and directives too; ``replacement`` is what takes its place in C++."""

    kind: str
    text: str
    line: int
    replacement: str | None = None


def tokenise(text: str) -> list[Token]:
    """All of preprocessed text; line markers tell the lines."""
    tokens, line = [], 1
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "mark"
        tokens.append(Token(kind, match.group(), line))
        marker = _LINE_MARKER.match(match.group()) if kind == "directive" else None
        line = int(marker.group(1)) - 1 if marker else line + match.group().count("\n")
    return tokens


def wrong_positions(types: Mapping[str, str]) -> str:
    """What is wrong with the types of a kernel's builtins, by their attributes; empty if nothing is.

    Metal wants the same number of axes of all positions, and the same type of those of one kind.
    """
    axes = {a: (int(t[-1]) if t[-1] in "234" else 1) for a, t in types.items() if BUILTINS[a] == 3}
    if len(set(axes.values())) > 1:
        return f"positions and sizes must have as many axes each, got {types}"
    for pair in (
        ("thread_position_in_grid", "threads_per_grid"),
        ("thread_position_in_threadgroup", "threads_per_threadgroup"),
    ):
        if len({types[a] for a in pair if a in types}) > 1:
            return f"{' and '.join(pair)} must have one type"
    for attribute, word in types.items():
        scalar = word if word.endswith("_t") else word.rstrip("234")
        known = scalar in ("uint", "ushort", "uint32_t", "uint16_t")
        if not known or (BUILTINS[attribute] == 1 and word != scalar):
            return f"[[{attribute}]] cannot be {word}"
    return ""
