"""What the tests of omniops.enable share."""

import importlib
import sys

import pytest
from one_thread import one_thread as one_thread

import omniops
from omniops.dropin._mmcv import mmcv as _mmcv


@pytest.fixture
def mmcv():
    """``mmcv.ops`` of mmcv-lite, whose compiled module is ours."""
    pytest.importorskip("mmcv", reason="mmcv-lite is not installed")
    was = _mmcv.enabled()
    _mmcv.enable(None)
    yield importlib.import_module("mmcv.ops")
    if not was:
        _mmcv.disable()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes the modules of a project, by their paths, in a folder that is on sys.path; they are forgotten again.

    Packages get an empty __init__.py. What was imported under the same names comes back in the end.
    """
    monkeypatch.syspath_prepend(tmp_path)
    away, names = {}, set()

    def write(files):
        for path, text in files.items():
            top = path.partition("/")[0].removesuffix(".py")
            if top not in names:
                names.add(top)
                away.update(_forget(top))
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            for folder in [parent for parent in file.parents if tmp_path in parent.parents]:
                (folder / "__init__.py").touch()
            file.write_text(text)
        importlib.invalidate_caches()
        return tmp_path

    yield write
    omniops.disable()
    for name in names:
        _forget(name)
    sys.modules.update(away)


def _forget(top):
    found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == top}
    for name in found:
        del sys.modules[name]
    return found
