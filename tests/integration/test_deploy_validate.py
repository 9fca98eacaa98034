"""The checks against a real server: what they pass deploys as written, and what they refuse is not written."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.integration.deploy_support import NIGHTLY, Shop, prefect_deploy
from tidepool import settings as settings_module
from tidepool.deploy.client import connect
from tidepool.deploy.config import checks, flows
from tidepool.deploy.reconcile import comparison
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.deploy_support import Proxy

pytestmark = pytest.mark.timeout(290)

FLOWS = '''"""Flows of a test."""

from datetime import date
from typing import Literal

from prefect import flow


@flow(name="{name}")
def sell(
    count: int = 1,
    rate: float = 0.5,
    open: bool = True,
    shop: str = "corner",
    day: date | None = None,
    sizes: list[int] | None = None,
    kinds: set[str] | None = None,
    prices: dict[str, float] | None = None,
    kind: Literal["a", "b"] = "a",
) -> int:
    """Sell something."""
    return count
'''


@pytest.fixture
def shop(shop: Shop) -> Shop:
    """The same with flows of these tests."""
    (shop.root / f"{shop.module}.py").write_text(FLOWS.format(name=shop.flow))
    return shop


STEP = {"prefect.deployments.steps.run_shell_script": {"id": "commit", "script": "echo 1.0", "stream_output": False}}


def field(config: dict[str, Any], place: str, value: Any) -> None:
    """Set a field of a deployment: `work_pool.job_variables.env`."""
    *above, last = place.split(".")
    for key in above:
        config = config.setdefault(key, {})
    config[last] = value


WRONG = [
    ("version", "{{ comit.stdout }}", "unknown step 'comit'; did you mean commit?"),
    ("version", "v{{ commit.stdot }}", "step 'commit' has no output 'stdot'; did you mean stdout?"),
    ("work_pool.job_variables.working_dir", "{{ comit.stdout }}", "unknown step 'comit'; did you mean commit?"),
    ("work_pool.job_variables.env", {"A": "{{ $SHOP_NAM }}"}, "unknown environment variable SHOP_NAM"),
    ("work_pool.job_variables.env", {"A": "{{ $SHOP_NAME }}"}, "environment variable SHOP_NAME is not set"),
    ("work_pool.job_variables.env", {"A": "{{ prefect.variables.no_such }}"}, "unknown Prefect variable 'no_such'"),
    ("parameters.shop", "{{ prefect.blocks.json.no-such }}", "the server has no such block"),
    ("parameters.shop", "{{ comit.stdout }}", "unknown step 'comit'; did you mean commit?"),
    ("parameters.shop", "{{ $SHOP_NAME | default('y') }}", "is not a name, so Prefect leaves it as text"),
    ("work_pool.work_queue_name", "{{ comit.stdout }}", "unknown step 'comit'; did you mean commit?"),
    ("entrypoint", "{{ comit.stdout }}.sell", "unknown step 'comit'; did you mean commit?"),
    ("tags", ["{{ comit.stdout }}"], "unknown step 'comit'; did you mean commit?"),
    ("description", "docs/runbooks/d.md {{ $TIDEPOOL_REPO_URL }}", "did you mean TIDEPOOL_REPOSITORY_URL?"),
]


def test_wrong_placeholders_stop_a_bare_deploy_before_the_first_write(shop: Shop, proxy: Proxy) -> None:
    """Each is a problem of its own, with the exit code of one (tests/unit/test_validate_rules.py): here all at once."""
    (shop.root / "pyproject.toml").write_text('[tool.tidepool]\nvariables = ["SHOP_NAME"]\nrunbooks = false\n')
    other = {"prefect.deployments.steps.run_shell_script": {"id": "other", "script": "echo {{ comit.stdout }}"}}
    shop.manifest["build"] += [STEP, other]
    shop.deployment("good", NIGHTLY)
    for index, (place, text, _) in enumerate(WRONG):
        field(shop.deployment(f"d{index}", NIGHTLY), place, text)
    proxy.requests.clear()
    done = shop.stock()
    assert done.returncode == 1
    assert proxy.writes == []
    for index, (place, _, message) in enumerate(WRONG):
        lines = [
            each for each in done.stderr.splitlines() if f"[d{index}].{place}" in each and "managed-by" not in each
        ]
        assert message in lines[0]  # Prefect repeats them
    assert "build[2].prefect.deployments.steps.run_shell_script.script: {{ comit.stdout }}: unknown step" in done.stderr
    with pytest.raises(UsageError, match="problem"):
        shop.apply()
    assert proxy.writes == []


def test_what_a_placeholder_stands_for_is_deployed_and_no_warning_is_logged(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (shop.root / "pyproject.toml").write_text('[tool.tidepool]\nmay_be_empty = ["SHOP_SUFFIX"]\n')
    monkeypatch.setenv("SHOP_NAME", "corner")
    monkeypatch.setenv("SHOP_SUFFIX", "x")  # so that it is put back afterwards
    monkeypatch.delenv("SHOP_SUFFIX")
    shop.manifest["build"].append(STEP)
    shop.deployment("one", NIGHTLY, version="{{ commit.stdout }}", parameters={"shop": "{{ $SHOP_NAME }}"})
    shop.manifest["deployments"][0]["work_pool"]["job_variables"] = {
        "env": {"A": "a{{ $SHOP_SUFFIX }}", "B": "{{ ctx.flow_run.name }}"}
    }
    with caplog.at_level(logging.WARNING):
        assert prefect_deploy(shop.write().root, shop.manifest).exit_code == 0
    live = shop.deployments()["one"]
    assert live["version"] == "1.0"
    assert live["parameters"] == {"shop": "corner"}
    assert live["job_variables"] == {"env": {"A": "a", "B": "{{ ctx.flow_run.name }}"}}
    assert "placeholder" not in caplog.text


def test_validate_with_a_server_reports_a_missing_work_pool_without_naming_the_environment(
    shop: Shop, proxy: Proxy
) -> None:
    def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tidepool.cli", "validate", *arguments]
        variables = {"PREFECT_API_URL": proxy.url, "TIDEPOOL_DEPLOY_OWNER": shop.owner}
        environment = {**settings_module.environment(), **variables}
        return subprocess.run(command, cwd=shop.root, env=environment, capture_output=True, text=True, check=False)

    shop.deployment("one", work_pool={"name": f"{shop.pool}x"})
    (shop.root / "environments").mkdir()
    # The server is production's: it need not have the pools of other environments.
    overlay = {"image": None, "every_deployment": {"work_pool": {"name": "laptop"}}}
    (shop.root / "environments" / "local.yaml").write_text(yaml.safe_dump(overlay))
    shop.write()
    done = validate()
    assert done.returncode == 1
    (head, line) = done.stderr.splitlines()
    assert head == "tidepool: 1 problem:"
    assert line.endswith(f"deployments[one].work_pool.name: the server has no work pool '{shop.pool}x'; known: none")
    shop.manifest["deployments"][0]["work_pool"]["name"] = shop.pool
    shop.write()
    assert validate().stdout == "no problems: local, production\n"
    assert validate("-e", "local").returncode == 1


def test_validate_warns_of_links_that_lead_nowhere_in_production(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.deployment("one")
    shop.write()

    def warned(*arguments: str, url: str = "") -> str:
        command = [sys.executable, "-m", "tidepool.cli", "validate", *arguments]
        variables = {"TIDEPOOL_REPOSITORY_URL": url, "PREFECT_API_URL": "", "TIDEPOOL_DEPLOY_OWNER": shop.owner}
        environment = {**settings_module.environment(), **variables}
        done = subprocess.run(command, cwd=shop.root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert warned("-e", "production").startswith("warning: TIDEPOOL_REPOSITORY_URL is empty")
    assert warned("-e", "production", url="https://host/owner/name/blob/main") == ""
    assert warned() == ""


def test_a_renamed_schedule_without_replaces_does_not_lose_its_pause(shop: Shop, proxy: Proxy) -> None:
    one = shop.deployment("one", NIGHTLY)
    shop.apply()
    live = shop.deployments()["one"]
    with connect() as client:
        client.update_deployment_schedule(live["id"], live["schedules"][0]["id"], active=False)
    one["schedules"] = [{**NIGHTLY, "slug": "late"}]
    assert shop.plan().changes
    proxy.requests.clear()
    with pytest.raises(UsageError, match="if late is its new name, write `replaces: nightly` there"):
        shop.apply()
    vetoed = prefect_deploy(shop.write().root, shop.manifest)
    assert vetoed.exit_code == 1
    assert proxy.writes == []
    one["schedules"][0]["replaces"] = "nightly"
    shop.apply()
    assert [(each["slug"], each["active"]) for each in shop.deployments()["one"]["schedules"]] == [("late", False)]
    # What is not paused may go, and what is new may come, at once.
    one["schedules"] = [{**NIGHTLY, "slug": "late"}]
    with connect() as client:
        live = shop.deployments()["one"]
        client.update_deployment_schedule(live["id"], live["schedules"][0]["id"], active=True)
    one["schedules"] = [{**NIGHTLY, "slug": "early"}]
    shop.apply()
    assert [(each["slug"], each["active"]) for each in shop.deployments()["one"]["schedules"]] == [("early", True)]


def test_a_bare_deploy_does_not_start_a_paused_deployment_by_a_new_schedule(shop: Shop, proxy: Proxy) -> None:
    one = shop.deployment("one", NIGHTLY)
    shop.apply()
    with connect() as client:
        client.pause_deployment(shop.deployments()["one"]["id"])
    one["schedules"].append({**NIGHTLY, "slug": "late"})
    proxy.requests.clear()
    assert prefect_deploy(shop.write().root, shop.manifest).exit_code == 1
    assert proxy.writes == []
    shop.apply()
    assert shop.deployments()["one"]["paused"] is True


VALUES = st.one_of(
    st.sampled_from(
        [1, "1", "x", 1.0, 1.5, "1.5", True, "yes", "true", None, "2026-01-01", [], [1], ["1"], ["a", "a"]]
    ),
    st.sampled_from(
        [{}, {"a": 1}, {"a": "1"}, {"a": None}, "a", "c", 0, "", "{{ commit.stdout }}", "{{ $SHOP_NAME }}"]
    ),
)
NAMES = st.sampled_from(["count", "rate", "open", "shop", "day", "sizes", "kinds", "prices", "kind"])


@settings(
    max_examples=4,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.lists(st.tuples(NAMES, VALUES, st.booleans()), min_size=12, max_size=12))
def test_a_parameter_that_is_passed_is_taken_by_the_server_and_by_the_flow(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[str, object, bool]]
) -> None:
    monkeypatch.setenv("SHOP_NAME", "7")
    shop.manifest["build"] = [{checks.STEP: {}}, STEP]
    shop.manifest["deployments"].clear()
    for index, (name, value, enforced) in enumerate(drawn):
        if name in {"day", "kind"} and "{{ commit" in str(value):
            continue  # whether a step's text is a date, or one of some texts, shows when the step has run
        # Without the server's check, whether a step's text is right depends on the text.
        checked = enforced or "{{ commit" in str(value)
        shop.deployment(f"d{index}", NIGHTLY, parameters={name: value}, enforce_parameter_schema=checked)
    shop.write()
    with connect() as client:
        found = comparison.check(client, shop.root, "production", shop.owner, deploying=True)
        refused = set(re.findall(r"deployments\[(d\d+)\]", " ".join(map(str, found))))
        if not (passed := [each for each in shop.manifest["deployments"] if each["name"] not in refused]):
            return
        done = prefect_deploy(shop.root, {**shop.manifest, "build": [STEP], "deployments": passed})
        assert done.exit_code == 0, done.output
        live = shop.deployments()
        flow = flows.load(shop.root, f"{shop.module}.sell")
        for config in passed:
            run = client.create_flow_run_from_deployment(live[config["name"]]["id"])
            flow.validate_parameters(run.parameters)
