"""Files, patterns and lists of files that commands read."""

import io

import pytest

from omniops.cli.errors import CommandError
from omniops.cli.sources import expand_sources


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.jpg", "c.png", "deep/er/d.jpg", "odd[1].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_patterns_are_expanded_in_order_of_names():
    assert expand_sources(["c.png", "?.jpg"]) == ["c.png", "a.jpg", "b.jpg"]
    assert expand_sources(["**/d.jpg"]) == ["deep/er/d.jpg"]


def test_a_file_that_looks_like_a_pattern_is_that_file():
    assert expand_sources(["odd[1].jpg"]) == ["odd[1].jpg"]


def test_urls_are_no_patterns():
    assert expand_sources(["https://example.org/live?camera=1"]) == ["https://example.org/live?camera=1"]


def test_a_pattern_that_finds_nothing_is_named():
    with pytest.raises(CommandError, match=r"nothing there is called \*\.tiff"):
        expand_sources(["*.tiff"])


def test_lists_follow_the_arguments(monkeypatch, folder):
    (folder / "list.txt").write_text("b.jpg\n\nodd[1].jpg\n")
    assert expand_sources(["a.jpg"], "list.txt") == ["a.jpg", "b.jpg", "odd[1].jpg"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a.jpg\0with\nline.jpg\0"))
    assert expand_sources([], "-") == ["a.jpg", "with\nline.jpg"]


def test_lists_that_cannot_be_read_are_named(monkeypatch):
    with pytest.raises(CommandError, match=r"--files-from none\.txt: No such file or directory"):
        expand_sources([], "none.txt")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(CommandError, match="--files-from -: no path in it"):
        expand_sources([], "-")


def test_nothing_at_all_is_an_error():
    with pytest.raises(CommandError, match="nothing to read"):
        expand_sources([])
