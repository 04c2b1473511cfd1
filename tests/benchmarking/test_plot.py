"""The plot of the operators' times."""

from matplotlib.figure import Figure

from omniops.benchmarking import plot
from omniops.benchmarking.contenders import DIRECTIONS, FLOOR, FORWARD, OURS
from omniops.benchmarking.operators import Result
from omniops.cli.cases import carafe as case

SHAPE = (1, 256, 100, 152)
BARE = "bare autograd.Function"


def test_nothing_in_the_plot_lies_over_another(monkeypatch, tmp_path):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or save(self, path))
    results = [
        Result("carafe", SHAPE, dtype, direction, contender, "call", median, 0.9 * median, 1.2 * median, 5)
        for direction in DIRECTIONS
        for dtype in ("float32", "float16", "bfloat16")
        for contender, median in ((OURS, 0.1), (FLOOR, 0.01), ("bilinear", 9.0))
    ]
    results.append(Result("carafe", SHAPE, "float32", FORWARD, "mmcv, elsewhere", "", 0.5, measured=False))
    results += [
        Result("carafe", case.host_shape("cpu"), "float32", direction, contender, "host", 0.03, 0.02, 0.04, 5)
        for direction in DIRECTIONS
        for contender in (OURS, "bilinear", BARE)
    ]
    plot.draw(results, "a subtitle " * 8, "from elsewhere " * 8, tmp_path / "plot.png")
    (figure,) = figures
    titles = [figure._suptitle, figure._supxlabel]
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    panels = [axis for axis in figure.axes if axis.axison]
    figure.canvas.draw()
    assert [panel.get_xlabel() for panel in panels] == ["ms", "ms", "microseconds", "microseconds"]
    assert "30.0" in [text.get_text() for text in panels[2].texts]
    assert {"10", "100"} <= {label.get_text() for label in panels[2].get_xticklabels()}
    assert len(legends) == 1
    assert [text.get_text() for text in legends[0].get_texts()] == [FLOOR, "float32", "float16", "bfloat16"]
    assert [panel.get_title(loc="left").endswith("the host") for panel in panels] == [False, False, True, True]
    boxes = [artist.get_window_extent() for artist in (*titles, *legends)]
    boxes += [panel.get_tightbbox() for panel in panels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    for panel in panels:
        bottom, top = panel.get_ylim()
        assert all(top < line.get_ydata()[0] < bottom for line in panel.lines if line.get_marker() == "o")
        assert panel.get_xscale() == "log"
        assert not panel.patches  # no bars
