"""Every kernel through Apple's own compiler, which comes with Xcode and needs no GPU.

    python tests/metal/xcrun_compile.py

Each ``*.metal`` file is compiled in each language version that PyTorch may ask for and, where it has a SCALAR, for each
floating type. A version that this Xcode does not have is named as not available. Ends with status 1 where anything does
not compile, or where no version is available.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "omniops" / "backends" / "mps"
STANDARDS = ("metal3.1", "metal3.2", "metal4.0")
SCALARS = ("float", "half", "bfloat")


def main() -> int:
    """Compile all, and return the status."""
    failed: list[str] = []
    compiled = 0
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.metal"
        empty.write_text("#include <metal_stdlib>\n")
        standards = []
        for standard in STANDARDS:
            if error := compile_metal(empty, standard, None, folder):
                print(f"-std={standard}: not available: {error.splitlines()[0]}")
            else:
                standards.append(standard)
        if not standards:
            print("no Metal compiler is available")
            return 1
        for source in sorted(SOURCES.glob("*.metal")):
            scalars = SCALARS if "SCALAR" in source.read_text(encoding="ascii") else (None,)
            for standard in standards:
                for scalar in scalars:
                    what = f"{source.name} -std={standard}{f' -DSCALAR={scalar}' if scalar else ''}"
                    error = compile_metal(source, standard, scalar, folder)
                    print(f"{what}: {'FAILED' if error else 'compiled'}", flush=True)
                    if error:
                        print(error)
                        failed.append(what)
                    compiled += not error
    print(f"{compiled} compiled, {len(failed)} failed{''.join(f'{chr(10)}  {what}' for what in failed)}")
    return 1 if failed or not compiled else 0


def compile_metal(source: Path, standard: str, scalar: str | None, folder: str) -> str:
    """What the compiler says where it fails; nothing where it does not."""
    # As PyTorch compiles: without fast math, and with the headers of its wheel.
    command = ["xcrun", "metal", f"-std={standard}", "-fno-fast-math", "-c", str(source), "-o", f"{folder}/out.air"]
    if scalar:
        command.append(f"-DSCALAR={scalar}")
    if "<c10/" in source.read_text(encoding="ascii"):
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            return f"{source.name} includes headers of torch, which is not installed"
        command.append(f"-I{Path(torch.origin).parent / 'include'}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"cannot run xcrun: {error}"
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
