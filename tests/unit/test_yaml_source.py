"""YAML with lines: the data that Prefect sees, and the line of each value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tidepool.deploy.config import yaml_source
from tidepool.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
TEXT = """\
definitions:
  base: &base
    name: kubernetes
    size: 1
  extra: &extra {size: 2, zone: a}
deployments:
  - name: one
    pool: *base
  - name: two
    pool:
      <<: [*base, *extra]
      name: other
    tags: [a,
      b]
"""


def read(folder: Path, text: str) -> yaml_source.YamlFile:
    (folder / "file.yaml").write_text(text)
    return yaml_source.read(folder / "file.yaml", "file.yaml")


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ((), 1),
        (("deployments",), 6),
        (("deployments", 0), 7),
        (("deployments", 0, "pool"), 8),
        (("deployments", 0, "pool", "size"), 4),  # at the anchor
        (("deployments", 1, "pool", "name"), 12),  # its own, not the merged one
        (("deployments", 1, "pool", "size"), 4),  # of several merged mappings, the first wins
        (("deployments", 1, "pool", "zone"), 5),
        (("deployments", 1, "tags", 1), 14),
        (("deployments", 1, "tags", 7, "x"), 13),  # does not exist: the list that would hold it
    ],
)
def test_line_of_a_value(tmp_path: Path, place: yaml_source.Place, line: int) -> None:
    assert read(tmp_path, TEXT).line(place) == line


def test_data_is_what_prefect_deploy_reads(tmp_path: Path) -> None:
    scalars = "[on, off, yes, y, 0o7, 010, 1:30, 1e5, 2026-01-01, 2026-01-01 10:00:00, ~, .inf, 1_000]"
    for text in (TEXT, f"key: {scalars}\n1: 2\n", "!!set {a, b}", "", *(_own_files())):
        data = read(tmp_path, text).data
        assert repr(data) == repr(yaml.safe_load(text))


def _own_files() -> list[str]:
    files = ["prefect.yaml", "automations.yaml", "environments/local.yaml", "environments/staging.yaml"]
    return [(REPOSITORY / name).read_text() for name in files]


def test_all_duplicate_keys_are_found_at_once(tmp_path: Path) -> None:
    file = read(tmp_path, "a: &a\n  x: 1\n  x: 2\n  x: 3\nb: {y: 1, y: 2}\nc: *a\nd:\n  <<: *a\n  x: 4\nb: 1\n")
    assert [str(problem) for problem in file.duplicates] == [
        "file.yaml:3: a.x: duplicate key (first at line 2)",
        "file.yaml:4: a.x: duplicate key (first at line 2)",
        "file.yaml:5: b.y: duplicate key (first at line 5)",
        "file.yaml:10: b: duplicate key (first at line 5)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: ]", r"^file\.yaml:2: invalid YAML: "),
        ("a: 1\n\tb: 2\n", r"^file\.yaml:2: invalid YAML: "),
        ("a: *missing\n", r"^file\.yaml:1: invalid YAML: found undefined alias"),
        ("a: !!python/name:os.system\n", r"^file\.yaml:1: invalid YAML: could not determine a constructor"),
        ("a: \x07\n", r"^file\.yaml:1: invalid YAML: "),
        ("a: 2026-13-01\n", r"^file\.yaml:1: invalid YAML: month must be in 1\.\.12"),
    ],
)
def test_invalid_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(b"\xff")
    for path in (tmp_path / "file.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(UsageError, match=r"^file\.yaml:1: cannot be read: "):
            yaml_source.read(path, "file.yaml")
