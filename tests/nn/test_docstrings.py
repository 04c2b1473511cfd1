"""The examples in docstrings run as printed."""

import doctest
import importlib

import pytest
import torch

import omniops

EXAMPLES = {"omniops.nn.carafe": 2, "omniops.nn.deform_conv2d": 4, "omniops.nn.replace_upsampling": 1}

GLOBALS = {
    "omniops": omniops,
    "torch": torch,
    "nn": torch.nn,
    "replace_upsampling": omniops.nn.replace_upsampling,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(importlib.import_module(name), globs=GLOBALS)
    with_examples = [test for test in found if test.examples]
    assert len(with_examples) == EXAMPLES[name]
    runner = doctest.DocTestRunner()
    for test in with_examples:
        said = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)
