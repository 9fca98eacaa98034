"""Steps that prefect.yaml calls.

`prefect deploy` runs the build steps of a deployment after reading its entry and before its first write. A first step
that checks the whole file and raises is thus a veto: nothing is written, whichever deployment has the problem.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

from tidepool.deploy.client import connect, set_schedules_active
from tidepool.deploy.config import automations, checks, environments, flows, yaml_source
from tidepool.deploy.config.yaml_source import Problem, raise_if_any
from tidepool.deploy.reconcile import actual, comparison
from tidepool.errors import UsageError
from tidepool.settings import repository, settings

_OPTION = "--prefect-file"


def validate() -> dict[str, str]:
    """Veto the deploy if there is a problem in the file that it reads; once per command.

    It also keeps pauses: Prefect's update resumes a paused deployment, but leaves its schedules alone. Therefore the
    pause is moved to the schedules first.

    Raises:
        UsageError: all problems, with their lines.
    """
    try:
        _validate(_prefect_file())
    except UsageError as error:
        # Prefect's own output names the step, but not the problems.
        sys.stderr.write(f"tidepool: {error}\n")
        raise
    return {}


@cache
def pin_image(image: str) -> dict[str, str]:
    """Look up the digest of a pushed image; once per command. The push step of prefect-docker returns only the tag.

    Args:
        image: `name:tag`.

    Returns:
        `image`: `name@sha256:…`, as the registry has it.

    Raises:
        UsageError: the registry does not have it, with docker's own message.
    """
    name = image.rpartition(":")[0]
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", f"{name}@{{{{.Manifest.Digest}}}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"image {image} has no digest in its registry: {done.stderr.strip()}")
    return {"image": done.stdout.strip()}


@cache
def _validate(file: Path) -> None:
    owner, root = settings().deploy.owner, repository()
    tag = automations.owner_tag(owner)
    with connect(retries=5) as client:
        content = yaml_source.read(file, file.name)
        templates = comparison.templates(client, checks.pools(content.data))
        raise_if_any(checks.check(root, owner=owner, file=file, templates=templates))
        listed = content.data["deployments"]
        names = {f"{flows.load(root, each['entrypoint']).name}/{each['name']}": i for i, each in enumerate(listed)}
        found = actual.read_deployments(client, tag, environments.deployment_names(content.data))
        existing = {name: each for name, each in found.items() if name in names}
        raise_if_any(
            [
                Problem(
                    content.name,
                    content.line(("deployments", names[name], "name")),
                    f"deployment {name} exists on the server and is unmanaged (tags: "
                    f"{', '.join(each['tags']) or 'none'}): give yours another name, or add {tag} to the existing one",
                )
                for name, each in existing.items()
                if tag not in each["tags"]
            ]
        )
        for name, each in existing.items():
            if each["paused"] and "paused" not in listed[names[name]]:
                set_schedules_active(client, each, active=False)


def _prefect_file() -> Path:
    """Return the file that this `prefect deploy` reads."""
    arguments = sys.argv[1:]
    for index, argument in enumerate(arguments):
        if argument == _OPTION and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith(f"{_OPTION}="):
            return Path(argument.split("=", 1)[1])
    return Path(checks.FILE)
