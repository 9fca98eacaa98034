"""`tidepool new`: what it refuses, and the text of prefect.yaml with one more deployment."""

from __future__ import annotations

import difflib
import re
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.unit.rule_files import PREFECT, PYPROJECT, write
from tidepool import cli
from tidepool.author import prefect_file
from tidepool.author.new import Order, new
from tidepool.deploy.config import yaml_source
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

TAGS = {"owner": "shop", "tier": "1"}
ACCEPTED = "lower-case letters, digits and single hyphens, a letter first, at most 40 characters"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path)
    (tmp_path / "pyproject.toml").write_text(f'{PYPROJECT}tags = ["owner", "tier"]\n')
    tagged = PREFECT.replace("tags: [managed-by:tidepool]", "tags: [managed-by:tidepool, owner:shop, tier:2]")
    (tmp_path / "prefect.yaml").write_text(tagged)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (Order("Daily", tags=TAGS), f"invalid name 'Daily': {ACCEPTED}; for example daily-orders"),
        (Order("a_b", tags=TAGS), f"invalid name 'a_b': {ACCEPTED}; for example daily-orders"),
        (Order("2-orders", tags=TAGS), f"invalid name '2-orders': {ACCEPTED}; for example daily-orders"),
        (Order("x" * 41, tags=TAGS), f"invalid name '{'x' * 41}': {ACCEPTED}; for example daily-orders"),
        (Order("../x", tags=TAGS), f"invalid name '../x': {ACCEPTED}; for example daily-orders"),
        (
            Order("class", tags=TAGS),
            "invalid name 'class': it is a word of Python; the flow's function has that name",
        ),
        (Order("list", tags=TAGS), "invalid name 'list': it is a word of Python; the flow's function has that name"),
        (Order("report", tags=TAGS), "invalid name 'report': the flow's module uses report for something else"),
        (Order("load", tags=TAGS), "invalid name 'load': the flow's module uses load for something else"),
        (Order("sell", tags=TAGS), "prefect.yaml:18: sell exists already"),
        (Order("orders", timezone="UTC", tags=TAGS), "--timezone is that of a schedule: give --cron, too"),
        (Order("orders", cron="0 25 * * *", tags=TAGS), "--cron: '0 25 * * *': hour '25' is not accepted: 0 to 23"),
        (
            Order("orders", cron="0 5 * * *", timezone="Europe/Pari", tags=TAGS),
            "--timezone: unknown timezone 'Europe/Pari'; did you mean Europe/Paris?",
        ),
        (
            Order("orders", tags={**TAGS, "owner": "A team"}),
            "--owner: 'A team' is not accepted: lower-case letters, digits and single hyphens",
        ),
        (
            Order("orders", tags={"owner": "shop"}),
            "--tier is missing, a tag that [tool.tidepool] asks for; in use: 2",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Order) else "",
)
def test_a_wrong_order_is_one_sentence_and_writes_nothing(repository: Path, order: Order, sentence: str) -> None:
    before = contents(repository)
    with pytest.raises(UsageError) as error:
        new(repository, order)
    assert str(error.value) == sentence
    assert contents(repository) == before


def test_a_file_of_that_name_is_not_overwritten(repository: Path) -> None:
    (repository / "samples").mkdir()
    (repository / "samples" / "orders.csv").write_text("mine")
    with pytest.raises(UsageError, match=re.escape("samples/orders.csv exists already; choose another name")):
        new(repository, Order("orders", tags=TAGS))


def test_problems_that_were_there_before_are_reported_first(repository: Path) -> None:
    text = (repository / "prefect.yaml").read_text()
    (repository / "prefect.yaml").write_text(text.replace("count: 2", "count: many"))
    before = contents(repository)
    with pytest.raises(UsageError, match=r"1 problem; nothing was written; repair them first:\n  prefect\.yaml:25: "):
        new(repository, Order("orders", tags=TAGS))
    assert contents(repository) == before


def test_an_unknown_kind_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tidepool", "new", "orders", "--kind", "parallel"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    kinds = "'plain', 'mapped', 'batched', 'dataframe'"
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"tidepool: Invalid value for '--kind': 'parallel' is not one of {kinds}.\n"


# --- prefect.yaml -----------------------------------------------------------------------------------------------------

FILE = """\
# The deployments.
definitions:
  limits:
    one: &one {limit: 1} # at a time
deployments:
  # The first one
  # has two lines of comment.
  - name: beta
    concurrency_limit: *one # a comment
    tags: [a,   b]   # not as a formatter would write it

  # Of delta.
  - {name: delta, concurrency_limit: *one}
  - name: zeta
    concurrency_limit: 3
    description: |
      Text, and its last line.
"""
AFTER = "\n# The end.\nother: 1\n"


@pytest.mark.parametrize("after", ["", AFTER])
@pytest.mark.parametrize("name", ["alpha", "carol", "eve", "zz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_deployment_is_added_and_every_other_line_stays(tmp_path: Path, name: str, after: str, end: str) -> None:
    text = (FILE + after).replace("\n", end)
    (tmp_path / "prefect.yaml").write_bytes(text.encode())
    entry = f"- name: {name}\n  description: |\n    One.\n\n    Two.\n  concurrency_limit: *one\n"
    changed = prefect_file.add(text, yaml_source.read(tmp_path / "prefect.yaml", "prefect.yaml"), entry)
    assert not [line for line in difflib.ndiff(text.split("\n"), changed.split("\n")) if line.startswith("- ")]
    assert changed.count(end) == changed.count("\n")
    found = {each["name"]: each for each in yaml.safe_load(changed)["deployments"]}
    assert list(found) == sorted(found)
    assert found[name] == {"name": name, "description": "One.\n\nTwo.\n", "concurrency_limit": {"limit": 1}}
    lines = changed.splitlines()
    assert lines[lines.index("  - name: beta") - 1] == "  # has two lines of comment."
    assert lines[lines.index("  - {name: delta, concurrency_limit: *one}") - 1] == "  # Of delta."


@pytest.mark.parametrize(
    "text", ["deployments: [{name: a}, {name: b}]\n", "deployments:\n- name: a\n- {name: b}\nx: *y\n"]
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"prefect\.yaml"):
        prefect_file.add(text, yaml_source.read(tmp_path / "prefect.yaml", "prefect.yaml"), "- name: c\n")


def test_the_usual_value_is_an_alias_where_most_use_one(tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text(FILE)
    file = yaml_source.read(tmp_path / "prefect.yaml", "prefect.yaml")
    assert prefect_file.usual(FILE, file, "concurrency_limit") == "*one"
    assert prefect_file.usual(FILE, file, "concurrency_limit", lambda value: value == 3) == "3"
    assert prefect_file.usual(FILE, file, "tags") == '["a", "b"]'
    assert prefect_file.usual(FILE, file, "version") == ""
