"""Runs the command in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import packages_distributions

import pytest
from one_thread import one_thread as one_thread

from omniops.cli import doctor, main

_packages_distributions = functools.cache(packages_distributions)


@dataclass
class Run:
    status: int
    out: str
    err: str
    """Without the notes."""
    notes: list[str]
    """What took a while, as it was said on stderr."""


@pytest.fixture(autouse=True)
def distributions_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed does not change while tests run, and to read it takes half a second."""
    monkeypatch.setattr(doctor, "packages_distributions", _packages_distributions)


@pytest.fixture
def omniops(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Run:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        lines = captured.err.splitlines(keepends=True)
        notes = [line for line in lines if line.startswith("omniops: ") and not line.startswith("omniops: error")]
        err = "".join(line for line in lines if line not in notes)
        return Run(int(ended.value.code or 0), captured.out, err, notes)

    return run


@pytest.fixture
def fails(omniops: Callable[..., Run]) -> Callable[..., str]:
    """Run what shall fail with that status and one line, and return the line."""

    def run(*arguments: str, status: int) -> str:
        result = omniops(*arguments)
        assert result.status == status
        assert result.out == ""
        (line,) = result.err.splitlines()
        assert line.startswith("omniops: error: ")
        return line

    return run
