"""The commands of runbooks: how they are found, and that each drill finds those that it executes."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import pytest
import yaml

from tests.drill import drills, runbook
from tests.drill.stack import Stack
from tests.helm.conftest import CHART
from tidepool.deploy.config import automations

if TYPE_CHECKING:
    from pathlib import Path

PAGE = """# x

## Diagnosis

Look:

```bash
one <flow-run id>  # why
# only a comment
two \\
  three
```

```
not a command
```

## Mitigation

- Cause a: do this.
- Cause b:

  ```console
  four <work pool>
  ```
"""


def test_commands_are_found_with_section_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "runbooks").mkdir(parents=True)
    (tmp_path / "docs" / "runbooks" / "x.md").write_text(PAGE)
    monkeypatch.setattr(runbook, "TOP", tmp_path)
    first, second = runbook.blocks("x")
    assert (first.section, first.commands) == ("Diagnosis", ("one <flow-run id>  # why", "two three"))
    assert (second.section, second.words.strip(), second.commands) == (
        "Mitigation",
        "- Cause b:",
        ("four <work pool>",),
    )
    assert runbook.chosen("x", "Mitigation", "Cause b") == [second]
    with pytest.raises(AssertionError, match="0 blocks of commands in Mitigation are about 'Cause a'"):
        runbook.chosen("x", "Mitigation", "Cause a")


def test_a_command_with_an_empty_blank_is_not_executed() -> None:
    assert runbook.filled("a <x> <y z>", {"x": "1", "y z": "2"}) == "a 1 2"
    stack = MagicMock(spec=Stack)
    with pytest.raises(AssertionError, match=r"tidepool run csv-etl -p source=<source> .* no value for its blank"):
        Stack._execute(stack, "csv-etl", "Mitigation", ("Reproduce it",), {}, {})
    assert not stack.execute.called


@pytest.mark.parametrize("name", drills.DRILLS)
def test_a_drill_finds_the_commands_that_it_executes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = MagicMock(spec=Stack)
    stack.folder = tmp_path
    stack.fail.return_value = stack.create.return_value = stack.drive.return_value = "a-run"
    stack.execute.return_value = "csv-etl"
    stack._variables = {"TIDEPOOL_REPOSITORY_URL": "http://host"}
    for method in ("diagnose", "mitigate", "fixed", "_execute"):
        setattr(stack, method, partial(getattr(Stack, method), stack))
    monkeypatch.setattr(drills, "_has_bucket", lambda _: True)
    drill = drills.DRILLS[name]
    drill.run(stack)
    told = [call.args for call in stack.say.call_args_list if call.args[0] == "runbook"]
    assert told[0][1].startswith(runbook.path(drill.runbook))
    executed = [call.args[0] for call in stack.execute.call_args_list if call.kwargs.get("told")]
    assert executed
    assert stack.green.called


def test_the_page_lists_every_drill_with_what_fires() -> None:
    rows = re.findall(
        r"^\| `([a-z-]+)` \| .+ \| (.+) \| \[([\w-]+)\]\(runbooks/\3\.md\) \|$",
        (runbook.TOP / "docs" / "on-call.md").read_text(),
        re.MULTILINE,
    )
    assert {name: page for name, _, page in rows} == {name: each.runbook for name, each in drills.DRILLS.items()}
    assert len(rows) == 10
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    known = {each["alert"] for each in rules} | {each.name for each in automations.load(runbook.TOP).automations}
    assert {word for _, fires, _ in rows for word in re.findall(r"`([\w-]+)`", fires)} <= known
