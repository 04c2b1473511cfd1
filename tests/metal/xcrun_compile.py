"""Every kernel through Apple's own compiler, which comes with Xcode and needs no GPU.

    python tests/metal/xcrun_compile.py [metal3.1 ...]

Each ``*.metal`` file is compiled in each language version that PyTorch may ask for and, where it has a SCALAR, for each
floating type. A version that this Xcode does not have is named as not available. Ends with status 1 where anything does
not compile, where no version is available, or where one of those that are given is not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "omniops" / "backends" / "mps"
STANDARDS = ("metal3.1", "metal3.2", "metal4.0")
SCALARS = ("float", "half", "bfloat")


def main(required: Sequence[str]) -> int:
    """Compile all, and return the status."""
    if unknown := [standard for standard in required if standard not in STANDARDS]:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(STANDARDS)}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        standards = available(folder)
        if not standards:
            print("no Metal compiler is available")
            return 1
        compiled, failed = compile_all(standards, folder)
    print(f"{compiled} compiled, {len(failed)} failed{''.join(f'{chr(10)}  {what}' for what in failed)}")
    missing = [standard for standard in required if standard not in standards]
    if missing:
        print(f"required and not available: {', '.join(missing)}")
    return 1 if failed or missing or not compiled else 0


def available(folder: str) -> list[str]:
    """The language versions that the compiler knows; what it says of the others is printed."""
    empty = Path(folder) / "empty.metal"
    empty.write_text("#include <metal_stdlib>\n")
    standards = []
    for standard in STANDARDS:
        right, said = compile_metal(empty, standard, None, folder)
        if right:
            standards.append(standard)
        else:
            print(f"-std={standard}: not available: {said.splitlines()[0]}")
    return standards


def compile_all(standards: Sequence[str], folder: str) -> tuple[int, list[str]]:
    """How many compile, and the names of those that do not; what the compiler says of either is printed."""
    compiled = 0
    failed = []
    for source in sorted(SOURCES.glob("*.metal")):
        scalars = SCALARS if "SCALAR" in source.read_text(encoding="ascii") else (None,)
        for standard in standards:
            for scalar in scalars:
                what = f"{source.name} -std={standard}{f' -DSCALAR={scalar}' if scalar else ''}"
                right, said = compile_metal(source, standard, scalar, folder)
                print(f"{what}: {'compiled' if right else 'FAILED'}", flush=True)
                if said:
                    print(said, flush=True)
                compiled += right
                if not right:
                    failed.append(what)
    return compiled, failed


def compile_metal(source: Path, standard: str, scalar: str | None, folder: str) -> tuple[bool, str]:
    """Whether it compiles, and what the compiler says: its warnings, or why not."""
    # As PyTorch compiles: without fast math.
    command = ["xcrun", "metal", f"-std={standard}", "-fno-fast-math", "-c", str(source), "-o", f"{folder}/out.air"]
    if scalar:
        command.append(f"-DSCALAR={scalar}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return False, f"cannot run xcrun: {error}"
    said = done.stderr.strip()
    return done.returncode == 0, said if done.returncode == 0 or said else f"status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
