"""Steps that prefect.yaml calls.

`prefect deploy` runs the build steps of a deployment after reading its entry and before its first write. A first step
that checks the whole file and raises is thus a veto: nothing is written, whichever deployment is wrong.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import automations, checks, environments, flows, yaml_source
from tidepool.deploy.config.problems import Problem, raise_if_any
from tidepool.deploy.reconcile import actual, comparison
from tidepool.errors import UsageError
from tidepool.settings import repository, settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_OPTION = "--prefect-file"


def validate() -> dict[str, str]:
    """Vetoes the deploy if anything is wrong with the file that it reads; once per command.

    It also keeps pauses: Prefect's update resumes a deployment that somebody paused, and leaves its schedules alone. So
    the pause is carried over to the schedules first.

    Raises:
        UsageError: all problems, with their lines.
    """
    try:
        _validate(_prefect_file())
    except UsageError as error:
        # Prefect's own output names the step, and not what it found.
        sys.stderr.write(f"tidepool: {error}\n")
        raise
    return {}


@cache
def pin_image(image: str) -> dict[str, str]:
    """Finds the digest of an image that was pushed; once per command. prefect-docker's push step tells only the tag.

    Args:
        image: `name:tag`.

    Returns:
        `image`: `name@sha256:…`, as the registry has it.

    Raises:
        UsageError: the registry does not have it, with docker's own sentence.
    """
    name = image.rpartition(":")[0]
    asked = ["docker", "buildx", "imagetools", "inspect", image, "--format", f"{name}@{{{{.Manifest.Digest}}}}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"image {image} has no digest in its registry: {done.stderr.strip()}")
    return {"image": done.stdout.strip()}


@cache
def _validate(file: Path) -> None:
    owner = settings().deploy.owner
    root = repository()
    is_own = file.resolve() == (root / checks.FILE).resolve()
    with actual.connect(retries=5) as client:
        content = yaml_source.read(file, file.name)
        found = comparison.templates(client, checks.pools(content.data))
        problems = checks.check(root, owner=owner, file=None if is_own else file, templates=found)
        if not problems:
            listed = content.data["deployments"]
            tag = automations.owner_tag(owner)
            loaded = [flows.load(root, each["entrypoint"]) for each in listed]
            names = {f"{flow.name}/{listed[index]['name']}": index for index, flow in enumerate(loaded)}
            there = actual.read_deployments(client, tag, environments.deployment_names(content.data))
            problems += [
                Problem(
                    content.name,
                    content.line(("deployments", names[name], "name")),
                    f"deployment {name} exists on the server and is not ours (tags: "
                    f"{', '.join(each['tags']) or 'none'}): give yours another name, or add {tag} to the existing one",
                )
                for name, each in there.items()
                if name in names and tag not in each["tags"]
            ]
        raise_if_any(problems)
        wanted = {name: listed[index] for name, index in names.items()}
        for name, each in there.items():
            if name in wanted and each["paused"] and "paused" not in wanted[name]:
                _carry_over(client, each)


def _carry_over(client: SyncPrefectClient, deployment: dict[str, Any]) -> None:
    for schedule in deployment["schedules"]:
        if schedule["active"]:
            client.request(
                "PATCH",
                "/deployments/{id}/schedules/{schedule_id}",
                path_params={"id": deployment["id"], "schedule_id": schedule["id"]},
                json={"active": False},
            )


def _prefect_file() -> Path:
    """The file that this `prefect deploy` reads."""
    arguments = sys.argv[1:]
    for index, argument in enumerate(arguments):
        if argument == _OPTION and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith(f"{_OPTION}="):
            return Path(argument.split("=", 1)[1])
    return Path(checks.FILE)
