"""How Sphinx builds the documentation site. `make docs` runs it, where every warning is an error."""

from importlib import metadata

project = "omniops"
author = "omniops contributors"
project_copyright = f"2026, {author}"
release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # as GitHub makes them, so that links work there and here

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100

html_theme = "pydata_sphinx_theme"
html_title = f"omniops {release}"
html_favicon = "../src/omniops/server/page/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
