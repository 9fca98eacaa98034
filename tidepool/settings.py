"""Every setting of tidepool: one frozen model, read from `TIDEPOOL_*` variables. Nothing else reads the environment.

A setting's variable is `TIDEPOOL_<GROUP>_<FIELD>`: `TIDEPOOL_STORAGE_ROOT` is `settings().storage.root`. A `TIDEPOOL_*`
name that is no setting is an error with the nearest right name: a misspelt one would otherwise be ignored silently.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidepool.errors import UsageError

PREFIX = "TIDEPOOL_"

Provider = Literal["local", "threads", "address", "kubernetes"]
SizeName = Literal["small", "medium", "large"]


class _Group(BaseModel):
    """A group of settings: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageSettings(_Group):
    """Where outputs are written."""

    root: str = Field(
        default="file://.tidepool/storage",
        description="URL of the folder that every output is written under: file://, s3:// or memory://. "
        "A relative file:// path starts at the current folder.",
    )
    anonymous: bool = Field(
        default=False,
        description="Read s3:// without credentials, as public data sets allow. Off: the usual AWS_* chain.",
    )
    timeout_seconds: float = Field(
        default=60, gt=0, description="Seconds that one request to a store may take before it fails."
    )


class ComputeSettings(_Group):
    """Where mapped tasks run."""

    provider: Provider = Field(
        default="local",
        description="local: a Dask cluster of processes on this machine; threads: threads of the flow-run process; "
        "address: an existing Dask scheduler; kubernetes: a Dask cluster of pods per run.",
    )
    address: str = Field(
        default="", description="Address of the scheduler (tcp://host:8786) when the provider is `address`."
    )
    inline_rows: int = Field(
        default=200_000,
        ge=0,
        description="Rows of work (items times rows of each) up to which a flow does mapped work in its own process "
        "instead of starting a cluster.",
    )
    argument_limit_bytes: int = Field(
        default=256 * 1024,
        gt=0,
        description="Bytes that one argument or result of a mapped task may have, serialised; "
        "larger data travels by reference.",
    )
    worker_losses: int = Field(
        default=3,
        ge=1,
        description="How often a mapped task may lose its worker before it is given up as Crashed; a task whose own "
        "`retries` are more may lose one worker per retry.",
    )
    no_worker_seconds: float = Field(
        default=300, gt=0, description="Seconds that mapped tasks wait for a cluster that has no worker at all."
    )
    close_seconds: float = Field(
        default=60,
        gt=0,
        description="Seconds that closing a cluster may take: task runs closed, logs and events sent, workers stopped.",
    )


class KubernetesSettings(_Group):
    """Dask clusters of pods. The first five come by themselves in a driver pod, from the base job template."""

    namespace: str = Field(
        default="", description="Namespace of the Dask cluster. Empty: the driver pod's, else the kubeconfig's."
    )
    pod_name: str = Field(
        default="",
        description="Name of the driver's pod: the Dask pods get its image, variables and place. Empty: no pod.",
    )
    job_name: str = Field(default="", description="Name of the run's Job, which owns the run's Dask clusters.")
    job_uid: str = Field(default="", description="UID of the run's Job.")
    image: str = Field(
        default="", description="Image of scheduler and workers. Empty: the driver's own, by the digest that it runs."
    )
    max_workers: int = Field(
        default=50, ge=1, description="Workers that all Dask clusters of one run may have together."
    )
    max_cpu: float = Field(default=100, gt=0, description="CPU cores that all workers of one run may request together.")
    max_memory_gib: float = Field(
        default=400, gt=0, description="Memory that all workers of one run may have together, GiB."
    )
    adaptive_minimum: int = Field(
        default=0,
        ge=0,
        description="Workers that an adaptive cluster keeps when it has little to do; it grows to the size's workers. "
        "0: not adaptive, always the size's workers.",
    )
    scheduler_cpu: float = Field(default=0.25, gt=0, description="CPU cores that a scheduler requests.")
    scheduler_memory_gib: float = Field(default=1.0, gt=0, description="Memory limit of a scheduler, GiB.")
    scratch_gib: float = Field(default=10, gt=0, description="Disk that a worker may use for /tmp and to spill, GiB.")
    worker_node_selector: dict[str, str] = Field(
        default={},
        description="Labels of the nodes for workers, as JSON. Empty: the driver's, as for the scheduler.",
    )
    worker_tolerations: list[dict[str, str | int]] = Field(
        default=[], description="Tolerations of workers besides the driver's, as JSON; spot nodes usually need one."
    )
    worker_priority_class: str = Field(
        default="", description="PriorityClass of workers; lower than the driver's. Empty: the cluster's default."
    )
    start_timeout_seconds: float = Field(
        default=600,
        gt=0,
        description="Seconds that a cluster may take until its first worker is there: a new node, an image pull.",
    )
    idle_timeout_seconds: int = Field(
        default=1200,
        ge=60,
        description="Seconds without a task and without a connected client after which the operator removes a cluster.",
    )
    deadline_seconds: int = Field(
        default=86400,
        ge=60,
        description="Seconds after its creation at which a run's cluster is removed, whatever it does.",
    )
    dashboard_url: str = Field(
        default="",
        description="Address at which people find a cluster's dashboard, with {namespace} and {cluster}, where an "
        "ingress serves them. Empty: the run's page says how to forward it.",
    )


class SizeSettings(_Group):
    """One size of Dask cluster."""

    workers: int = Field(ge=1, description="Worker processes (local) or pods (kubernetes).")
    threads: int = Field(default=1, ge=1, description="Threads of each worker.")
    cpu: float = Field(default=1.0, gt=0, description="CPU cores that each worker requests on Kubernetes.")
    memory_gib: float = Field(default=1.0, gt=0, description="Memory limit of each worker, GiB.")


class NotifySettings(_Group):
    """Who is told how a run went."""

    urls: SecretStr = Field(
        default=SecretStr(""),
        description="Apprise URLs (slack://…, mailto://…, json://…), separated by white space. Empty: nobody is told.",
    )
    timeout_seconds: float = Field(
        default=10, gt=0, description="Seconds that sending one message may take before it is given up."
    )


class ImageSettings(_Group):
    """The one image that everything runs in."""

    name: str = Field(
        default="",
        description="Registry and repository that `prefect deploy --all` pushes the image to, without a tag.",
    )
    base: str = Field(default="", description="Image to build it from. Empty: the Dockerfile's own base.")


class RepositorySettings(_Group):
    """Where people read this repository."""

    url: str = Field(
        default="",
        description="Web address of the repository's files (https://host/owner/name/blob/main): the deployments' "
        "descriptions link to their runbooks there.",
    )


class DeploySettings(_Group):
    """From Git to the server."""

    owner: str = Field(
        default="tidepool",
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$",
        description="Whose the things on the server are: the tag managed-by:<owner> marks them. Only these are changed "
        "and deleted.",
    )
    environment: str = Field(
        default="production", description="Environment that the drift report compares with: production, or an overlay."
    )
    delete_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Share of each kind of thing that one apply or prune may delete without --yes-delete.",
    )
    runs_per_hour: int = Field(default=60, ge=1, description="Runs per hour of one schedule above which a plan warns.")


class Settings(BaseSettings):
    """All settings. Get the effective ones with `settings()`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    storage: StorageSettings = StorageSettings()
    compute: ComputeSettings = ComputeSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    small: Annotated[SizeSettings, Field(description="Size `small`: per-item work of seconds.")] = SizeSettings(
        workers=2
    )
    medium: Annotated[SizeSettings, Field(description="Size `medium`: minutes of work.")] = SizeSettings(
        workers=4, memory_gib=2.0
    )
    large: Annotated[SizeSettings, Field(description="Size `large`: an hour of work.")] = SizeSettings(
        workers=16, cpu=2.0, threads=2, memory_gib=8.0
    )
    notify: NotifySettings = NotifySettings()
    image: ImageSettings = ImageSettings()
    repository: RepositorySettings = RepositorySettings()
    deploy: DeploySettings = DeploySettings()

    def size(self, name: str) -> SizeSettings:
        """The size of that name.

        Raises:
            UsageError: `name` is none of the sizes.
        """
        if name not in SIZES:
            raise UsageError(f"size {name!r} is unknown; the sizes are {', '.join(SIZES)}")
        return cast("SizeSettings", getattr(self, name))


SIZES: tuple[str, ...] = ("small", "medium", "large")


def variables() -> dict[str, tuple[str, str]]:
    """Every variable, by name, with the group and field that it sets."""
    return {
        f"{PREFIX}{group}_{field}".upper(): (group, field)
        for group, info in Settings.model_fields.items()
        for field in cast("type[BaseModel]", info.annotation).model_fields
    }


def reject_unknown(names: Any) -> None:
    """Refuses `TIDEPOOL_*` names that are no setting.

    Args:
        names: Names of variables; those with another prefix are left alone.

    Raises:
        UsageError: names each unknown variable with the nearest right one.
    """
    known = variables()
    wrong = sorted(name for name in names if name.startswith(PREFIX) and name not in known)
    if wrong:
        raise UsageError("; ".join(f"{name} is no setting{_hint(name, list(known))}" for name in wrong))


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else " (`tidepool settings` lists them)"


def _sentence(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        variable = PREFIX + "_".join(str(part) for part in problem["loc"]).upper()
        message = problem["msg"][0].lower() + problem["msg"][1:]
        shown = "" if variable == "TIDEPOOL_NOTIFY_URLS" else f", not {problem['input']!r}"
        parts.append(f"{variable}: {message}{shown}")
    return "; ".join(parts)


@cache
def settings() -> Settings:
    """The effective settings, read once per process.

    Raises:
        UsageError: a variable is misspelt or its value is not accepted.
    """
    reject_unknown(os.environ)
    try:
        return Settings()
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None


def effective() -> list[tuple[str, str, str]]:
    """Each setting as (variable, effective value with secrets masked, where it comes from)."""
    current = settings()
    rows = []
    for variable, (group, field) in sorted(variables().items()):
        value = getattr(getattr(current, group), field)
        rows.append((variable, str(value), "environment" if variable in os.environ else "default"))
    return rows


def set_variables(values: dict[str, str]) -> None:
    """Sets variables of this process (and its children), as a command's options do; the settings are read anew.

    Raises:
        UsageError: a name is no setting, or a value is not accepted.
    """
    reject_unknown(values)
    os.environ.update(values)
    settings.cache_clear()
    settings()


def set_prefect_variables(values: dict[str, str]) -> None:
    """Sets `PREFECT_*` variables of this process and its children; Prefect reads its settings once, at import."""
    os.environ.update(values)


def environment() -> dict[str, str]:
    """A copy of this process's environment, for a child process."""
    return dict(os.environ)


def repository() -> Path:
    """The folder that holds prefect.yaml: the current one or the nearest above it.

    Raises:
        UsageError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "prefect.yaml").is_file():
            return folder
    raise UsageError(f"no prefect.yaml in {here} or above it; run this inside the repository")
