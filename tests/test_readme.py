"""README's examples run as printed."""

import re
from pathlib import Path

import pytest

import omniops

README = Path(__file__).parents[1] / "README.md"


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
def test_it_has_examples():
    assert len(BLOCKS) == 7


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_its_examples_run_and_print_what_they_say(capsys, block):
    if "omniops.sam2" in block:
        pytest.importorskip("transformers", reason="omniops.sam2 needs transformers")
    try:
        exec(block, {})
    finally:
        omniops.disable()
    said = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
