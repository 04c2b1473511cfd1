"""make sets .venv up once, and again where something else is asked for. A script stands for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(not MAKEFILE.exists(), reason="the Makefile is not beside the tests"),
]

PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
if [ "$2" = venv ]; then
    rm -rf .venv
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
fi
"""


@pytest.fixture
def make(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        (tmp_path / name).touch()
    for name in ("python3", "another"):
        (tmp_path / name).write_text(PYTHON)
        (tmp_path / name).chmod(0o755)

    def run(*arguments):
        """What Python was called for, a word each."""
        log = tmp_path / "log"
        log.write_text("")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        for name in ("PYTHON", "TORCH"):  # with which make itself may be running these tests
            environment.pop(name, None)
        environment |= {"LOG": str(log), "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
        subprocess.run(["make", *arguments, "test"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        steps = []
        for line in log.read_text().splitlines():
            if " venv " in line:
                steps.append(f"venv by {line.split()[0]}")
            elif "torch" in line:
                steps.append(next(word for word in line.split() if word.startswith("torch")))
            elif "pytest" in line:
                steps.append("pytest")
        return steps

    return run


def test_the_second_time_nothing_is_installed(make):
    first = make()
    assert (first[0], first[-1], len(first)) == ("venv by python3", "pytest", 3)
    assert make() == ["pytest"]


def test_another_torch_is_installed(make):
    make()
    assert make("TORCH=torch==2.7.0") == ["torch==2.7.0", "pytest"]
    assert make("TORCH=torch==2.7.0") == ["pytest"]
    assert make("TORCH=torch>=2.7,<3") == ["torch>=2.7,<3", "pytest"]
    assert make("TORCH=torch>=2.7,<3") == ["pytest"]


def test_another_python_starts_anew(make):
    _, torch, _ = make()
    assert make("PYTHON=another") == ["venv by another", torch, "pytest"]
    assert make("PYTHON=another") == ["pytest"]


def test_a_changed_source_is_installed(make, tmp_path):
    _, torch, _ = make()
    later = (tmp_path / ".venv" / "installed").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert make() == [torch, "pytest"]
