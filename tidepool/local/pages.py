"""The pages of `docs/` in a browser: where the links of reports, descriptions and automations lead on this machine."""

from __future__ import annotations

import html
import threading
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

from tidepool.web_server import WebServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Wide enough for the tables; light or dark as the browser is.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ padding: .8rem; overflow-x: auto; background: #8882 }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #8888; padding: .3rem .6rem; text-align: left; vertical-align: top }}
</style></head><body>
{body}</body></html>
"""


class Pages(WebServer):
    """A web server with the Markdown files below `docs/` of a repository, as HTML, for this machine only.

    Args:
        repository: The folder that holds `docs/`.
        port: Port to listen at.
    """

    def __init__(self, repository: Path, port: int) -> None:
        self._repository = repository.resolve()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The address of the repository's files, as TIDEPOOL_REPOSITORY_URL has it."""
        return f"http://127.0.0.1:{self.server_port}"

    def page(self, path: str) -> str | None:
        """Return the page of a path, such as `/docs/runbooks/run-failed.md`; None if there is none."""
        file = (self._repository / unquote(urlsplit(path).path).lstrip("/")).resolve()
        if file.suffix != ".md" or not file.is_relative_to(self._repository / "docs") or not file.is_file():
            return None
        body = MarkdownIt("js-default").render(file.read_text(encoding="utf-8"))
        return _PAGE.format(title=html.escape(file.stem), body=body)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    server: Pages
    # A client that sends nothing keeps its thread no longer.
    timeout = 60

    def do_GET(self) -> None:
        page = self.server.page(self.path)
        body = (page or "the pages are the Markdown files of docs/\n").encode()
        self.send_response(HTTPStatus.OK if page else HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", f"text/{'html' if page else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log no request."""


@contextmanager
def served(repository: Path, port: int) -> Iterator[str]:
    """Serve the pages of a repository for the duration of the block; yield the address of its files."""
    with Pages(repository, port) as pages:
        thread = threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield pages.url
        finally:
            pages.shutdown()
            thread.join()
