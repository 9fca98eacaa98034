"""YAML with lines: the data that Prefect sees, and the line of each value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tidepool.deploy.config import yaml_lines, yaml_source
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
def test_line_of_a_value(tmp_path: Path, place: yaml_lines.Place, line: int) -> None:
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
        ("a: 1\nb: ]", "file.yaml:2: invalid YAML: no value where one is expected"),
        ("a: 1\n\tb: 2\n", "file.yaml:2: invalid YAML: a line is indented by a tab; use spaces"),
        ("a:\n\tb: 2\n", "file.yaml:2: invalid YAML: a line is indented by a tab; use spaces"),
        (
            "x: &nightly 1\na: *nightli\n",
            "file.yaml:2: invalid YAML: no anchor &nightli above it; did you mean nightly?",
        ),
        (
            "a: 1\ncron: * * * * *\n",
            'file.yaml:2: invalid YAML: `*` begins an alias; put the text in quotes: "* * * * *"',
        ),
        ("a: @daily\n", "file.yaml:1: invalid YAML: a text cannot begin with @, % or `; put it in quotes"),
        (
            "a: 1\nb\nc: 1\n",
            "file.yaml:2: invalid YAML: no colon after a key, or a text of several lines without quotes",
        ),
        (
            "a: 1\nb: c: d\n",
            "file.yaml:2: invalid YAML: a second colon in one line; put the text in quotes, or begin a new line",
        ),
        (
            "a:\n  b: 1\n c: 2\n",
            "file.yaml:3: invalid YAML: the indentation does not fit the lines above, or a quote is not closed",
        ),
        ("a:\n  - b\n  c: 1\n", "file.yaml:3: invalid YAML: the indentation does not fit the items of the list above"),
        ('a: 1\nb: "c\nd: 1\n', "file.yaml:2: invalid YAML: a quote is not closed"),
        ("a: 1\nb: [c, d\ne: 1\n", "file.yaml:2: invalid YAML: a list that began with `[` is not closed"),
        ("a: 1\nb: {c: d\n", "file.yaml:2: invalid YAML: a mapping that began with `{` is not closed"),
        ("a: 1\nb: {{ c.d }}\n", 'file.yaml:2: invalid YAML: `{{ … }}` without quotes is a mapping; write "{{ … }}"'),
        ("a: 1\nb: [c]: d\n", None),
        ("a: &x\n  b: [*x]\n", "file.yaml:1: invalid YAML: an alias stands inside of its own anchor"),
        (
            "a: !!python/name:os.system\n",
            "file.yaml:1: invalid YAML: unknown tag; put a text that begins with `!` in quotes",
        ),
        ("a: 1\n---\nb: 1\n", "file.yaml:2: invalid YAML: a second document begins (`---`), and Prefect reads one"),
        ("a: \x07\n", None),
        ("a: 2026-13-01\n", "file.yaml:1: invalid YAML: month must be in 1..12"),
    ],
)
def test_invalid_yaml_is_one_sentence_with_its_line(tmp_path: Path, text: str, message: str | None) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert str(raised.value) == message or message is None
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("file.yaml") == 1


@pytest.mark.parametrize(
    ("location", "place"),
    [
        (("deployments", 1, "pool", "name"), ("deployments", 1, "pool", "name")),
        (("deployments", 0, "pool", "Pool", "size"), ("deployments", 0, "pool", "size")),  # a branch of a union
        (("deployments", 0, "tags"), ("deployments", 0, "tags")),  # a missing key
        (("deployments", 0, "name", "constrained-str"), ("deployments", 0, "name")),
    ],
)
def test_the_place_of_pydantics_errors(tmp_path: Path, location: yaml_lines.Place, place: yaml_lines.Place) -> None:
    assert yaml_source.place_in(read(tmp_path, TEXT).data, location) == place


def test_problems_are_refused_with_their_number(tmp_path: Path) -> None:
    file = read(tmp_path, TEXT)
    one, two = (file.problem(("deployments", index, key), "wrong") for index, key in ((0, "pool"), (1, "tags")))
    yaml_source.raise_if_any([])
    with pytest.raises(UsageError) as raised:
        yaml_source.raise_if_any([one])
    assert str(raised.value) == "1 problem:\n  file.yaml:8: deployments[one].pool: wrong"
    with pytest.raises(UsageError) as raised:
        yaml_source.raise_if_any([two, one, one], "nothing was written")
    assert str(raised.value).splitlines() == [
        "2 problems; nothing was written:",
        "  file.yaml:8: deployments[one].pool: wrong",
        "  file.yaml:13: deployments[two].tags: wrong",
    ]


def test_one_mistake_is_one_problem_with_all_deployments_that_have_it() -> None:
    def problem(name: str, line: int, key: str = "tags") -> yaml_source.Problem:
        return yaml_source.Problem("file.yaml", line, f"deployments[{name}].{key}", "wrong")

    def said(*problems: yaml_source.Problem) -> list[str]:
        return [str(each) for each in yaml_source.once(problems)]

    first = "file.yaml:4: deployments[a].tags: wrong"
    assert said(problem("a", 4), problem("b.c", 4)) == [f"{first} (also in deployments[b.c])"]
    assert said(problem("b", 9), problem("a", 4)) == [f"{first} (also in deployments[b] at line 9)"]
    three = "deployments[b] at line 5, deployments[c] at line 6, deployments[d] at line 7"
    more = [problem(name, 5 + index) for index, name in enumerate("bcdefg")]
    assert said(problem("a", 4), *more[:3]) == [f"{first} (also in {three})"]
    assert said(problem("a", 4), *more[:4]) == [f"{first} (also in {three} and 1 more at line 8)"]
    assert said(problem("a", 4), *more) == [f"{first} (also in {three} and 3 more at lines 8, 9, 10)"]
    same = [problem(name, 4) for name in "bcde"]
    assert said(problem("a", 4), *same) == [
        f"{first} (also in deployments[b], deployments[c], deployments[d] and 1 more)"
    ]
    # Two keys of one deployment, and the same words about something else, are mistakes of their own.
    assert said(problem("a", 4), problem("a", 5, "x.tags")) == [first, "file.yaml:5: deployments[a].x.tags: wrong"]
    assert said(problem("a", 4), problem("b", 5, "x.tags")) == [first, "file.yaml:5: deployments[b].x.tags: wrong"]


ANCHORS = """\
definitions:
  tags: &tags [a]
  base: &base {size: 1}
  all: &all {zone: a}
  cron: &cron "9"
deployments:
  - name: one
    <<: *base
    tags: *tags
    rows: [*all,
      *all]
  - <<: *base
    name: two
    tags:
      *tags
    rows:
      - *all
    cron: *cron
    other: &late {x: 1}
    only: {<<: *late}
"""


@pytest.mark.parametrize(
    ("places", "lines"),
    [
        ([(0, "tags"), (1, "tags")], [2, 2]),  # a mistake of all uses is the anchor's
        ([(1, "tags")], [14]),  # one of some is theirs
        ([(0, "tags", 0), (1, "tags", 0)], [2, 2]),
        ([(1, "tags", 0)], [15]),
        ([(0, "size"), (1, "size")], [3, 3]),
        ([(1, "size")], [12]),
        ([(0, "missing"), (1, "missing")], [3, 3]),
        ([(0, "missing")], [7]),
        ([(1, "only", "missing")], [20]),  # where it is missing, if no other merges the anchor
        ([(0, "rows", 1, "zone")], [11]),
        ([(0, "rows", 1), (0, "rows", 1, "missing")], [11, 11]),
        ([(1, "rows", 0)], [17]),
        ([(0, "rows", 0), (0, "rows", 1), (1, "rows", 0)], [4, 4, 4]),
        ([(1, "cron")], [5]),  # its one use
        ([(0, "name"), (1, "name")], [7, 13]),
    ],
)
def test_the_author_mends_a_mistake_at_the_anchor_that_gives_it_to_all_of_its_uses(
    tmp_path: Path, places: list[yaml_lines.Place], lines: list[int]
) -> None:
    found: list[yaml_lines.Finding] = [(("deployments", *place), "wrong") for place in places]
    assert read(tmp_path, ANCHORS).lines.edited(found) == lines


def test_an_unknown_key_is_mended_beside_the_alias(tmp_path: Path) -> None:
    assert read(tmp_path, ANCHORS).lines.edited([(("deployments", 1, "cron"), "unknown key; known: a")]) == [18]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(
        UsageError, match=r"^file\.yaml:2: cannot be read: byte 0xe9 is not UTF-8; save the file in UTF-8$"
    ):
        yaml_source.read(tmp_path / "file.yaml", "file.yaml")
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(UsageError, match=r"^file\.yaml:1: cannot be read: "):
            yaml_source.read(path, "file.yaml")
