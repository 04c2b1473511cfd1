"""README's examples run as printed."""

import re
from pathlib import Path

import pytest

import omniops

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
def test_its_examples_run_and_print_what_they_say(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        try:
            exec(block, {})
        finally:
            omniops.disable()
        said = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == said
