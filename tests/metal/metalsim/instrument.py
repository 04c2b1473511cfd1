"""Puts a check before every access to device, constant and threadgroup memory in a kernel's LLVM IR, and counts steps.

clang's own sanitizers skip address spaces other than 0, and they run after optimisation. This runs on what clang emits
before it, so every access that the source makes is checked, with the alignment that clang took it to have and its line.

A step is a basic block that a thread enters, except the first of a function. Those of <metal_stdlib> do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from metalsim.language import CompileError

_TYPE_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "half": 2, "bfloat": 2, "float": 4, "ptr": 8}
_VALUE = r"%[\w.$-]+|@[\w.$-]+|@\"[^\"]+\"|getelementptr.*\)|inttoptr.*\)"
_POINTER = rf"ptr addrspace\((?P<space>[1-3])\) (?P<pointer>{_VALUE})"
_LOAD = re.compile(rf"^\s+%[\w.$-]+ = load (?:volatile )?(?P<type>.+?), {_POINTER}(?:, align (?P<align>\d+))?")
_STORE = re.compile(
    rf"^\s+store (?:volatile )?(?P<type><[^>]+>|[\w]+(?: addrspace\(\d\))?) .+, {_POINTER}(?:, align (?P<align>\d+))?"
)
_COPY = re.compile(r"^\s+(?:tail )?call void @llvm\.mem(?P<what>cpy|move|set)\.[\w.]+\((?P<arguments>.*)\)")
_OPERAND = re.compile(r"^ptr addrspace\((\d)\)(?: \w+)*?(?: align (\d+))?(?: \w+(?:\(\d+\))?)*? (%[\w.$-]+|@[\w.$-]+)$")
_DEBUG = re.compile(r"!dbg !(\d+)")
_LABEL = re.compile(r"^(?:[\w.$-]+|\"[^\"]+\"):")
_PHI = re.compile(r"^\s+%[\w.$-]+ = phi\b")
_OF_METAL = re.compile(r"@_ZNK?5metal")
# Under fast math: with the flag that says that no operand is a NaN.
_FAST_COMPARISON = re.compile(
    r"^\s+(?P<result>%[\w.$-]+) = fcmp (?P<flags>(?:\w+ )*?(?:fast|nnan) (?:\w+ )*?)(?P<how>\w+) "
    r"(?P<type>float|half|bfloat) (?P<a>[^,]+), (?P<b>[^,]+)(?P<rest>.*)$"
)
_METADATA = re.compile(r"^!(\d+) = (?:distinct )?!(\w+)\((.*)\)$")

_SPACE_NAMES = {1: "device", 2: "constant", 3: "threadgroup"}


class _Lines:
    """The line of the kernel's own file that a debug location stands for, through whatever was inlined."""

    def __init__(self, text: str) -> None:
        self.nodes: dict[str, tuple[str, str]] = {}
        for line in text.splitlines():
            match = _METADATA.match(line)
            if match:
                self.nodes[match.group(1)] = (match.group(2), match.group(3))

    def __call__(self, instruction: str) -> int:
        match = _DEBUG.search(instruction)
        return self._location(match.group(1)) if match else 0

    def _location(self, node: str) -> int:
        _, fields = self.nodes.get(node, ("", ""))
        line = re.search(r"line: (\d+)", fields)
        return int(line.group(1)) if line else 0


def instrument(text: str) -> str:
    """The module with ``call @emulator_check(address, size, align, space | kind << 2, line)`` before each access,
    ``call @emulator_step(line)`` at each step, and ``call @emulator_compare(result, a, b)`` after each comparison of
    floats that may not be finite only in the program's eyes, not the compiler's."""
    lines = _Lines(text)
    steps = _Steps(lines)
    output: list[str] = []
    count = 0
    for line in text.splitlines():
        checks: list[tuple[str, str, int, int, int]] = []
        comparison = _FAST_COMPARISON.match(line)
        if comparison:
            count += 1
            output.extend(_compare(comparison, count))
            continue
        output.extend(steps(line))
        if "addrspacecast" in line and not line.startswith(("!", ";")):
            raise CompileError(f"line {lines(line)}: a cast between address spaces")
        load, store = _LOAD.match(line), _STORE.match(line)
        if load:
            checks.append(_check(load, 1))
        elif store:
            checks.append(_check(store, 2))
        elif (copy := _COPY.match(line)) is not None:
            checks.extend(_copy_checks(copy))
        elif re.match(r"\s+(?:%\S+ = )?(?:load|store|atomicrmw|cmpxchg)\b.*, ptr addrspace\(", line):
            raise CompileError(f"the emulator cannot check this instruction: {line.strip()}")
        for pointer, size, align, space, kind in checks:
            count += 1
            output.append(f"  %emulator.{count} = ptrtoint ptr addrspace({space}) {pointer} to i64")
            output.append(
                f"  call void @emulator_check(i64 %emulator.{count}, i64 {size}, i32 {align}, "
                f"i32 {space | kind << 2}, i32 {lines(line)})" + _debug(line)
            )
        output.append(line)
    body = "\n".join(output) + "\n"
    for result, name, types in (
        ("void", "emulator_check", "i64, i64, i32, i32, i32"),
        ("void", "emulator_step", "i32"),
        ("i1", "emulator_compare", "i1 zeroext, float, float"),
    ):
        if f"@{name}(" in body and not re.search(rf"^declare .*@{name}\(", body, re.MULTILINE):
            body += f"\ndeclare {result} @{name}({types})\n"
    return body


def _compare(comparison: re.Match[str], count: int) -> Iterator[str]:
    """The comparison, and what the emulator makes of it."""
    values = []
    for i, operand in enumerate((comparison["a"], comparison["b"])):
        value = operand
        if comparison["type"] != "float":
            value = f"%emulator.{count}.{i}"
            yield f"  {value} = fpext {comparison['type']} {operand} to float"
        values.append(f"float {value}")
    plain = f"%emulator.{count}.plain"
    rest, type = comparison["rest"], comparison["type"]
    yield f"  {plain} = fcmp {comparison['flags']}{comparison['how']} {type} {comparison['a']}, {comparison['b']}{rest}"
    yield f"  {comparison['result']} = call i1 @emulator_compare(i1 zeroext {plain}, {', '.join(values)}){rest}"


class _Steps:
    """Called with one line of the module after the other: the calls to put before it."""

    def __init__(self, lines: _Lines) -> None:
        self.lines = lines
        self.counts = False  # whether the function's blocks do
        self.first = False  # whether no instruction of the function has come
        self.block = False  # whether no instruction of the block has come
        self.line = 0

    def __call__(self, text: str) -> Iterator[str]:
        if text.startswith("define "):
            self.counts, self.first, self.block = not _OF_METAL.search(text), True, False
        elif _LABEL.match(text):
            self.block = self.counts and not self.first
        elif text.startswith(" "):
            self.line = self.lines(text) or self.line
            if self.block and not _PHI.match(text):
                self.block = False
                yield f"  call void @emulator_step(i32 {self.line})" + _debug(text)
            self.first = False


def _debug(line: str) -> str:
    match = _DEBUG.search(line)
    return f", !dbg !{match.group(1)}" if match else ""


def _check(match: re.Match[str], kind: int) -> tuple[str, str, int, int, int]:
    size = _size(match["type"])
    return match["pointer"], str(size), int(match["align"] or 1), int(match["space"]), kind


def _copy_checks(match: re.Match[str]) -> list[tuple[str, str, int, int, int]]:
    operands = [part.strip() for part in match["arguments"].split(", ")]
    size = operands[2].split()[-1]
    checks = []
    for operand, kind in zip(operands[:2], (2, 1), strict=True):
        pointer = _OPERAND.match(operand)
        if pointer:
            checks.append((pointer[3], size, int(pointer[2] or 1), int(pointer[1]), kind))
        elif "addrspace" in operand:
            raise CompileError(f"the emulator cannot check this instruction: {match.group().strip()}")
    return checks


def _size(kind: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    if vector:
        count, element = int(vector[1]), vector[2]
        return (count * 1 + 7) // 8 if element == "i1" else count * _TYPE_SIZES[element]
    if kind.startswith("ptr"):
        return 8
    if kind not in _TYPE_SIZES:
        raise CompileError(f"the emulator cannot check a value of the type {kind}")
    return _TYPE_SIZES[kind]
