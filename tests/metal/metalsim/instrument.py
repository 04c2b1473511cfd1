"""Puts a check before every access to device, constant and threadgroup memory in a kernel's LLVM IR.

clang's own sanitizers skip address spaces other than 0, and they run after optimisation. This runs on what clang emits
before it, so every access that the source makes is checked, with the alignment that clang took it to have and its line.
"""

from __future__ import annotations

import re

from metalsim.parser import CompileError

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
    """The module with ``call @emulator_check(address, size, align, space | kind << 2, line)`` before each access."""
    lines = _Lines(text)
    output: list[str] = []
    count = 0
    for line in text.splitlines():
        checks: list[tuple[str, str, int, int, int]] = []
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
    if "@emulator_check(" in body and not re.search(r"^declare .*@emulator_check\(", body, re.MULTILINE):
        body += "\ndeclare void @emulator_check(i64, i64, i32, i32, i32)\n"
    return body


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
