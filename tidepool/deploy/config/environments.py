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
from tidepool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Manifest = dict[str, Any]

PRODUCTION = "production"
_OVERLAY_KEYS = ("image", "every_deployment", "deployments")
_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
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
        UsageError: the environment is unknown, its overlay does not fit prefect.yaml, or the image is not pinned by
            digest.
    """
    manifest = _read(repository, "prefect.yaml")
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
    """Return the names of all environments."""
    return sorted([PRODUCTION, *(path.stem for path in (repository / "environments").glob("*.yaml"))])


def render(
    manifest: Mapping[str, Any], overlay: Mapping[str, Any], image: str | None = None, version: str | None = None
) -> Manifest:
    """Merge an overlay into a prefect file, with image and version as in `load`; neither is changed.

    Raises:
        UsageError: the overlay has an unknown key or deployment, or schedules; the image is not pinned by digest.
    """
    for key in overlay:
        if key not in _OVERLAY_KEYS:
            raise UsageError(f"unknown key {key!r}{did_you_mean(key, _OVERLAY_KEYS)}")
    everywhere = _mapping("every_deployment", overlay.get("every_deployment") or {})
    single = _mapping("deployments", overlay.get("deployments") or {})
    known = deployment_names(manifest)
    for name, changes in [("every_deployment", everywhere), *single.items()]:
        if name not in ("every_deployment", *known):
            raise UsageError(f"unknown deployment {name!r}{did_you_mean(name, known)}")
        if "schedules" in _mapping(name, changes or {}):
            raise UsageError(f"{name} has schedules, which only prefect.yaml may define; `paused` switches them off")
    if image is not None and "image" in overlay:
        raise UsageError("this environment runs without an image: omit --image")
    if image is not None and not _DIGEST.fullmatch(image):
        raise UsageError(f"image {image!r} is not pinned by digest: use name@sha256:<64 hexadecimal digits>")

    patch: dict[str, Any] = {}
    build = manifest.get("build") or []
    rendered = {key: value for key, value in manifest.items() if key != "definitions"}
    if version is not None:  # the step that asks Git for it is not needed
        patch["version"] = version
        rendered["build"] = build = [each for each in build if (next(iter(each.values())) or {}).get("id") != _VERSION]
    if image is not None or "image" in overlay:
        patch["work_pool"] = {"job_variables": {"image": image}}
        rendered["build"] = [each for each in build if not next(iter(each)).startswith(_IMAGE_STEPS)]
        rendered["push"] = []
    rendered["deployments"] = [
        merge(merge(merge(deployment, everywhere), single.get(deployment["name"]) or {}), patch)
        for deployment in manifest["deployments"]
        if single.get(deployment["name"], {}) is not None
    ]
    return rendered


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


def deployment_names(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the deployments, in the file's order."""
    return [str(deployment["name"]) for deployment in manifest["deployments"]]


def deployment(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the deployment of that name.

    Raises:
        UsageError: it does not exist.
    """
    found: dict[str, dict[str, Any]] = {each["name"]: each for each in manifest["deployments"]}
    if name not in found:
        raise UsageError(f"unknown deployment {name!r}{did_you_mean(name, found)}")
    return found[name]


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
