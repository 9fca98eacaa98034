"""Steps that prefect.yaml calls.

`prefect deploy` runs the build steps of a deployment after reading its entry and before its first write. A first step
that checks the whole file and raises is thus a veto: nothing is written, whichever deployment has the problem.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tidepool.deploy.client import connect, set_schedules_active
from tidepool.deploy.config import automations, checks, environments, flows, house_rules, yaml_source
from tidepool.deploy.config.yaml_source import raise_if_any
from tidepool.deploy.reconcile import actual, comparison
from tidepool.deploy.reconcile.plan import lost_pause
from tidepool.errors import UsageError
from tidepool.settings import repository, set_empty_variables, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidepool.deploy.client import Json
    from tidepool.deploy.config.yaml_lines import Place


class NoOutputs(TypedDict):
    """The outputs of a step that has none: `{{ … }}` cannot refer to it."""


class PinnedImage(TypedDict):
    """The outputs of `pin_image`.

    Attributes:
        image: `name@sha256:…`, as the registry has it.
    """

    image: str


def validate() -> NoOutputs:
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
def pin_image(image: str) -> PinnedImage:
    """Look up the digest of a pushed image; once per command. The push step of prefect-docker returns only the tag.

    Args:
        image: `name:tag`.

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
        known = comparison.server(client, content.data, {})
        refusal = "nothing was written"
        raise_if_any(checks.check(root, owner=owner, file=file, server=known, deploying=True), refusal)
        set_empty_variables(house_rules.load(root)[0].may_be_empty)
        found = actual.read_deployments(client, tag, environments.deployment_names(content.data))
        problems, paused = [], []
        for index, config in enumerate(content.data["deployments"]):
            name = f"{flows.load(root, config['entrypoint']).name}/{config['name']}"
            if (each := found.get(name)) is None:
                continue
            place: Place = ("deployments", index, "name")
            if tag not in each["tags"]:
                message = (
                    f"deployment {name} exists on the server and is unmanaged (tags: "
                    f"{', '.join(each['tags']) or 'none'}): give yours another name, or add {tag} to the existing one"
                )
                problems.append(content.problem(place, message))
                continue
            if each["paused"] and "paused" not in config:
                paused.append(each)
            problems += [content.problem(place, message) for message in _lost_pauses(name, config, each)]
        raise_if_any(problems, refusal)
        for each in paused:
            set_schedules_active(client, each, active=False)


def _lost_pauses(name: str, config: dict[str, Any], existing: Json) -> Iterator[str]:
    """Yield what Prefect's update would start although it is paused: it makes new schedules, all of them active."""
    listed = config.get("schedules") or []
    kept = {each.get("replaces") or each["slug"] for each in listed} | {each["slug"] for each in listed}
    there = {each["slug"] for each in existing["schedules"]}
    new = [each["slug"] for each in listed if not {each["slug"], each.get("replaces")} & there]
    if not new or config.get("paused"):
        return
    if existing["paused"]:
        slugs = ", ".join(new)
        yield f"{name} is paused on the server, and would run by its new schedule {slugs}: use `tidepool apply`"
    for each in existing["schedules"]:
        if each["slug"] and not each["active"] and each["slug"] not in kept:
            yield lost_pause(f"{name}#{each['slug']}", new)


def _prefect_file() -> Path:
    """Return the file that this `prefect deploy` reads."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prefect-file", type=Path, default=checks.FILE)
    file: Path = parser.parse_known_args()[0].prefect_file
    return file
