"""prefect.yaml as an environment sees it: production's truth with the environment's overlay merged in.

An overlay (`environments/<name>.yaml`) holds only differences, as JSON merge patches (RFC 7396: mappings are merged,
`null` removes, anything else replaces)::

    image: null                       # optional: run without an image, so without building one
    every_deployment: {paused: true}  # optional: for each deployment
    deployments:                      # optional: for one deployment, by name
      csv-etl: {parameters: {increment: 2}}
      drift-report: null              # it is left out

Schedules cannot be in an overlay: they are written once, in prefect.yaml.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, cast

import yaml

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Manifest = dict[str, Any]

PRODUCTION = "production"
_OVERLAY_KEYS = ("image", "every_deployment", "deployments")
_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
_IMAGE_STEPS = "prefect_docker."
_VERSION_STEP = "commit"


def load(repository: Path, environment: str, image: str | None = None, version: str | None = None) -> Manifest:
    """The prefect file of one environment.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: `production` (prefect.yaml as it is) or the name of an overlay in `environments/`.
        image: An image that exists already, as `name@sha256:…`, in the place of building one.
        version: Version of the deployments, where there is no Git checkout to ask for it.

    Raises:
        UsageError: the environment is unknown, its overlay does not fit prefect.yaml, or the image is no digest.
    """
    manifest = _read(repository / "prefect.yaml")
    if environment == PRODUCTION:
        return render(manifest, {}, image, version)
    overlay = repository / "environments" / f"{environment}.yaml"
    if environment not in names(repository):
        raise UsageError(unknown("environment", environment, names(repository)))
    try:
        return render(manifest, _read(overlay), image, version)
    except UsageError as error:
        raise UsageError(f"environment {environment}: {error}") from None


def names(repository: Path) -> list[str]:
    """The environments that there are."""
    return sorted([PRODUCTION, *(path.stem for path in (repository / "environments").glob("*.yaml"))])


def render(
    manifest: Mapping[str, Any], overlay: Mapping[str, Any], image: str | None = None, version: str | None = None
) -> Manifest:
    """Merges an overlay into a prefect file. Neither is changed.

    Args:
        manifest: What prefect.yaml holds.
        overlay: What an environment changes.
        image: As in `load`.
        version: As in `load`.

    Raises:
        UsageError: the overlay has a key or a deployment that does not exist, or schedules; the image is no digest.
    """
    for key in overlay:
        if key not in _OVERLAY_KEYS:
            raise UsageError(unknown("key", key, _OVERLAY_KEYS))
    everywhere = overlay.get("every_deployment") or {}
    single = overlay.get("deployments") or {}
    known = deployment_names(manifest)
    for name, patch in [("every_deployment", everywhere), *single.items()]:
        if name not in ("every_deployment", *known):
            raise UsageError(unknown("deployment", name, known))
        if "schedules" in (patch or {}):
            raise UsageError(f"{name} has schedules: they are written in prefect.yaml only; `paused` switches them off")

    rendered = {key: value for key, value in manifest.items() if key != "definitions"}
    rendered["deployments"] = [
        merge(merge(deployment, everywhere), single.get(deployment["name"]) or {})
        for deployment in manifest["deployments"]
        if single.get(deployment["name"], {}) is not None
    ]
    if version is not None:
        rendered = _with_version(rendered, version)
    if image is None and "image" not in overlay:
        return rendered
    return _with_image(rendered, _checked(image, overlay))


def merge(base: Any, patch: Any) -> Any:
    """Applies a JSON merge patch (RFC 7396) and returns the result; neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def deployment_names(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the deployments, in the file's order."""
    return [str(deployment["name"]) for deployment in manifest["deployments"]]


def deployment(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The deployment of that name.

    Raises:
        UsageError: there is none.
    """
    for found in manifest["deployments"]:
        if found["name"] == name:
            return cast("dict[str, Any]", found)
    raise UsageError(unknown("deployment", name, deployment_names(manifest)))


def to_yaml(manifest: Mapping[str, Any]) -> str:
    """The prefect file as YAML, without anchors: what `prefect deploy --prefect-file` takes."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def unknown(kind: str, given: str, known: Sequence[str]) -> str:
    """The sentence for a name that is none of the known ones, with the nearest right one."""
    near = difflib.get_close_matches(given, known, n=1)
    hint = f", did you mean {near[0]}?" if near else ";"
    return f"{kind} {given!r} is unknown{hint} known: {', '.join(known)}"


def _with_version(manifest: Manifest, version: str) -> Manifest:
    """Has that version in the place of the one that a step asks Git for."""
    steps = manifest.get("build") or []
    build = [step for step in steps if (next(iter(step.values())) or {}).get("id") != _VERSION_STEP]
    return {
        **manifest,
        "build": build,
        "deployments": [merge(each, {"version": version}) for each in manifest["deployments"]],
    }


def _checked(image: str | None, overlay: Mapping[str, Any]) -> str | None:
    """The image, if the environment runs one and it is named by digest."""
    if image is None:
        return None
    if "image" in overlay:
        raise UsageError("it runs without an image: leave --image out")
    if not _DIGEST.fullmatch(image):
        raise UsageError(f"image {image!r} is no digest: give name@sha256:<64 hexadecimal digits>")
    return image


def _with_image(manifest: Manifest, image: str | None) -> Manifest:
    """Runs that image, or none, in the place of the one that the steps build; other steps (the version) stay."""
    build = [step for step in manifest.get("build") or [] if not next(iter(step)).startswith(_IMAGE_STEPS)]
    patch = {"work_pool": {"job_variables": {"image": image}}}
    return {
        **manifest,
        "build": build,
        "push": [],
        "deployments": [merge(each, patch) for each in manifest["deployments"]],
    }


def _read(path: Path) -> Manifest:
    """A YAML file that holds a mapping.

    Raises:
        UsageError: it is not readable as that.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path.name} must hold a mapping, not {type(content).__name__}")
    return content


class _Dumper(yaml.SafeDumper):
    """Writes every value out, and long texts as blocks, so that a person can read and compare the result."""

    def ignore_aliases(self, data: object) -> bool:
        """No anchors, whatever the data."""
        del data
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
