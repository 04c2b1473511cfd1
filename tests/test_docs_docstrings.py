"""Every public function and class has an example in its docstring, and the examples run as printed."""

import doctest
import functools
import importlib
import inspect
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from example_needs import missing, needs, unmet
from PIL import Image

import omniops

API = Path(__file__).parents[1] / "docs" / "api"
MODULES = (
    "omniops",
    "omniops.nn",
    "omniops.detection",
    "omniops.detection.training",
    "omniops.sam2",
    "omniops.sam2.training",
    "omniops.device",
    "omniops.export",
    "omniops.export.detection",
    "omniops.export.sam2",
    "omniops.onnx",
)
# What device.py has for the other modules.
INTERNAL = {"exclusively", "without_single_row"}


def _public(module):
    """The functions and classes of a module's public names; of two names of one the first, exceptions not."""
    members = vars(module)
    names = members.get("__all__") or [
        name
        for name, value in members.items()
        if getattr(value, "__module__", "") == module.__name__ and name[0] != "_" and name not in INTERNAL
    ]
    found = {name: getattr(module, name) for name in sorted(names)}
    return {
        name: value
        for name, value in found.items()
        if inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, Exception))
    }


def _all_public():
    """Each once, under the shortest of the names."""
    listed, found = set(), {}
    for module in map(importlib.import_module, MODULES):
        for name, value in _public(module).items():
            if value not in listed:
                listed.add(value)
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = _all_public()
# What a reader of the examples imports, besides what they import themselves.
GLOBALS = {
    "omniops": omniops,
    "torch": torch,
    "nn": torch.nn,
    "np": numpy,
    "tempfile": tempfile,
    "Image": Image,
    "replace_upsampling": omniops.nn.replace_upsampling,
}


def _doctest(name, value):
    module = importlib.import_module(value.__module__)
    names = {**vars(module), **GLOBALS}
    return doctest.DocTestParser().get_doctest(inspect.getdoc(value), names, name, inspect.getsourcefile(value), 0)


def _check(name, value):
    test = _doctest(name, value)
    source = "".join(example.source for example in test.examples)
    assert source, f"the docstring of {name} has no example"
    compile(source, name, "exec")
    if unmet(source):
        return
    if missing(source):
        pytest.skip(f"the example needs {', '.join(missing(source))}")
    said = []
    try:
        failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append).failed
    finally:
        omniops.disable()
    assert failed == 0, "".join(said)


def _in_the_reference():
    """The names that the reference describes."""
    found = set()
    for page in API.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        found.update(re.findall(r"^\.\. (?:autofunction|autoclass|py:function|py:class):: ([\w.]+)", text, re.M))
        for module, members in re.findall(r"^\.\. automodule:: ([\w.]+)\n   :members: (.*)$", text, re.M):
            found.update(f"{module}.{name}" for name in members.split(", "))
    return found


@pytest.mark.skipif(not API.exists(), reason="docs/ is not beside the tests")
def test_the_reference_has_every_public_name():
    found = _in_the_reference()
    for module in map(importlib.import_module, MODULES):
        names = {f"{module.__name__}.{name}" for name in _public(module)}
        # The modules that are names of omniops too are described under omniops.nn.
        other = {f"omniops.nn.{name.rpartition('.')[2]}" for name in names if module is omniops} & found
        left_out = {name for name in names - found if f"omniops.nn.{name.rpartition('.')[2]}" not in other}
        assert left_out == set()


def test_what_an_example_needs_is_counted():
    unrun = Counter(need for value in PUBLIC.values() for need in needs(inspect.getdoc(value)))
    assert unrun == {"the network": 4}


@pytest.fixture(scope="module")
def models():
    """What loads a model of SAM 2 once for all examples that only need one."""
    return functools.cache(omniops.sam2.load)


# remote starts a process, and FSDP2 loads much of PyTorch, which takes seconds.
SLOW = {"omniops.sam2.remote", "omniops.sam2.training.fully_shard_step"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PUBLIC]
)
def test_the_docstring_has_an_example_that_runs(name, models, monkeypatch):
    monkeypatch.setattr(omniops.sam2, "load", models)
    _check(name, PUBLIC[name])
