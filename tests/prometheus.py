"""Debian's Prometheus on this machine, which scrapes pages and evaluates alert rules every second."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.polling import until
from tidepool.local.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Prometheus:
    """A Prometheus that scrapes some pages.

    Args:
        url: Its address.
        pages: Number of pages.
    """

    def __init__(self, url: str, pages: int) -> None:
        self.url = url
        self._pages = pages

    def query(self, expr: str) -> list[Any]:
        """Return the series that an expression has now."""
        return list(self._get("query", query=expr)["result"])

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """Return the alerts of a name that fire, with labels and annotations."""
        found = self._get("alerts")["alerts"]
        return [each for each in found if each["labels"]["alertname"] == name and each["state"] == "firing"]

    def scraped(self) -> int:
        """Return how often every page was scraped; 0 before the first time."""
        try:
            found = self.query("count_over_time(up[1h])")
        except httpx.HTTPError:
            return 0
        return min((int(each["value"][1]) for each in found), default=0) if len(found) == self._pages else 0

    def scrape(self) -> None:
        """Wait until the pages as they are now were scraped twice."""
        before = self.scraped()
        until(self.scraped, lambda now: now >= before + 3)

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]


@contextmanager
def prometheus(folder: Path, rules: Path, *pages: int) -> Iterator[Prometheus]:
    """Run a Prometheus with a file of rules, for pages at these ports; its files are in the folder."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": f"page-{port}", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for port in pages
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    options = (f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(("prometheus", *options, f"--web.listen-address={address}"), stdout=log, stderr=log)
        try:
            yield Prometheus(f"http://{address}", len(pages))
        finally:
            process.terminate()
            process.wait(30)
