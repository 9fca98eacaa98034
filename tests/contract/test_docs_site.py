"""Every page is in the site of docs/, and each link leads somewhere: in the Markdown as on GitHub, and in the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

TOP = Path(__file__).parents[2]
ADDRESS = "https://git.example.com/tidepool/blob/main"


def listed() -> list[Path]:
    """Files of a fresh clone, and new ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout.splitlines()
    return [TOP / name for name in names if (TOP / name).is_file()]


MARKDOWN = sorted(path for path in listed() if path.suffix == ".md")
PAGES = [path for path in MARKDOWN if not path.name.endswith(".in.md") and ".github" not in path.parts]


def tokens(path: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or []


@cache
def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    previous = None
    for token in tokens(path):
        if previous is not None and previous.type == "heading_open":
            text = "".join(each.content for each in token.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = sum(1 for each in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
            found.append(f"{slug}-{count}" if count else slug)
        previous = token
    return set(found)


def dead(path: Path) -> list[str]:
    """Links and pictures of a Markdown file that lead nowhere on GitHub."""
    found = []
    files = set(listed())
    folders = {parent for file in files for parent in file.parents}
    for token in tokens(path):
        link = str(token.attrGet("href") or token.attrGet("src") or "")
        parts = urlsplit(link)
        if not link or parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        # A file that Git ignores, or that only this machine has, is not on GitHub.
        exists = target in files or target in folders or target == path
        if not exists or (parts.fragment and parts.fragment not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(TOP)))
def test_links_of_the_markdown_lead_somewhere(path: Path) -> None:
    assert dead(path) == []


def test_a_dead_link_of_the_markdown_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# A `b` c: d\n\n## Twice\n\n## Twice\n\n[1](#a-b-c-d) [2](#twice-1) [3](#twice-2) [4](b.md) ![5](c.png)\n"
    )
    assert dead(tmp_path / "a.md") == ["#twice-2", "b.md", "c.png"]


class Page(HTMLParser):
    """Ids of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        self.links += [values["href"] or ""] if tag == "a" and "href" in values else []
        source = values.get("src") or (values.get("href") if tag == "link" else None)
        self.loads += [source] if source else []


def build(folder: Path, address: str) -> Path:
    """Build the site as `make docs` does."""
    makefile = (TOP / "Makefile").read_text(encoding="utf-8")
    arguments = re.search(r"-m sphinx (-c docs .*) --doctree-dir \S+ \. build/docs$", makefile, re.MULTILINE)
    assert arguments, "Makefile: docs"
    site = folder / "site"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        *arguments[1].split(),
        "--doctree-dir",
        str(folder / "trees"),
        ".",
        str(site),
    ]
    done = subprocess.run(
        command,
        cwd=TOP,
        env={**os.environ, "TIDEPOOL_REPOSITORY_URL": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("docs"), "")


def html(site: Path, page: Path) -> Path:
    return site / page.relative_to(TOP).with_suffix(".html")


def test_every_page_is_in_the_site(site: Path) -> None:
    assert [str(page.relative_to(TOP)) for page in PAGES if not html(site, page).is_file()] == []
    # And no other Markdown, such as that of a package in .venv.
    expected = {html(site, page) for page in PAGES} | {
        site / f"{name}.html" for name in ("index", "search", "genindex")
    }
    assert set(site.rglob("*.html")) == expected


def test_links_of_the_site_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += [f"{path.name} loads {link}"] if link in page.loads and parts.scheme != "data" else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].ids if target in pages else set()
            if not target.is_file() or (parts.fragment and parts.fragment not in known):
                found.append(f"{path.relative_to(site)}: {link}")
    assert len(pages) > 50
    assert found == []


def test_a_file_that_is_not_a_page_is_a_link_to_the_repository_or_a_copy(site: Path, tmp_path: Path) -> None:
    copy = next(link for link in Page(html(site, TOP / "README.md")).links if link.endswith("/prefect.yaml"))
    assert (site / copy).read_bytes() == (TOP / "prefect.yaml").read_bytes()
    folder = "helm/tidepool/files/dashboards"
    assert not [link for link in Page(html(site, TOP / "docs/dashboards.md")).links if link.endswith(folder)]

    linked = build(tmp_path, ADDRESS)
    assert f"{ADDRESS}/prefect.yaml" in Page(html(linked, TOP / "README.md")).links
    assert f"{ADDRESS}/{folder}" in Page(html(linked, TOP / "docs/dashboards.md")).links
    assert not (linked / "_downloads").exists()


def test_the_menu_is_that_of_the_index(site: Path) -> None:
    menu = (
        html(site, TOP / "README.md").read_text(encoding="utf-8").split('class="sidebar-tree"', 1)[1].split("</div>")[0]
    )
    sections = re.findall(r"^## (.+)$", (TOP / "docs" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    captions = re.findall(r'class="caption-text">([^<]+)<', menu)
    assert captions == sections
    last = menu.split(f">{sections[-1]}<")[1]
    for page in ("CONTRIBUTING", "docs/glossary", "CHANGELOG", "docs/decisions/0001-record-decisions"):
        assert f'href="{page}.html"' in last, "a link to a part of a page, in another section, is not its place"


def test_anchors_of_the_site_are_those_of_github(site: Path) -> None:
    for page in PAGES:
        assert anchors(page) <= Page(html(site, page)).ids, page
