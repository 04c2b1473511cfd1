"""The notebooks of examples/ run from their first cell to their last."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from mmdetection_environment import python as python
from mmdetection_environment import run

pytest.importorskip("matplotlib", reason="the notebooks draw")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "examples/notebooks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the notebooks are not beside the tests")
NEEDED = {"sam2": "av"}


def test_they_are_all_here():
    assert {path.stem for path in FOLDER.iterdir()} == {"mmdetection", "operators", "sam2"}


def _code(name):
    """The notebook's cells of code."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["operators", "sam2"])
def test_it_runs(name, capsys, monkeypatch, tmp_path):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for source in _code(name):
        exec(compile(source, f"{name}.ipynb", "exec"), namespace)
    plt.close("all")
    if name == "operators":
        assert namespace["losses"][-1] < 0.6 * namespace["losses"][0]
        assert len(shown) == 1
    else:
        assert namespace["masks"].shape == (3, 120, 160)
        assert [len(axes) for axes in shown] == [3, 8]


@pytest.mark.slow
def test_mmdetection_runs(python, tmp_path):
    """In an environment that has it: on the CPU, with random weights."""
    show = f"import matplotlib.pyplot as plt\nplt.show = lambda: plt.savefig({str(tmp_path / 'shown.png')!r})"
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([show, *_code("mmdetection")]), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "agg", "OMNIOPS_DEVICE": "cpu"}
    device, found, modules, dcn, detr, losses = run(python, script, cwd=tmp_path, env=environment).splitlines()
    assert (device, found) == ("cpu", "100 objects found on cpu")
    assert ast.literal_eval(modules) == {"CARAFEPack": 5}
    assert plt.imread(tmp_path / "shown.png").std() > 0.1
    for line, kind in ((dcn, "DeformConv2dPack"), (detr, "MultiScaleDeformableAttention")):
        assert re.search(rf": \d+ objects in [\d.]+ s, {{'{kind}': \d+}}$", line), line
    assert 0 < float(losses.rpartition(" ")[2]) < 100
