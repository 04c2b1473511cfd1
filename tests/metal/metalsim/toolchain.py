"""Runs the compilers, and keeps what they made under build/, by the hash of everything that went into it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from metalsim.language import CompileError

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / "build" / "metal"
ZIG = (sys.executable, "-m", "ziglang")


def target() -> str:
    """The target triple of this machine; a RuntimeError where the emulator has not been ported to."""
    machine = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64"}.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        raise RuntimeError(f"the Metal emulator runs on Linux on x86-64 and aarch64, not on {platform.platform()}")
    return f"{machine}-linux-gnu"


def clang_version() -> str:
    return version("ziglang")


def run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler; CompileError with what it printed when it fails."""
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"), "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig")}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command[:4])} ... failed:\n{done.stderr}{done.stdout}")
    return done


def link(objects: Sequence[Path], path: Path) -> None:
    """A shared library of the objects. What they lack, the process has loaded: the C library, the emulator."""
    run((*ZIG, "ld.lld", "-shared", *map(str, objects), "-o", str(path)))


def cached(name: str, inputs: Sequence[str | Path], make: Callable[[Path], None]) -> Path:
    """The file that ``make(path)`` writes, made once for the same inputs: texts, or files and folders by content."""
    digest = hashlib.sha256()
    for part in inputs:
        paths = [] if isinstance(part, str) else sorted(p for p in (part, *part.rglob("*")) if p.is_file())
        for data in [part.encode()] if isinstance(part, str) else [p.read_bytes() for p in paths]:
            digest.update(len(data).to_bytes(8, "little") + data)
    stem, suffix = os.path.splitext(name)
    path = CACHE / f"{stem}-{digest.hexdigest()[:20]}{suffix}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / name
            make(made)
            os.replace(made, path)
    return path
