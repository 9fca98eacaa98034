"""The checks of the files as a whole: all problems at once, lines with an overlay, flows that cannot be imported."""

# ruff: noqa: E501 - messages

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.unit.rule_files import FILES, PREFECT, problems, write
from tidepool import settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write(tmp_path)


def change(repository: Path, *pairs: tuple[str, str], file: str = "prefect.yaml") -> None:
    text = FILES[file]
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    (repository / file).write_text(text)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library' (rule_flows.py:1)"),
        ("1 / 0", "ZeroDivisionError: division by zero (rule_flows.py:1)"),
        ("import os\nos.environ['PARTNER_API_KEY']", "KeyError: 'PARTNER_API_KEY' (rule_flows.py:2)"),
        ("nothing", "NameError: name 'nothing' is not defined (rule_flows.py:1)"),
        ("def", "SyntaxError: invalid syntax (rule_flows.py:1)"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (rule_flows.py:2)"),
        ("import os\nos.nothing", "AttributeError: module 'os' has no attribute 'nothing' (rule_flows.py:2)"),
    ],
)
def test_a_flow_that_cannot_be_imported_hides_nothing_whatever_its_module_raises(
    repository: Path, code: str, reason: str
) -> None:
    (repository / "rule_flows.py").write_text(f"{code}\n")
    change(repository, ("deadline_seconds: 900", "deadline_seconds: soon"))
    automation = "{type: run-deployment, deployment: sell/sell}"
    change(repository, ("{type: notify, subject: failed, body: look}", automation), file="automations.yaml")
    assert [problem.partition(": ")[2] for problem in problems(repository)] == [
        f"deployments[sell].entrypoint: its module cannot be imported: {reason} (also in deployments[deliver] at line 34)",
        "deployments[sell].work_pool.job_variables.deadline_seconds: 'soon' is not of type 'integer'",
    ]


@pytest.mark.parametrize(
    ("entrypoint", "reason"),
    [
        ("shop.flows.sel", "shop.flows has no sel; did you mean sell?"),
        ("shop.flows.total", "total is not decorated with @flow; known: deliver, pack, sell"),
        ("shop.flows", "it is a module; name its function: shop.flows.deliver, shop.flows.pack, shop.flows.sell"),
        ("shop", "'shop' is not a module's function"),
    ],
)
def test_what_an_entrypoint_means_that_is_not_a_flow(repository: Path, entrypoint: str, reason: str) -> None:
    (repository / "shop").mkdir()
    (repository / "shop" / "__init__.py").touch()
    text = (repository / "rule_flows.py").read_text()
    (repository / "shop" / "flows.py").write_text(f"{text}\n\ndef total():\n    return 0\n")
    change(repository, ("rule_flows.sell", entrypoint))
    [problem] = problems(repository)
    assert reason in problem
    assert "site-packages" not in problem


@pytest.mark.parametrize("code", ["def", "import os\nos.environ['PARTNER_API_KEY']"])
def test_run_says_in_one_sentence_that_a_flow_cannot_be_imported(repository: Path, code: str) -> None:
    (repository / "rule_flows.py").write_text(f"{code}\n")
    command = [sys.executable, "-m", "tidepool.cli", "run", "sell", "-e", "production"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tidepool: cannot import flow rule_flows.sell: ")
    assert done.stderr.count("\n") == 1


def test_all_problems_are_reported_at_once(repository: Path) -> None:
    change(repository, ("count: 2", "count: many"), ("Europe/Paris", "Mars"), ("deliver.md", "d.md"))
    assert len(problems(repository)) == 3


def test_a_problem_of_an_overlay_hides_no_other(repository: Path) -> None:
    change(repository, ("  deliver:\n", "  delivr:\n"), ("every_deployment", "every"), file="environments/staging.yaml")
    change(repository, ("  - name: deliver\n", "  - name: sell\n"), ("cron: ", "corn: "))
    found = problems(repository, "staging")
    assert [each.split(": ", 1)[0].split(":")[0] for each in found].count("environments/staging.yaml") == 2
    assert [each for each in found if "unknown deployment 'delivr'" in each]
    assert [each for each in found if "unknown key; did you mean cron?" in each]
    assert [each for each in found if "duplicate name" in each]


def test_the_line_of_a_value_is_the_overlays_where_it_sets_it(repository: Path) -> None:
    assert problems(repository, "staging") == []
    change(repository, ("deadline_seconds: 600", "deadline_seconds: 1"), file="environments/staging.yaml")
    assert problems(repository) == []
    assert problems(repository, "staging") == [
        "environments/staging.yaml:2: deployments[deliver].work_pool.job_variables.deadline_seconds: 1 is less than the minimum of 60 (also in deployments[sell])"
    ]


def test_lines_stay_right_when_an_overlay_removes_a_deployment_and_the_image(repository: Path) -> None:
    (repository / "environments" / "local.yaml").write_text("image: null\ndeployments:\n  sell: null\n")
    line = PREFECT[: PREFECT.index("docs/runbooks/deliver.md")].count("\n") + 1
    change(repository, ("docs/runbooks/deliver.md", "docs/runbooks/d.md"))
    assert problems(repository, "local") == [
        f"prefect.yaml:{line}: deployments[deliver].description: the runbook docs/runbooks/d.md does not exist"
    ]


def test_an_environment_without_an_image_needs_none(repository: Path) -> None:
    (repository / "environments" / "local.yaml").write_text("image: null\n")
    assert problems(repository, "local") == []


def test_keys_without_a_value_that_prefects_templates_have_are_accepted(repository: Path) -> None:
    nothing = "".join(f"    {key}: null\n" for key in ("schedule", "flow_name", "sla", "triggers", "paused"))
    change(repository, ("    parameters: {count: 2}\n", f"    parameters: {{}}\n{nothing}"))
    assert problems(repository) == []


def test_a_secret_is_not_repeated_in_the_message(repository: Path) -> None:
    change(repository, ("GREETING: hello", "API_TOKEN: hunter2"))
    assert "hunter2" not in "\n".join(problems(repository))


def test_each_invalid_file_is_a_problem_with_its_line(repository: Path) -> None:
    for file in ("prefect.yaml", "automations.yaml", "pyproject.toml"):
        (repository / file).write_text("a: 1\nb: ]\n")
    assert [problem.split(": ")[:2] for problem in problems(repository)] == [
        ["automations.yaml:2", "invalid YAML"],
        ["prefect.yaml:2", "invalid YAML"],
        ["pyproject.toml:1", "cannot be read"],
    ]


def test_files_that_cannot_be_read_hide_no_other(repository: Path) -> None:
    for file in ("prefect.yaml", "environments/staging.yaml"):
        (repository / file).write_text("a: 1\nb: ]\n")
    (repository / "pyproject.toml").write_text('[tool.tidepool]\nrunboks = true\nnames = "["\ntags = ["owner"]\n')
    assert [problem.split(": ")[0] for problem in problems(repository, "staging")] == [
        "environments/staging.yaml:2",
        "prefect.yaml:2",
        "pyproject.toml:2",
        "pyproject.toml:3",
    ]
    (repository / "prefect.yaml").write_text(PREFECT)
    found = problems(repository)  # of a rule beside those that are wrong
    assert [each for each in found if "needs exactly one tag owner" in each]


def test_a_missing_file_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path) == ["prefect.yaml:1: cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SHOP_NAME", None, "environment variable SHOP_NAME is not set: set it, or "),
        ("SHOP_NAME", "", "environment variable SHOP_NAME is empty: set it, or "),
        ("SHOP_NAME", "corner", ""),
        ("SHOP_SUFFIX", None, ""),
        ("SHOP_SUFFIX", "", ""),
        ("SHOP_OTHER", None, "unknown environment variable SHOP_OTHER; set it, or list it in `variables` of "),
        ("SHOP_OTHER", "x", ""),
        ("TIDEPOOL_IMAGE_NAME", None, "environment variable TIDEPOOL_IMAGE_NAME is not set: set it, or "),
    ],
)
def test_a_deploy_needs_the_values_of_environment_variables(
    repository: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, expected: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    settings.settings.cache_clear()
    change(repository, ("GREETING: hello", f'GREETING: "a{{{{ ${name} }}}}"'))
    found = [problem.partition("env.GREETING: ")[2] for problem in problems(repository, deploying=True)]
    assert [each[: len(expected)] for each in found] == ([expected] if expected else [])
    settings.settings.cache_clear()


def test_a_flow_with_types_for_checkers_only_and_with_other_classes_is_checked(repository: Path) -> None:
    """Of `sell`, the type that it returns is imported for type checkers only, and one parameter is a class."""
    change(repository, ("count: 2", "anything: {a: [1]}"))
    assert problems(repository) == []


def test_late_imports_are_found_in_modules_that_the_flow_imports(repository: Path) -> None:
    (repository / "pyproject.toml").write_text('[tool.tidepool]\nlate_imports = ["numpy"]\n')
    (repository / "rule_helpers.py").write_text(
        "try:\n    from numpy import array\nexcept ImportError:\n    array = None\n"
    )
    change(
        repository,
        ("from prefect import flow\n", "from prefect import flow\nimport rule_helpers\n"),
        file="rule_flows.py",
    )
    assert problems(repository) == [
        (
            "rule_helpers.py:2: each run of the flow would begin with the import of numpy: import it in the function "
            "that uses it"
        )
    ]


def test_files_of_another_encoding_are_problems_and_not_tracebacks(repository: Path) -> None:
    (repository / "pyproject.toml").write_text(
        '[tool.tidepool]\nlate_imports = ["numpy"]\nrunbook_headings = ["Meaning"]\n'
    )
    (repository / "docs/runbooks/sell.md").write_bytes(b"# Page\n\n## Meaning \xe9\n")
    (repository / "rule_helpers.py").write_bytes(b"# -*- coding: latin-1 -*-\nimport numpy  # \xe9\n")
    (repository / "rule_other.py").write_text("def (")
    imports = "import rule_helpers\ntry:\n    import rule_other\nexcept SyntaxError:\n    pass\n"
    change(repository, ("from prefect import flow\n", f"from prefect import flow\n{imports}"), file="rule_flows.py")
    assert [problem.split(": ")[0] for problem in problems(repository)] == [
        "docs/runbooks/sell.md:3",
        "rule_helpers.py:2",
    ]


def test_what_an_overlay_adds_to_a_value_of_the_wrong_form_is_not_a_second_problem(repository: Path) -> None:
    wrong = "    work_pool: kubernetes\n"
    right = '    work_pool: {name: kubernetes, job_variables: {image: "{{ pin-image.image }}"}}\n'
    change(repository, (right, wrong))
    command = [sys.executable, "-m", "tidepool.cli", "validate"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.stderr == (
        "tidepool: 1 problem:\n  prefect.yaml:36: deployments[deliver].work_pool: must be a mapping, not 'kubernetes'\n"
    )


@pytest.mark.parametrize(
    ("file", "text", "variable", "reason"),
    [
        ("pyproject.toml", "[tool.tidepool", "", "Failed to load Prefect settings from pyproject.toml: invalid TOML"),
        ("pyproject.toml", "tool = 3\n", "", "'int' object has no attribute 'get'"),
        ("pyproject.toml", "", "many", "max_retries: input should be a valid integer"),
    ],
)
def test_settings_that_prefect_refuses_are_one_sentence(
    repository: Path, file: str, text: str, variable: str, reason: str
) -> None:
    (repository / file).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tidepool.cli", "validate"],
        cwd=repository,
        env={**settings.environment(), **({"PREFECT_CLIENT_MAX_RETRIES": variable} if variable else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # Prefect prints something of its own before
    assert last.startswith("tidepool: Prefect cannot read its settings (PREFECT_* variables")
    assert reason in last
    assert "Traceback" not in done.stderr


def test_the_command_mends_then_reports_what_is_left(repository: Path) -> None:
    change(repository, ("pull: []\n", ""), ("count: 2", "count: many"))
    command = [sys.executable, "-m", "tidepool.cli", "validate", "--fix"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "fixed prefect.yaml:16: pull: added `pull: []`: the image is the code\n"
    assert done.stderr.startswith("tidepool: 1 problem:\n  prefect.yaml:25: deployments[sell].parameters.count: ")
    change(repository, ("pull: []\n", ""))
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["no problems: production, staging"]


def test_the_command_prints_all_problems_and_exits_with_1(repository: Path) -> None:
    change(repository, ("count: 2", "count: many"))
    command = [sys.executable, "-m", "tidepool.cli", "validate"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("tidepool: 1 problem:\n  prefect.yaml:")  # of both environments
    assert "Traceback" not in done.stderr
