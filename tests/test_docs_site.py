"""The site's builder takes links that lead nowhere for errors."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

pytestmark = [
    pytest.mark.skipif(not DOCS.exists(), reason="docs/ is not beside the tests"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Check CHANGES for Sphinx API"),  # of MyST's calls of Sphinx
]

RIGHT = """# First

[itself](index.md#second) [a file](figures.json)

## Second
"""
OTHERS = {"tools/vos_inference.py"}  # of the official SAM 2 package
WRONG = {
    "[a page](nowhere.md)": "nowhere.md",
    "[a heading](index.md#third)": "third",
    "![a picture](nowhere.png)": "nowhere.png",
}


def _build(folder, page):
    """The builder's status for a site of one page, and what it says; it checks without writing pages."""
    build = pytest.importorskip("sphinx.cmd.build", reason="the site is built by Sphinx")
    source = folder / "docs"
    source.mkdir()
    (source / "index.md").write_text(page)
    (source / "figures.json").write_text("{}")
    warnings = folder / "warnings"
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--warning-file", str(warnings)]
    status = build.build_main(["-b", "dummy", "-c", str(DOCS), *options, str(source), str(folder / "site")])
    return status, warnings.read_text()


def test_a_page_with_links_that_lead_somewhere_is_right(tmp_path):
    assert _build(tmp_path, RIGHT) == (0, "")


@pytest.mark.parametrize("link", WRONG)
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, link):
    status, warnings = _build(tmp_path, RIGHT.replace("## Second", f"{link}\n\n## Second"))
    assert status == 1
    assert WRONG[link] in warnings
    assert len(warnings.splitlines()) == 1


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_pictures_are_the_sites_own(page):
    """So that pages open without a network."""
    assert re.findall(r"!\[[^\]]*\]\((https?:[^)]*)", page.read_text(encoding="utf-8")) == []


def _anchors(page):
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", ".github/PULL_REQUEST_TEMPLATE.md"]
)
def test_links_of_what_is_beside_the_site_lead_somewhere(name):
    """Sphinx reads the pages in docs/ alone."""
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or anchor in _anchors(page.parent / path), target


def _files_of_the_house(page):
    """Files that a page names by folder and name, as ``sam2/modeling/hiera.py``; not those of a pattern."""
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|h|metal|cpp|yml|svg))`", page.read_text(encoding="utf-8"))
    return {name for name in named if name not in OTHERS}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_file_that_a_page_names_is_there(page):
    """From the root, src/ or src/omniops/."""
    folders = [ROOT, ROOT / "src", ROOT / "src" / "omniops"]
    missing = [name for name in _files_of_the_house(page) if not any((folder / name).exists() for folder in folders)]
    assert missing == []


def test_every_room_that_the_house_names_is_there():
    """CONTRIBUTING.md's picture of the folders, and no folder of the package that it leaves out."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text.partition("## The house")[2].partition("Imports go one way")[0]
    named = set()
    for line in house.splitlines():
        folder = ROOT / "src" / "omniops" if line.startswith("      ") else ROOT
        if re.match(r" {4}(  )?[\w./]+", line):
            named |= {folder / name for name in re.match(r" +((?:[\w./]+(?:, )?)+)", line)[1].split(", ")}
    assert [path for path in named if not path.exists()] == []
    rooms = {path.parent for path in (ROOT / "src" / "omniops").glob("*/__init__.py")}
    assert {room.name for room in rooms if not any(room in (path, *path.parents) for path in named)} == set()


def _imported_rooms(path):
    """The folders and files right under src/omniops that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (module.split(".")[1] for module in modules if re.match(r"omniops\.\w", module))


def test_imports_go_the_way_that_the_house_says():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    way, for_all = re.search(r"Imports go one way: (.*?);\n(.*?) are for all of them", text, re.DOTALL).groups()
    storeys = [storey.split(", ") for storey in way.split(" -> ")]
    ground = re.split(r", | and ", for_all)
    below = {
        room: {other for others in storeys[height + 1 :] for other in others} | {*ground}
        for height, storey in enumerate(storeys)
        for room in storey
    } | {room: set() for room in ground}
    package = ROOT / "src" / "omniops"
    for room, allowed in below.items():
        files = [package / f"{room}.py"] if (package / f"{room}.py").exists() else [*(package / room).rglob("*.py")]
        assert files, room
        rooms = {imported for path in files for imported in _imported_rooms(path)} & {*below}
        assert rooms - {room} <= allowed, room
