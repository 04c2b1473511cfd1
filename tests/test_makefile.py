"""make sets .venv up once, and again where something else is asked for. A script stands for Python."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

MAKEFILE = Path(__file__).parents[1] / "Makefile"

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(not MAKEFILE.exists(), reason="the Makefile is not beside the tests"),
]

PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
if [ "$2" = venv ]; then
    for folder; do :; done
    rm -rf "$folder"
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
fi
if [ "$3" = install ] && [ -n "$PIP_CONSTRAINT" ]; then
    cp "$PIP_CONSTRAINT" "$LOG.constraints"
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

    def run(*arguments, target="test"):
        """What Python was called for, a word each."""
        log = tmp_path / "log"
        log.write_text("")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        # With these make itself may be running these tests.
        for name in ("PYTHON", "TORCH", "MIDDLE", "PIP_CONSTRAINT", "SKBUILD_BUILD_DIR"):
            environment.pop(name, None)
        environment |= {"LOG": str(log), "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
        subprocess.run(["make", *arguments, target], cwd=tmp_path, env=environment, check=True, capture_output=True)
        steps = []
        for line in log.read_text().splitlines():
            if " venv " in line:
                venv = line.split()[-1]
                steps.append(f"venv by {line.split()[0]}" if venv == ".venv" else venv)
            elif "torch" in line:
                steps.append(next(word for word in line.split() if word.startswith("torch")))
            elif "pytest" in line:
                options, marked, folders = re.fullmatch(r".* -m pytest(.*) -m ((?:not )?slow) (.*)", line).groups()
                without = " without tests/export" if "--ignore tests/export" in options else ""
                assert ("--ignore tests/browser" in options) == ("-n auto" in options)
                told = f"pytest {marked}: {folders}{without}"
                steps.append("pytest" if told == "pytest not slow: tests" else told)
        return steps

    return run


def test_the_second_time_nothing_is_installed(make):
    first = make()
    assert (first[0], first[-1], len(first)) == ("venv by python3", "pytest", 3)
    assert make() == ["pytest"]


def test_what_takes_long_runs_by_itself(make, tmp_path):
    """Each file of exported models too, of which two run at a time and the longest starts first."""
    make()
    folder = tmp_path / "tests" / "export"
    folder.mkdir(parents=True)
    for name in ("a", "table"):
        (folder / f"test_{name}.py").touch()
    first, *others = make(target="test-all")
    assert first == "pytest slow: tests without tests/export"
    assert sorted(others) == [f"pytest slow: tests/export/test_{name}.py" for name in ("a", "table")]


def test_what_lands_was_tested_with_the_oldest_and_the_middle():
    steps = (MAKEFILE.parent / ".ci" / "run").read_text().splitlines()
    targets = ("lint", "docs", "test", "test-browser", "test-all", "test-oldest", "test-middle")
    assert steps[-7:] == [f"make {target}" for target in targets]


def test_the_site_is_built_anew_and_its_warnings_are_errors(make, tmp_path):
    assert make(target="docs")[0] == "venv by python3"
    (call,) = [line for line in (tmp_path / "log").read_text().splitlines() if "sphinx" in line]
    options = call.removeprefix("python -m sphinx ").removesuffix(" docs build/docs").split()
    assert {"--fresh-env", "--write-all", "--fail-on-warning"} <= set(options)
    assert make(target="docs") == []
    ignored = (MAKEFILE.parent / ".gitignore").read_text().splitlines()
    assert "build/" in ignored


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


def test_the_oldest_and_the_middle_have_environments_of_their_own(make, tmp_path):
    assert make() == ["venv by python3", "torch==2.15.0", "pytest"]
    assert make(target="test-oldest") == [".venv-oldest", "torch", "pytest"]
    venv, torch, tests = make(target="test-middle")
    assert (venv, torch) == (".venv-middle", "torch==2.11.0")
    what, folders = tests.split(": ")
    folders = folders.split()
    assert (what, "tests" in folders) == ("pytest not slow", False)
    assert all((MAKEFILE.parent / folder).is_dir() for folder in folders)
    assert make() == make(target="test-oldest") == ["pytest"]
    assert make(target="test-middle") == [tests]
    assert make("MIDDLE=torch==2.9.0", target="test-middle") == ["torch==2.9.0", tests]
    assert make("TORCH=torch==2.9.0", "VENV=elsewhere", target="test-oldest") == ["pytest"]
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob(".venv*")) == []


def test_the_oldest_are_the_lowest_versions_that_are_named(make, tmp_path):
    shutil.copy(MAKEFILE.with_name("pyproject.toml"), tmp_path)
    make(target="test-oldest")
    pinned = (tmp_path / "log.constraints").read_text().split()
    (tmp_path / "log.constraints").unlink()
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    optional = [text for group in project["optional-dependencies"].values() for text in group]
    asked_for = [Requirement(text) for text in project["dependencies"] + optional]
    asked_for = [item for item in asked_for if item.name != "omniops"]
    assert len(asked_for) > 20
    lowest = {item.name: bound.version for item in asked_for for bound in item.specifier if bound.operator == ">="}
    assert set(pinned) == {f"{name}=={version}" for name, version in lowest.items()}
    # None is without a lowest version, none has two, and no other run is held to them.
    assert set(lowest) == {item.name for item in asked_for}
    assert len(set(pinned)) == len({line.split("==")[0] for line in pinned})
    make("PYTHON=another")
    assert not (tmp_path / "log.constraints").exists()
    make(target="test-middle")
    assert (tmp_path / "log.constraints").read_text() == "numpy<2.4\n"


def test_each_environment_builds_in_a_folder_of_its_own(make, tmp_path):
    (tmp_path / "python3").write_text(PYTHON + 'echo "$SKBUILD_BUILD_DIR" >>"$LOG.builds"\n')
    for target in ("test", "test-oldest", "test-middle"):
        make(target=target)
    assert set((tmp_path / "log.builds").read_text().split()) == {
        ".venv/build",
        ".venv-oldest/build",
        ".venv-middle/build",
    }
