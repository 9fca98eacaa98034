"""Compare two runs of prefect-dask's own tests: `python -m tests.prefect_dask.compare STOCK.xml OURS.xml`.

It prints a table of the tests whose outcomes differ, or which fail, and exits with 1 where ours is worse.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter

# From worse to better.
OUTCOMES = ["missing", "error", "failed", "skipped", "passed"]


def outcomes(path: str) -> dict[str, str]:
    """Return the outcome of each test in a JUnit file; the worst one, where a test has several."""
    names = {"failure": "failed", "error": "error", "skipped": "skipped"}
    found: dict[str, str] = {}
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it just now
        outcome = next((names[each.tag] for each in case if each.tag in names), "passed")
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = min(found.get(name, outcome), outcome, key=OUTCOMES.index)
    return found


def main(stock_file: str, ours_file: str) -> int:
    """Print the comparison; return 1 if a test is worse with our runner, or none passed."""
    stock, ours = outcomes(stock_file), outcomes(ours_file)
    print("| test | stock | ours |\n|---|---|---|")
    worse = 0
    for name in sorted({*stock, *ours}):
        before, now = stock.get(name, "missing"), ours.get(name, "missing")
        worse += OUTCOMES.index(now) < OUTCOMES.index(before)
        if (before, now) != ("passed", "passed"):
            print(f"| {name} | {before} | {now} |")
    for kind, found in (("stock", stock), ("ours", ours)):
        print(f"\n{kind}: {dict(Counter(found.values()))}")
    print(f"\n{worse} of {len(ours)} tests are worse with our runner")
    return 1 if worse or "passed" not in ours.values() else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
