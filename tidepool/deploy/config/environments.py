"""The prefect file of an environment: prefect.yaml describes production, an overlay changes it.

An overlay (`environments/<name>.yaml`) holds only differences, as JSON merge patches (RFC 7396: mappings are merged,
`null` removes, anything else replaces)::

    image: null                       # optional: run without an image, so without building one
    every_deployment: {paused: true}  # optional: for each deployment
    deployments:                      # optional: for one deployment, by name
      csv-etl: {parameters: {increment: 2}}
      drift-report: null              # omitted in this environment

Schedules cannot be in an overlay: they are defined once, in prefect.yaml.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.deploy.config import yaml_source
from tidepool.deploy.config.yaml_source import path
from tidepool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tidepool.deploy.config.yaml_lines import Finding, Place

Manifest = dict[str, Any]

PRODUCTION = "production"
_OVERLAY_KEYS = ("image", "every_deployment", "deployments")
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
_IMAGE_STEPS = "prefect_docker."
_VERSION = "commit"


def load(repository: Path, environment: str, image: str | None = None, version: str | None = None) -> Manifest:
    """Return the prefect file of one environment.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: `production` (prefect.yaml as it is) or the name of an overlay in `environments/`.
        image: An existing image to use, as `name@sha256:…`, instead of building one.
        version: Version of the deployments, for a folder that is not a Git checkout.

    Raises:
        UsageError: the environment is unknown, prefect.yaml has no list of deployments or its overlay does not fit it,
            or the image is not pinned by digest.
    """
    manifest = _read(repository, "prefect.yaml")
    if not isinstance(manifest.get("deployments"), list):
        raise UsageError("prefect.yaml: `deployments` must be a list, each with a name")
    if environment == PRODUCTION:
        return render(manifest, {}, image, version)
    known = names(repository)
    if environment not in known:
        raise UsageError(f"unknown environment {environment!r}{did_you_mean(environment, known)}")
    overlay = _read(repository, f"environments/{environment}.yaml")
    try:
        return render(manifest, overlay, image, version)
    except UsageError as error:
        raise UsageError(f"environment {environment}: {error}") from None


def names(repository: Path) -> list[str]:
    """Return the names of all environments.

    Raises:
        UsageError: there is something called `environments` that is not a folder which this user may read.
    """
    try:
        listed = list((repository / "environments").iterdir())
    except FileNotFoundError:
        return [PRODUCTION]
    except OSError as error:
        raise UsageError(f"the folder environments cannot be read: {error.strerror}") from error
    return sorted([PRODUCTION, *(path.stem for path in listed if path.suffix == ".yaml")])


def render(
    manifest: Mapping[str, Any], overlay: Mapping[str, Any], image: str | None = None, version: str | None = None
) -> Manifest:
    """Merge an overlay into a prefect file, with image and version as in `load`; neither is changed.

    Raises:
        UsageError: the overlay has an unknown key or deployment, or schedules; the image is not pinned by digest.
    """
    if found := problems(manifest, overlay):
        raise UsageError("; ".join(f"{path(place)}: {message}" for place, message in found))
    if image is not None and "image" in overlay:
        raise UsageError("this environment runs without an image: omit --image")
    if image is not None and not DIGEST.fullmatch(image):
        raise UsageError(f"image {image!r} is not pinned by digest: use name@sha256:<64 hexadecimal digits>")
    return assemble(manifest, overlay, image, version)[0]


def assemble(
    manifest: Mapping[str, Any], overlay: Mapping[str, Any], image: str | None = None, version: str | None = None
) -> tuple[Manifest, list[int]]:
    """Return the merged prefect file, and the position in prefect.yaml of each of its deployments.

    What is not a deployment, or is wrong with the overlay (`problems`), is left out.
    """
    patch: dict[str, Any] = {}
    build = _list(manifest.get("build"))
    rendered = {key: value for key, value in manifest.items() if key != "definitions"}
    if version is not None:  # the step that asks Git for it is not needed
        patch["version"] = version
        rendered["build"] = build = [each for each in build if _step(each)[1].get("id") != _VERSION]
    if image is not None or "image" in overlay:
        patch["work_pool"] = {"job_variables": {"image": image}}
        rendered["build"] = [each for each in build if not _step(each)[0].startswith(_IMAGE_STEPS)]
        rendered["push"] = []
    everywhere, single = _patch(overlay.get("every_deployment")), _dict(overlay.get("deployments"))
    positions, deployments = [], []
    for index, deployment in enumerate(_list(manifest.get("deployments"))):
        own = single.get(str(_dict(deployment).get("name")), {})
        if isinstance(deployment, dict) and own is not None:
            positions.append(index)
            deployments.append(merge(merge(merge(deployment, everywhere), _patch(own)), patch))
    rendered["deployments"] = deployments
    return rendered, positions


def runs_an_image(repository: Path, environment: str) -> bool:
    """Return False if the overlay of an environment has `image: null`: it runs what is in the working folder."""
    return environment == PRODUCTION or "image" not in _read(repository, f"environments/{environment}.yaml")


def problems(manifest: Any, overlay: Any) -> list[Finding]:
    """Return all that is wrong with an overlay, with places inside it: keys, names, and what it may not change."""
    if not isinstance(overlay, dict):
        return [((), f"it must be a mapping, not {type(overlay).__name__}")]
    found: list[Finding] = [
        ((key,), f"unknown key{did_you_mean(str(key), _OVERLAY_KEYS)}") for key in overlay if key not in _OVERLAY_KEYS
    ]
    if overlay.get("image") is not None:
        found.append((("image",), "only null is possible: the environment runs without an image"))
    known = deployment_names(manifest)
    patches: list[tuple[Place, Any]] = [(("every_deployment",), overlay.get("every_deployment") or {})]
    single = overlay.get("deployments") or {}
    if not isinstance(single, dict):
        found.append((("deployments",), f"must be a mapping, not {type(single).__name__}"))
        single = {}
    for name, patch in single.items():
        if name in known:
            patches.append((("deployments", name), {} if patch is None else patch))
        elif known:  # else there are none, which is a problem of its own
            found.append((("deployments", name), f"unknown deployment {name!r}{did_you_mean(str(name), known)}"))
    for place, patch in patches:
        if not isinstance(patch, dict):
            found.append((place, f"must be a mapping, not {type(patch).__name__}"))
        elif "schedules" in patch:
            message = "schedules are written in prefect.yaml only; `paused` switches them off"
            found.append(((*place, "schedules"), message))
    return found


def _patch(value: Any) -> dict[str, Any]:
    """Return a patch of a deployment without its schedules."""
    return {key: item for key, item in _dict(value).items() if key != "schedules"}


def _step(entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of a step and its inputs."""
    name, inputs = next(iter(_dict(entry).items()), ("", {}))
    return str(name), _dict(inputs)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def merge(base: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396) and return the result; neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def deployment_names(manifest: Any) -> list[str]:
    """Return the names of the deployments, in the file's order."""
    named = (_dict(each).get("name") for each in _list(_dict(manifest).get("deployments")))
    return [name for name in named if isinstance(name, str)]


def deployment(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the deployment of that name.

    Raises:
        UsageError: it does not exist, or is not the only one.
    """
    found: list[dict[str, Any]] = [each for each in manifest["deployments"] if each.get("name") == name]
    if not found:
        raise UsageError(f"unknown deployment {name!r}{did_you_mean(name, deployment_names(manifest))}")
    if len(found) > 1:
        raise UsageError(f"{len(found)} deployments have the name {name!r}; each needs its own")
    return found[0]


def to_yaml(manifest: Mapping[str, Any]) -> str:
    """Return the prefect file as YAML without anchors, for `prefect deploy --prefect-file`."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read(repository: Path, name: str) -> Manifest:
    return _mapping(name, yaml_source.read(repository / name, name).data)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be a mapping, not {type(value).__name__}")
    return value


class _Dumper(yaml.SafeDumper):
    """A dumper for people who read and compare: values instead of anchors, long texts as blocks."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - the interface of dumpers
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)
