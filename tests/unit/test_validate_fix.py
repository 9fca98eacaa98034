"""`tidepool validate --fix`: what is changed, that nothing else is, and what is left to the author."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.unit.rule_files import FLOWS, PREFECT, problems, write
from tidepool.deploy.config import fixes
from tidepool.errors import UsageError

STEP = "  - tidepool.deploy.steps.validate: {}\n"
SELL = "entrypoint: rule_flows.sell\n"
SLUG = "      slug: nightly\n"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("rule_flows", "rule_steps"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def fixed(folder: Path, text: str) -> tuple[str, list[str]]:
    """Return a prefect.yaml after the command, and what it reports."""
    write(folder)
    (folder / "prefect.yaml").write_bytes(text.encode())
    made = [str(each) for each in fixes.fix(folder)]
    return (folder / "prefect.yaml").read_bytes().decode(), made


@pytest.mark.parametrize(
    ("good", "given", "expected", "line"),
    [
        (SELL, "entrypoint: rule_flows.py:sell # ours\n", "entrypoint: rule_flows.sell # ours\n", 20),
        (SELL, "entrypoint: './rule_flows.py:sell'\n", "entrypoint: 'rule_flows.sell'\n", 20),
        (SELL, 'entrypoint: "rule_flows:sell"\n', 'entrypoint: "rule_flows.sell"\n', 20),
        ("pull: []\n", "pull:\n", "pull: []\n", 10),
        ("pull: []\n", "pull: null # none\n", "pull: [] # none\n", 10),
        ("pull: []\n", "pull: # none\n", "pull: [] # none\n", 10),
        ("    parameters: {count: 2}\n", "    pull:\n", "    pull: []\n", 25),
        (f"build:\n{STEP}", "build:\n", f"build:\n{STEP}", 3),
        (f"build:\n{STEP}", "build:\n  # The version.\n", f"build:\n{STEP}  # The version.\n", 3),
        (SLUG, f"      active: true\n{SLUG}", SLUG, 14),
        (SLUG, f"{SLUG}      active: yes  # always\n", f"{SLUG}      # always\n", 15),
        ("[*nightly]", "[{active: true, <<: *nightly}]", "[{<<: *nightly}]", 23),
        ("[*nightly]", "[{slug: b, active: true, <<: *nightly}]", "[{slug: b, <<: *nightly}]", 23),
        ("[*nightly]", "[{<<: *nightly, active: true}]", "[{<<: *nightly}]", 23),
        ("[*nightly]", "\n    - active: true\n      <<: *nightly", "\n    - <<: *nightly", 24),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_mistake_with_one_right_answer_is_mended_and_nothing_else_changes(
    tmp_path: Path, good: str, given: str, expected: str, line: int, newline: str
) -> None:
    assert PREFECT.count(good)
    text, made = fixed(tmp_path, PREFECT.replace(good, given, 1).replace("\n", newline))
    assert text == PREFECT.replace(good, expected, 1).replace("\n", newline)
    assert [each.split(": ")[0] for each in made] == [f"prefect.yaml:{line}"]
    assert problems(tmp_path) == []
    assert fixes.fix(tmp_path) == []


FLOW_STEP = "{tidepool.deploy.steps.validate: {}}"
OTHER = "  - rule_steps.undeclared: {}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("build:  # a\n", f"build:  # a\n{STEP}"),
        ("build:  # a\n  # b\n", f"build:  # a\n  # b\n{STEP}"),
        ("build:\n  # a\n  # b\n\n", f"build:\n  # a\n  # b\n{STEP}\n"),
        ("build:\n# of push\n", f"build:\n{STEP}# of push\n"),
        ("build: null  # a\n  # b\n", f"build: [{FLOW_STEP}]  # a\n  # b\n"),
        ("build: ~ # a\n", f"build: [{FLOW_STEP}] # a\n"),
        ("build:\n  # a\n  null # b\n", f"build:\n  # a\n  [{FLOW_STEP}] # b\n"),
        ("build: []  # a\n", f"build: [{FLOW_STEP}]  # a\n"),
        ("build: [  # a\n  # b\n  ]\n", f"build: [{FLOW_STEP}  # a\n  # b\n  ]\n"),
        (
            "build: [  # a\n  {rule_steps.undeclared: {}},  # b\n  ]\n",
            f"build: [{FLOW_STEP},   # a\n  {{rule_steps.undeclared: {{}}}},  # b\n  ]\n",
        ),
        (f"build:  # a\n        # b\n{OTHER}  # c\n", f"build:  # a\n        # b\n{STEP}{OTHER}  # c\n"),
        (f"build:  # a\n  # of it\n{OTHER}\n", f"build:  # a\n{STEP}  # of it\n{OTHER}\n"),
        (f"build:\n# of it\n{OTHER}\n", f"build:\n{STEP}# of it\n{OTHER}\n"),
        (f"build:\n  # a\n\n{OTHER}\n", f"build:\n  # a\n\n{STEP}{OTHER}\n"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_comments_stay_where_they_are_beside_the_first_step(
    tmp_path: Path, given: str, expected: str, newline: str
) -> None:
    build = PREFECT[PREFECT.index("build:") : PREFECT.index("push:")]
    file = PREFECT.replace("{{ commit.stdout }}", "1")
    text, made = fixed(tmp_path, file.replace(build, given).replace("\n", newline))
    assert text == file.replace(build, expected).replace("\n", newline)
    line = text[: text.index("tidepool.deploy")].count("\n") + 1
    assert [each.split(": ")[0] for each in made] == [f"prefect.yaml:{line}"]
    assert problems(tmp_path) == []


def test_a_file_that_ends_with_the_key_gets_a_new_line(tmp_path: Path) -> None:
    file = PREFECT.replace("{{ commit.stdout }}", "1").replace(
        PREFECT[PREFECT.index("build:") : PREFECT.index("push:")], ""
    )
    assert fixed(tmp_path, f"{file}build:")[0] == f"{file}build:\n{STEP}"


@pytest.mark.parametrize(
    ("good", "given", "expected"),
    [
        ("pull: []\n", "pull:  # a\n  # b\n", "pull: []  # a\n  # b\n"),
        ("pull: []\n", "pull:\n  # a\n  null  # b\n", "pull:\n  # a\n  []  # b\n"),
        # What is commented out belongs to the list above, and the next comment to the key below.
        (
            PREFECT[PREFECT.index("pull:") : PREFECT.index("  - name: sell")],
            "x-schedules:\n  - *nightly\n  # - *late\n# All of them.\ndeployments:  # two\n",
            "x-schedules:\n  - *nightly\n  # - *late\npull: []\n# All of them.\ndeployments:  # two\n",
        ),
        (SLUG, f"      # a\n      active: true  # b\n      # c\n{SLUG}", f"      # a\n      # b\n      # c\n{SLUG}"),
        (SLUG, f"{SLUG}      active:  # a\n        true\n", f"{SLUG}      active:  # a\n        true\n"),
        (
            "[*nightly]",
            "[{slug: b,  # a\n      active: true,  # b\n      <<: *nightly}]",
            "[{slug: b,  # a\n      active: true,  # b\n      <<: *nightly}]",
        ),
        (
            SELL,
            "entrypoint:  # a\n      # b\n      rule_flows.py:sell  # c\n",
            "entrypoint:  # a\n      # b\n      rule_flows.sell  # c\n",
        ),
    ],
)
def test_comments_stay_where_they_are_beside_all_other_changes(
    tmp_path: Path, good: str, given: str, expected: str
) -> None:
    anchor = "x: &nightly {slug: nightly, cron: '0 1 * * *'}\n" if "late" in given else ""
    text, _ = fixed(tmp_path, anchor + PREFECT.replace(good, given, 1))
    assert text == anchor + PREFECT.replace(good, expected, 1)


def test_a_comment_at_the_top_of_the_file_stays_there(tmp_path: Path) -> None:
    head, deployments = "# yaml-language-server: $schema=x\n# Ours.\n", PREFECT[PREFECT.index("deployments:") :]
    deployments = deployments.replace("*nightly", "{slug: a, cron: '0 1 * * *'}")
    text, made = fixed(tmp_path, f"{head}{deployments}")
    assert text == f"{head}build:\n{STEP}pull: []\n{deployments}"
    assert [each.split(": ")[0] for each in made] == ["prefect.yaml:3", "prefect.yaml:5"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_project_in_a_source_folder_is_named_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, installed: bool
) -> None:
    package = tmp_path / "src" / "rule_shop"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "flow.py").write_text(FLOWS)
    if installed:
        monkeypatch.syspath_prepend(tmp_path / "src")
    given = PREFECT.replace("rule_flows.sell", "src/rule_shop/flow.py:sell", 1)
    text, made = fixed(tmp_path, given)
    for module in [each for each in sys.modules if "rule_shop" in each or each == "src"]:
        monkeypatch.delitem(sys.modules, module)
    if installed:
        assert (text, len(made)) == (given.replace("src/rule_shop/flow.py:sell", "rule_shop.flow.sell"), 1)
    else:
        assert (text, made) == (given, [])


def test_a_whole_file_of_prefects_own_is_mended_at_once(tmp_path: Path) -> None:
    head = "# Ünsere 🚀.\nname: shop\n\n# All of them.\n"
    deployments = PREFECT[PREFECT.index("definitions:") :]
    given = deployments.replace("rule_flows.", "rule_flows.py:").replace(SLUG, f"{SLUG}      active: true\n")
    given = given.replace("{{ commit.stdout }}", "1").replace("{{ pin-image.image }}", "a/b:c")
    text, made = fixed(tmp_path, f"{head}{given}".replace("deployments:\n", "# Two.\ndeployments:\n"))
    assert made == [
        "prefect.yaml:9: deployments[sell].schedules[0].active: removed: a schedule is active unless it is paused",
        f"prefect.yaml:11: build: added the first step {fixes.STEP}",
        "prefect.yaml:13: pull: added `pull: []`: the image is the code",
        "prefect.yaml:18: deployments[sell].entrypoint: rule_flows.sell, which was 'rule_flows.py:sell'",
        "prefect.yaml:32: deployments[deliver].entrypoint: rule_flows.deliver, which was 'rule_flows.py:deliver'",
    ]
    lines = text.splitlines()
    assert lines[:4] == head.splitlines()
    assert lines[10:16] == ["build:", STEP.rstrip(), "pull: []", "# Two.", "deployments:", "  - name: sell"]
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("good", "given"),
    [
        (SLUG, f"{SLUG}      active: false\n"),  # it would run
        ("definitions:", "steps: &steps []\ndefinitions:"),  # not a mistake of its own
        (SELL, "entrypoint: rule_flows.py:no_flow\n"),
        (SELL, "entrypoint: rule_flows.py:sel\n"),
        (SELL, "entrypoint: rule_flow.py:sell\n"),
        (SELL, "entrypoint: json.py:dumps\n"),  # another package has the name
        (SELL, "entrypoint: &sell rule_flows.py:sell\n    version: *sell\n"),
        (STEP, f"  - rule_steps.add: {{left: 1}}\n{STEP}"),
        (STEP, f"{STEP}    left: 1: 2\n"),
        ("pull: []\n", "pull: []\npull:\n"),  # a duplicate key
    ],
)
def test_what_is_not_clear_is_left_as_it_is(tmp_path: Path, good: str, given: str) -> None:
    (tmp_path / "json.py").write_text(FLOWS)
    text = PREFECT.replace('    version: "{{ commit.stdout }}"\n', "").replace(good, given, 1)
    assert fixed(tmp_path, text) == (text, [])


def test_a_module_of_another_file_is_not_the_one_that_an_entrypoint_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rule_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(tmp_path / "other")
    import_module("rule_flows")
    text = PREFECT.replace(SELL, "entrypoint: rule_flows.py:sell\n")
    assert fixed(tmp_path, text) == (text, [])


def test_a_value_of_an_anchor_is_mended_once(tmp_path: Path) -> None:
    text = PREFECT.replace("definitions:\n", "definitions:\n  base: &base {entrypoint: rule_flows.py:sell}\n")
    text = text.replace("    entrypoint: rule_flows.sell\n", "    <<: *base\n")
    text = text.replace("    entrypoint: rule_flows.deliver\n", "    <<: *base\n")
    new, made = fixed(tmp_path, text)
    assert new == text.replace("rule_flows.py:sell", "rule_flows.sell")
    assert len(made) == 1
    # A second removal at the same place would take the comment below, which is as long.
    text = PREFECT.replace(SLUG, f"      active: true\n      # kept since\n{SLUG}")
    text = text.replace("  - name: deliver\n", "  - name: deliver\n    schedules: [*nightly]\n")
    new, made = fixed(tmp_path, text)
    assert new == text.replace("      active: true\n", "")
    assert [each.split(": ")[1] for each in made] == ["deployments[sell].schedules[0].active"]
    # Of the anchor of a step, the other use would change too.
    text = PREFECT.replace(STEP, "").replace("build:\n", "build: &steps\n")
    text = text.replace("push:\n", "push: *steps\nx:\n")
    assert fixed(tmp_path, text) == (text, [])


@pytest.mark.parametrize("method", ["replace", "chmod"])
def test_a_write_that_fails_leaves_the_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    text = PREFECT.replace("pull: []\n", "")
    write(tmp_path, "prefect.yaml", "", text)
    before = {each.name for each in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(UsageError, match=r"cannot be replaced, and is as it was: No space left on device"):
        fixes.fix(tmp_path)
    assert (tmp_path / "prefect.yaml").read_text() == text
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == before


def test_mode_and_a_link_stay(tmp_path: Path) -> None:
    write(tmp_path, "prefect.yaml", "", PREFECT.replace("pull: []\n", ""))
    (tmp_path / "prefect.yaml").rename(tmp_path / "real.yaml")
    (tmp_path / "real.yaml").chmod(0o640)
    (tmp_path / "prefect.yaml").symlink_to("real.yaml")
    assert fixes.fix(tmp_path)
    assert (tmp_path / "prefect.yaml").is_symlink()
    assert (tmp_path / "real.yaml").stat().st_mode & 0o777 == 0o640
