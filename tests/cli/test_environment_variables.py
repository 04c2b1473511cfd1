"""docs/cli.md lists every variable of the environment that omniops reads, and no other of ours."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from omniops.server import settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/cli.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not beside the tests")


def _read_by(source: str) -> set[str]:
    """The names that a module reads of os.environ, or of a mapping in its place, and those of options."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            names.add(node.slice)
        elif isinstance(node, ast.Call) and node.args:
            if re.fullmatch(r"(os\.)?environ\.get|environment\.get|os\.getenv", ast.unparse(node.func)):
                names.add(node.args[0])
            names.update(keyword.value for keyword in node.keywords if keyword.arg == "envvar")
    found = {name.value for name in names if isinstance(name, ast.Constant)}
    return found | set(re.findall(r"\b(?:OMNIOPS|SAM2)_[A-Z0-9_]*[A-Z0-9]\b", source))


def _listed() -> list[str]:
    """Those in the first columns of the tables of the page's last section."""
    section = PAGE.read_text(encoding="utf-8").partition("## Environment variables")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_all_that_are_read_are_listed_once():
    read = set(settings._VARIABLES)
    for path in (ROOT / "src").rglob("*.py"):
        read |= _read_by(path.read_text(encoding="utf-8"))
    for path in (ROOT / "csrc").iterdir():
        read |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")))
    assert {"OMNIOPS_DEVICE", "OMNIOPS_LOG_LEVEL", "OMNIOPS_CPU_CAPABILITY", "OMNIOPS_GALLERY", "API_URL"} <= read
    listed = _listed()
    of_wsgi = {"CONTENT_LENGTH", "HTTP_HOST", "gunicorn.socket"}
    assert sorted(listed) == sorted(read - of_wsgi)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('os.environ["A"]', {"A"}),
        ('os.environ.get("A", "1")', {"A"}),
        ('os.getenv("A")', {"A"}),
        ('environment.get("A")', {"A"}),
        ('typer.Option("--a", envvar="A")', {"A"}),
        ('WANTED = "OMNIOPS_A"', {"OMNIOPS_A"}),
        ('name.startswith("OMNIOPS_")', set()),
    ],
)
def test_reading_is_seen(source, names):
    assert _read_by(source) == names
