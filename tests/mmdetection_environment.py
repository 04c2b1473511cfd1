"""An environment of their own for tests that need MMDetection from PyPI, made once for all of them.

PyTorch, torchvision and what they need are not downloaded again: the environment links to those that run the tests.
"""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from filelock import FileLock  # which PyTorch needs

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build/environments/mmdetection"
SHARED = ("omniops", "torch", "torchvision", "pytest", "hypothesis", "matplotlib", "setuptools")
INSTALLED = ("mmdet==3.3.0", "mmcv-lite==2.1.0")


@pytest.fixture(scope="session")
def python():
    """The environment's interpreter."""
    pytest.importorskip("torchvision", reason="MMDetection needs torchvision, which the environment would share")
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(ENVIRONMENT.with_suffix(".lock")):  # other files' tests may run beside
        return _make()


def _make():
    links = _links(_needed(SHARED))
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    made = ENVIRONMENT / "made"
    wanted = "\n".join([sys.version, *INSTALLED, *sorted(map(str, links.values()))])
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        run(sys.executable, "-m", "venv", ENVIRONMENT)
        shared = ENVIRONMENT / "shared"
        for name, target in links.items():
            (shared / name).parent.mkdir(parents=True, exist_ok=True)
            (shared / name).symlink_to(target)
        (packages,) = ENVIRONMENT.glob("**/site-packages")
        line = f"import site; site.addsitedir({str(shared)!r})\n"
        (packages / "shared.pth").write_text(line, encoding="utf-8")
        run(python, "-m", "pip", "install", "--quiet", *INSTALLED)
        made.write_text(wanted, encoding="utf-8")
    return python


def _needed(names):
    """The distributions of those names, and all that they need here."""
    found = {}
    names = list(names)
    while names:
        name = names.pop()
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another system
            continue
        needed = (requirement for requirement in found[name].requires or () if "extra ==" not in requirement)
        names += [name for requirement in needed if (name := _name(re.match(r"[\w.-]+", requirement)[0])) not in found]
    return found.values()


def _name(written):
    return re.sub(r"[-_.]+", "-", written).lower()


def _links(distributions):
    """What of site-packages holds the distributions: name in there, and path."""
    links = {}
    for package in distributions:
        for file in package.files or ():
            name = file.parts[0]
            if name not in ("..", "__pycache__"):
                links[name] = Path(package.locate_file(name)).resolve()
    return links


def run(*command, **options):
    """What a command prints; it must end with status 0."""
    command = list(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **options})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
