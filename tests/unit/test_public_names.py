"""The public names of `tidepool.compute`, from where README says."""

from __future__ import annotations

import re
from pathlib import Path

from tidepool import compute

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_public_name_exists() -> None:
    homes = {getattr(compute, name).__module__ for name in compute.__all__}
    assert homes == {"tidepool.compute.batches", "tidepool.compute.providers"}


def test_the_functions_that_the_readme_names_are_public() -> None:
    named = set(re.findall(r"`[^`\n]*?\b(dask_\w+|map_\w+|use_\w+)\(", README))
    assert named >= {"dask_client", "dask_runner", "map_batched"}
    assert named <= set(compute.__all__)
