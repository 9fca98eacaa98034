# ruff: noqa: INP001 - Sphinx reads this file; it is not a package
"""The site of these pages, which `make docs` builds with Sphinx from the Markdown as it is (decision 0115).

Sphinx reads the whole repository, because pages of docs/ link to others outside of it. A link to a file that is not a
page leads to the repository (TIDEPOOL_REPOSITORY_URL), or to a copy of the file if that is not set.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx import addnodes

from tidepool.settings import settings

if TYPE_CHECKING:
    from sphinx.application import Sphinx

TOP = Path(__file__).parents[1]

project = "tidepool"
html_title = "tidepool"
release = metadata.version("tidepool")
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "benchmarks/results/*.md", "helm/tidepool/README.md", "k8s/README.md"]
exclude_patterns = ["**.in.md", ".*", "**/.*", "build", "tests", "tidepool", "flows", "samples"]

# Anchors as GitHub makes them, of headings of every level.
myst_heading_anchors = 6
myst_heading_slug_func = "github"
# Code without a language is not highlighted.
highlight_language = "none"

# `--watch` and the quotes of a message stay what they are.
smartquotes = False

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# Pages that no list of docs/README.md has, below one that has them as its subject.
BELOW = {
    "docs/alerts": "docs/runbooks/*",
    "docs/decisions/0001-record-decisions": "docs/decisions/*",
    "docs/measured": "benchmarks/results/*",
}
# Not a link to a part of a page, which is listed elsewhere.
_ADDRESS = re.compile(r"\]\(([^)#\s]+\.md)\)")


def menu() -> str:
    """Return the tables of contents of docs/README.md: one for each of its sections, in its order."""
    trees = [_tree("", ["docs/README"])]
    listed = {"docs/README"}
    text = (TOP / "docs" / "README.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        found = [
            str((TOP / "docs" / link).resolve().relative_to(TOP)).removesuffix(".md") for link in _ADDRESS.findall(body)
        ]
        pages = [page for page in dict.fromkeys(found) if page not in listed and not _is_below(page)]
        listed.update(pages)
        trees.append(_tree(title, pages))
    return "\n".join(trees)


def _is_below(page: str) -> bool:
    folder = page.rpartition("/")[0]
    return any(page != top and pattern == f"{folder}/*" for top, pattern in BELOW.items())


def _tree(title: str, pages: list[str]) -> str:
    caption = [f":caption: {title}"] if title else []
    return "\n".join(["", "```{toctree}", ":hidden:", ":glob:", *caption, "", *map("/{}".format, pages), "```"])


def add_menu(_app: Sphinx, page: str, source: list[str]) -> None:
    """Add the tables of contents to the pages that have one; GitHub would show them as code."""
    if page == root_doc:
        source[0] += menu()
    elif page in BELOW:
        source[0] += _tree("", [BELOW[page]])


def link_files(app: Sphinx, document: nodes.document) -> None:
    """Let links to files and folders that are not pages lead to the repository; without its address, to a copy."""
    repository = settings().repository.url
    for node in list(document.findall(addnodes.download_reference)) + list(document.findall(addnodes.pending_xref)):
        _, name = app.env.relfn2path(node["reftarget"], app.env.docname)
        path = Path(name)
        folder = isinstance(node, addnodes.pending_xref)
        if folder and (node["refdomain"] or not path.is_dir() or not path.is_relative_to(TOP)):
            continue
        if repository:
            address = f"{repository}/{path.relative_to(TOP)}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=address))
        elif folder:
            node.replace_self(node.children)


def add_start(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which a web server and a person look for: it leads to the start page."""
    if error is None:
        start = f'<!doctype html><title>tidepool</title><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (app.outdir / "index.html").write_text(start, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", add_menu)
    # Before Sphinx collects the files to copy.
    app.connect("doctree-read", link_files, priority=400)
    app.connect("build-finished", add_start)
