"""The files that a flow has written, apart from the results that Prefect keeps for a retry."""

from __future__ import annotations

from tidepool import storage


def outputs(root: str) -> list[str]:
    """Return the URLs of all files below a storage root that are not below its `results/`, sorted."""
    return [url for url in storage.listing(root) if not url.startswith(f"{root}/results/")]
