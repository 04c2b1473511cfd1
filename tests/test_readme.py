"""The examples of README and of the documentation's pages run as printed."""

import re
from collections import Counter
from pathlib import Path

import pytest
from example_needs import missing, needs, unmet

import omniops

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
BLOCKS = {
    f"{page.relative_to(ROOT)}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M))
}

pytestmark = pytest.mark.skipif(len(PAGES) < 2, reason="README.md and docs/ are not beside the tests")


def test_every_page_with_code_has_examples_that_run():
    """So that none is lost unseen: the numbers are those of the pages."""
    assert Counter(name.rpartition("-")[0] for name in BLOCKS) == {
        "README.md": 5,
        "docs/index.md": 4,
        "docs/enable.md": 4,
        "docs/export.md": 3,
        "docs/networks.md": 4,
        "docs/detection.md": 2,
        "docs/sam2.md": 8,
        "docs/operators/carafe.md": 2,
        "docs/operators/connected_components.md": 2,
        "docs/operators/deform_conv2d.md": 1,
        "docs/operators/multi_scale_deform_attn.md": 1,
    }
    assert Counter(need for block in BLOCKS.values() for need in needs(block)) == {"the network": 3}


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_run_and_print_what_they_say(capsys, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    block = BLOCKS[name]
    code = compile(block, name, "exec")
    if unmet(block):
        return
    if missing(block):
        pytest.skip(f"the example needs {', '.join(missing(block))}")
    try:
        exec(code, {})
    finally:
        omniops.disable()
    said = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
