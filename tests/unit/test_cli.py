"""The command: what a person types, and the sentence that a wrong word gets."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from prefect import flow
from pydantic import BaseModel, Field

from tidepool import cli
from tidepool.errors import UsageError, did_you_mean
from tidepool.local.run import assignments, bind, describe

REPOSITORY = Path(__file__).parents[2]


class Window(BaseModel):
    days: int


@flow(name="typed")
def typed(
    count: Annotated[int, Field(ge=1, le=1_000_000)],
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    name: str = "x",
    flag: bool = False,  # noqa: FBT001, FBT002
    maybe: str | None = "y",
    seed: int | None = 1,
    models: list[Literal["drift", "theta"]] | None = None,
    window: Window | None = None,
    anything: Any = None,
) -> None:
    del count, rate, name, flag, maybe, seed, models, window, anything


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=12", 12),
        ("rate=0.25", 0.25),
        ("rate=0", 0.0),
        ("name=12", "12"),
        ("name=true", "true"),
        ("name=null", "null"),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("flag=true", True),
        ("flag=no", False),
        ("maybe=null", None),
        ("maybe=12", "12"),
        ("seed=null", None),
        ('models=["theta"]', ["theta"]),
        ("models=null", None),
        ('window={"days": 7}', Window(days=7)),
        ("anything=[1]", [1]),
        ("anything=word", "word"),
    ],
)
def test_a_text_becomes_what_the_flows_type_makes_of_it(text: str, expected: object) -> None:
    name = text.partition("=")[0]
    value = bind(typed, {"count": 1}, assignments([text]))[name]
    assert value == expected
    assert type(value) is type(expected)


def test_the_command_line_goes_before_the_file_and_defaults_are_the_flows() -> None:
    assert bind(typed, {"count": 5, "rate": 0.1}, {"rate": "0.2"}) == {"count": 5, "rate": 0.2}


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        (
            {"count": 1},
            {"coutn": "1"},
            "typed: parameter coutn: the flow has no such parameter; did you mean count?",
        ),
        ({}, {}, "typed: missing parameter count: pass it with -p count=…"),
        (
            {},
            {"count": "0"},
            (
                "typed: parameter count: input should be greater than or equal to 1, not 0 (accepted: an integer "
                "from 1 to 1,000,000)"
            ),
        ),
        (
            {"count": 0},
            {},
            (
                "typed: parameter count: input should be greater than or equal to 1, not 0 (accepted: an integer "
                "from 1 to 1,000,000)"
            ),
        ),
        (
            {"count": 1},
            {"rate": "1"},
            "typed: parameter rate: input should be less than 1, not 1 (accepted: a number from 0 below 1)",
        ),
        (
            {"count": 1},
            {"count": "many"},
            (
                "typed: parameter count: input should be a valid integer, unable to parse string as an integer, "
                "not 'many' (accepted: an integer from 1 to 1,000,000)"
            ),
        ),
        (
            {"count": 1},
            {"models": '["drift", "thet"]'},
            (
                "typed: parameter models[1]: input should be 'drift' or 'theta', not 'thet' "
                """(accepted: a list, each one of "drift", "theta" or null)"""
            ),
        ),
    ],
)
def test_a_bad_parameter_is_one_sentence(base: dict[str, Any], given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        bind(typed, base, given)
    assert str(raised.value) == message


@pytest.mark.parametrize("text", ["count", "=1", ""])
def test_a_parameter_needs_a_name_and_a_value(text: str) -> None:
    with pytest.raises(UsageError, match="use NAME=VALUE"):
        assignments([text])


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 10}, "an integer from 1 to 10"),
        ({"type": "number", "exclusiveMinimum": 0}, "a number above 0"),
        ({"type": "boolean"}, "true or false"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "an integer or null"),
        ({"enum": ["a", 1]}, 'one of "a", 1'),
        ({"const": "a"}, '"a"'),
        ({"type": "array", "items": {"type": "string", "minLength": 1}}, "a list, each text with a length from 1"),
        ({}, "any value"),
    ],
)
def test_bounds_are_said_in_words(schema: dict[str, Any], words: str) -> None:
    assert describe(schema) == words


def _tidepool(*arguments: str) -> tuple[int, str, str]:
    """Run the console script in this process."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", ["tidepool", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def test_render_prints_what_prefect_deploy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "flows")
    code, out, _ = _tidepool("render", "--environment", "local")
    assert code == 0
    assert {each["work_pool"]["name"] for each in yaml.safe_load(out)["deployments"]} == {"local"}


def test_settings_mask_secrets_and_say_where_a_value_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidepool import settings

    monkeypatch.setenv("TIDEPOOL_NOTIFY_URLS", "slack://token-a/token-b")
    monkeypatch.setenv("TIDEPOOL_IMAGE_NAME", "registry.example/app")
    settings.settings.cache_clear()
    code, out, _ = _tidepool("settings")
    settings.settings.cache_clear()
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0
    assert lines["TIDEPOOL_IMAGE_NAME"] == ["registry.example/app", "environment"]
    assert lines["TIDEPOOL_COMPUTE_PROVIDER"][-1] == "default"
    assert lines["TIDEPOOL_NOTIFY_URLS"] == ["**********", "environment"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["run", "-h"], ["demo", "--help"], ["render", "--help"], ["settings", "--help"]],
)
def test_help_is_there(arguments: list[str]) -> None:
    code, out, error = _tidepool(*arguments)
    assert code == (0 if arguments else 1)
    assert "Usage" in out + error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "csv-elt"], "unknown deployment 'csv-elt'; did you mean csv-etl?"),
        (["run", "csv-etl", "-e", "prod"], "unknown environment 'prod'; known: dev, local, production, staging"),
        (["render", "-e", "production", "--image", "app:1"], "image 'app:1' is not pinned by digest"),
        (["plan", "--detailed-exitcod"], "No such option: --detailed-exitcod"),
        (["drift", "-e"], "Option '-e' requires an argument"),
        (["pause"], "Missing argument 'name'"),
        (["pln"], "No such command 'pln'"),
        (["pause", "x", "--reason", "r", "--until", "99999999999d"], "--until '99999999999d' is beyond the year 9999"),
        (["rollback", "--to", ""], "version '' was not deployed; known: "),
    ],
)
def test_a_wrong_word_is_exit_code_1_without_traceback(arguments: list[str], sentence: str) -> None:
    """The real console script: the mapping of errors is in `main`."""
    done = subprocess.run(
        [sys.executable, "-m", "tidepool.cli", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"tidepool: {sentence}")
    assert done.stderr.count("\n") == 1


def test_outside_of_a_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = _tidepool("render", "-e", "local")
    assert code == 1
    assert re.match(r"tidepool: no prefect.yaml in .* or above it", error)


NEAR = ["TIDEPOOL_STORAGE_ROOT", "TIDEPOOL_IMAGE_NAME", "TIDEPOOL_DEPLOY_ENVIRONMENT", "TIDEPOOL_REPOSITORY_URL"]


@pytest.mark.parametrize(
    ("given", "known", "end"),
    [
        ("TIDEPOOL_STORAGE_ROT", NEAR, "; did you mean TIDEPOOL_STORAGE_ROOT?"),
        ("TIDEPOOL_STORGE_ROOT", NEAR, "; did you mean TIDEPOOL_STORAGE_ROOT?"),
        ("TIDEPOOL_REPO_URL", NEAR, "; did you mean TIDEPOOL_REPOSITORY_URL?"),
        ("TIDEPOOL_ENVIRONMENT", NEAR, "; did you mean TIDEPOOL_DEPLOY_ENVIRONMENT?"),
        ("TIDEPOOL_TOKEN", NEAR, "; see the list"),
        ("TIDEPOOL_ENV", NEAR, "; see the list"),
        ("TIDEPOOL_STORAGE_X", NEAR, "; see the list"),
        ("managed-by", ["managed-to", "owner"], "; see the list"),
        ("Europe/Pari", ["Europe/Paris", "Europe/Prague"], "; did you mean Europe/Paris?"),
        ("europe/paris", ["Europe/Paris"], "; did you mean Europe/Paris?"),
        ("x", [], "; see the list"),
    ],
)
def test_the_nearest_name_is_near_without_what_all_names_begin_with(given: str, known: list[str], end: str) -> None:
    assert did_you_mean(given, known, "see the list") == end


def test_help_does_not_import_prefect() -> None:
    code = "import sys, tidepool.cli; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_it_prints_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tidepool.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{version('tidepool')}\n"


@pytest.mark.parametrize(
    ("called", "found", "shown"),
    [
        ("{here}/.venv/bin/tidepool", False, ".venv/bin/tidepool"),
        ("{here}/.venv/bin/tidepool", True, "tidepool"),
        ("/opt/venv/bin/tidepool", False, "tidepool"),
        ("{here}/cli.py", False, "tidepool"),
    ],
)
def test_the_next_command_is_as_it_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, shown: str, *, found: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [called.format(here=tmp_path)])
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/tidepool" if found else None)
    assert cli._called() == shown
