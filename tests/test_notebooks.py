"""The notebooks of examples/ run from their first cell to their last."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the notebooks draw")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "examples/notebooks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the notebooks are not beside the tests")
NEEDED = {"sam2": "av"}


def test_they_are_all_here():
    assert {path.stem for path in FOLDER.iterdir()} == {"operators", "sam2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["operators", "sam2"])
def test_it_runs(name, capsys, monkeypatch, tmp_path):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes))
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    namespace = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), namespace)
    plt.close("all")
    if name == "operators":
        assert namespace["losses"][-1] < 0.6 * namespace["losses"][0]
        assert len(shown) == 1
    else:
        assert namespace["masks"].shape == (3, 120, 160)
        assert [len(axes) for axes in shown] == [3, 8]
