"""The commands as CI and users call them: the veto of a bare `prefect deploy --all`, apply, prune, rollback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

import pytest

from tests.integration.deploy_support import NIGHTLY, Shop, prefect_deploy
from tidepool import settings as settings_module
from tidepool.cli import main
from tidepool.deploy.client import connect

if TYPE_CHECKING:
    from tests.integration.deploy_support import Proxy

pytestmark = pytest.mark.timeout(280)


def tidepool(shop: Shop, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, in the shop's folder: starting Python takes seconds."""
    out, err, code = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.chdir(shop.root)
        patched.setattr(sys, "argv", ["tidepool", *arguments])
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def process(shop: Shop, proxy: Proxy, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process, in the shop's folder, against the server behind the proxy."""
    return subprocess.run(
        [sys.executable, "-m", "tidepool.cli", *arguments],
        cwd=shop.root,
        env={
            **settings_module.environment(),
            "PREFECT_API_URL": proxy.url,
            "TIDEPOOL_DEPLOY_OWNER": shop.owner,
            "PYTHONWARNINGS": "default",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bare_deploy_is_vetoed_before_the_first_write(shop: Shop, proxy: Proxy) -> None:
    for name in ("one", "two", "three"):
        shop.deployment(name, NIGHTLY)
    shop.manifest["deployments"][1]["concurency_limit"] = 1
    shop.manifest["deployments"][2]["work_pool"]["job_variables"] = {"working_dirr": "/"}
    proxy.requests.clear()
    done = shop.stock()
    assert done.returncode != 0
    assert proxy.writes == []
    assert done.stderr.count("tidepool: 2 problems; nothing was written:") == 1, done.stderr
    assert "unknown key; did you mean concurrency_limit?" in done.stderr
    assert "has no such job variable; did you mean working_dir?" in done.stderr


def test_a_bare_deploy_keeps_a_pause_and_leaves_what_is_unmanaged_alone(shop: Shop, proxy: Proxy) -> None:
    shop.deployment("one", NIGHTLY)
    assert prefect_deploy(shop.write().root, shop.manifest).exit_code == 0
    with connect() as client:
        client.pause_deployment(shop.deployments()["one"]["id"])
    assert prefect_deploy(shop.write().root, shop.manifest).exit_code == 0
    live = shop.deployments()["one"]
    # Prefect itself resumed the deployment; its schedules were paused before that.
    assert [each["active"] for each in live["schedules"]] == [False]
    with connect() as client:
        client.request("PATCH", "/deployments/{id}", path_params={"id": live["id"]}, json={"tags": ["theirs"]})
    proxy.requests.clear()
    vetoed = prefect_deploy(shop.root, shop.manifest)
    assert vetoed.exit_code == 1
    assert "exists on the server and is unmanaged (tags: theirs)" in vetoed.output
    assert proxy.writes == []


def test_plan_apply_and_prune_as_commands(shop: Shop, proxy: Proxy) -> None:
    for name in ("one", "two", "three"):
        shop.deployment(name, NIGHTLY)
    shop.write()
    planned = process(shop, proxy, "plan", "--json")
    assert planned.returncode == 0, planned.stderr
    assert len(json.loads(planned.stdout)["changes"]) == 6
    nowhere = tidepool(shop, "plan", "--output", f"{shop.root}/nowhere/plan.md")
    assert nowhere.returncode == 1
    assert "plan.md cannot be written: No such file or directory" in nowhere.stderr
    applied = tidepool(shop, "apply")
    assert applied.returncode == 0, applied.stderr
    assert f"created deployment {shop.flow}/three" in applied.stdout
    assert tidepool(shop, "plan", "--detailed-exitcode").returncode == 0

    shop.manifest["deployments"].pop(0)
    shop.write()
    for command in ("plan", "drift"):
        assert [tidepool(shop, command, *more).returncode for more in ((), ("--detailed-exitcode",))] == [0, 2]
    refused = tidepool(shop, "prune")
    assert refused.returncode == 1
    assert (
        "this would delete 1 of 3 deployments, above TIDEPOOL_DEPLOY_DELETE_SHARE=0.3; nothing was written"
        in refused.stderr
    )
    dry = tidepool(shop, "prune", "--dry-run")
    assert f"would delete deployment {shop.flow}/one" in dry.stdout
    assert set(shop.deployments()) == {"one", "two", "three"}
    assert tidepool(shop, "prune", "--yes-delete", "1").returncode == 0
    assert set(shop.deployments()) == {"two", "three"}


def test_a_server_that_does_not_answer_is_one_sentence(shop: Shop, proxy: Proxy) -> None:
    shop.deployment("one")
    shop.write()
    proxy.close()
    done = process(shop, proxy, "plan")
    assert done.returncode == 1
    assert re.search(r"tidepool: the Prefect server at \S+ does not answer: ", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["plan", "drift", "apply"])
def test_files_with_mistakes_are_their_sentences(shop: Shop, proxy: Proxy, command: str) -> None:
    del shop.deployment("one", NIGHTLY)["entrypoint"]
    shop.server_file["automations"] = [{"name": "x"}]
    shop.write()
    proxy.requests.clear()
    done = tidepool(shop, command)
    assert done.returncode == 1
    assert "deployments[one].entrypoint: missing" in done.stderr
    assert "automations[x].trigger: missing" in done.stderr
    assert proxy.writes == []


def test_a_folder_that_git_does_not_read_is_not_recorded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.deployment("one", NIGHTLY)
    shop.write()
    without = tidepool(shop, "apply")
    assert "not recorded for `tidepool rollback`: this is not a Git checkout" in without.stderr
    git(shop, "init", "--quiet", "--initial-branch=main")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # Git's own switch for its tests of this
    for entry in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(entry, str(shop.root))
    refused = tidepool(shop, "rollback")
    assert refused.returncode == 1
    assert refused.stderr.startswith("tidepool: Git does not read this folder, because it belongs to another user")
    assert refused.stderr.count("\n") == 1


def git(shop: Shop, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
    return subprocess.run(command, cwd=shop.root, capture_output=True, text=True, check=True).stdout.strip()


def test_a_rollback_applies_an_older_version_from_git(shop: Shop) -> None:
    one = shop.deployment("one", NIGHTLY, version="1")
    shop.write()
    (shop.root / ".gitignore").write_text("__pycache__/\n")
    git(shop, "init", "--quiet", "--initial-branch=main")
    git(shop, "add", "-A")
    git(shop, "commit", "--quiet", "-m", "First prices")
    applied = tidepool(shop, "apply")
    assert "recorded as deployed/production/" in applied.stdout, applied.stderr
    first = git(shop, "rev-parse", "HEAD")

    one["parameters"], one["schedules"] = {"count": 7}, [{**NIGHTLY, "cron": "0 9 * * *"}]
    shop.write()
    git(shop, "commit", "--quiet", "-am", "New prices")
    assert tidepool(shop, "apply").returncode == 0
    assert shop.deployments()["one"]["parameters"] == {"count": 7}

    listed = tidepool(shop, "rollback").stdout.splitlines()
    assert [line.split("  ")[-1] for line in listed] == ["New prices", "First prices"]
    wrong = tidepool(shop, "rollback", "--to", "abcdef0")
    assert wrong.returncode == 1
    assert "version 'abcdef0' was not deployed; known: " in wrong.stderr
    back = tidepool(shop, "rollback", "--to", first[:10])
    assert back.returncode == 0, back.stderr
    live = shop.deployments()["one"]
    assert live["parameters"] == {"count": 1}
    assert live["schedules"][0]["schedule"]["cron"] == NIGHTLY["cron"]
    assert git(shop, "worktree", "list").count("\n") == 0
    assert git(shop, "status", "--porcelain") == ""


def test_an_environment_without_an_image_leaves_no_tags_and_shows_pauses(shop: Shop) -> None:
    shop.deployment("one", NIGHTLY)
    shop.write()
    (shop.root / "environments").mkdir()
    (shop.root / "environments" / "local.yaml").write_text("image: null\nevery_deployment: {paused: true}\n")
    (shop.root / ".gitignore").write_text("__pycache__/\n")
    git(shop, "init", "--quiet", "--initial-branch=main")
    git(shop, "add", "-A")
    git(shop, "commit", "--quiet", "-m", "First prices")
    planned = tidepool(shop, "plan", "-e", "local").stdout
    assert "next: " not in planned, "Git pauses it: it does not run"
    assert "image" not in planned
    applied = tidepool(shop, "apply", "-e", "local")
    assert applied.returncode == 0, applied.stderr
    assert "recorded" not in applied.stdout
    assert git(shop, "tag") == ""
    assert "paused" not in tidepool(shop, "drift", "-e", "local").stdout
    paused = tidepool(shop, "pause", "one", "--until", "4h", "--reason", "the till is broken", "--by", "ann")
    assert paused.returncode == 0, paused.stderr
    drift = tidepool(shop, "drift", "-e", "local").stdout
    assert f"deployment {shop.flow}/one is paused for 0 min by ann, until " in drift
    assert "the till is broken" in drift
