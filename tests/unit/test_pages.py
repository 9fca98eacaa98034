"""The pages of docs/ that the demo serves: as HTML, and nothing else of this machine."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tidepool.local.pages import served
from tidepool.local.server import free_port

TOP = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "docs" / "runbooks"
    folder.mkdir(parents=True)
    (folder / "a.md").write_text("# a <b>\n\n| x | y |\n|---|---|\n| [b](b.md) | 2 |\n\n```bash\nprefect x <id>\n```\n")
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "docs" / "secret.txt").write_text("secret")
    (tmp_path / "docs" / "away.md").symlink_to(tmp_path / "secret.md")
    return tmp_path


def test_a_runbook_is_a_page_with_its_links_tables_and_commands(repository: Path) -> None:
    with served(repository, free_port()) as url:
        page = httpx.get(f"{url}/docs/runbooks/a.md?x=1#y")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert '<a href="b.md">b</a>' in page.text
    assert "<td>2</td>" in page.text
    assert "prefect x &lt;id&gt;" in page.text
    assert "<b>" not in page.text


@pytest.mark.parametrize(
    "path", ["secret.md", "docs/secret.txt", "docs/away.md", "docs/../secret.md", "docs/%2e%2e/secret.md", "docs", ""]
)
def test_nothing_else_is_served(repository: Path, path: str) -> None:
    with served(repository, free_port()) as url:
        assert httpx.get(f"{url}/{path}").status_code == httpx.codes.NOT_FOUND


def test_every_runbook_of_this_repository_is_a_page_whose_tables_are_tables() -> None:
    with served(TOP, free_port()) as url, httpx.Client(base_url=url) as client:
        for path in sorted((TOP / "docs" / "runbooks").glob("*.md")):
            page = client.get(f"/docs/runbooks/{path.name}").raise_for_status().text
            assert "|---|" not in page, path.name
