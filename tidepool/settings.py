"""All settings of tidepool: one frozen model, read from `TIDEPOOL_*` variables. Nothing else reads the environment.

A setting's variable is `TIDEPOOL_<GROUP>_<FIELD>`: `TIDEPOOL_STORAGE_ROOT` is `settings().storage.root`. An unknown
`TIDEPOOL_*` variable is an error that suggests the nearest known one; otherwise a misspelt name would have no effect.
"""

from __future__ import annotations

import os
import traceback
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, Secret, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from tidepool.errors import UsageError, did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Collection

PREFIX = "TIDEPOOL_"
_SECRETS = ("TIDEPOOL_NOTIFY_URLS", "TIDEPOOL_KUBERNETES_SHARED_KEY")  # never shown

Provider = Literal["local", "threads", "address", "kubernetes"]
SIZES = ("small", "medium", "large")


class _Group(BaseModel):
    """A group of settings: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageSettings(_Group):
    """Storage of outputs."""

    root: str = "file://.tidepool/storage"
    """URL of the folder for all outputs: file://, s3:// or memory://. A relative file:// path starts at the current
    folder."""
    anonymous: bool = False
    """Read s3:// without credentials, as public data sets allow. False: the usual AWS_* chain."""
    timeout_seconds: float = Field(60, gt=0)
    """Timeout of one request to the store, in seconds."""


class ComputeSettings(_Group):
    """Execution of mapped tasks."""

    provider: Provider = "local"
    """local: a Dask cluster of processes on this machine; threads: threads of the flow-run process; address: an
    existing Dask scheduler; kubernetes: a Dask cluster of pods per run."""
    address: str = ""
    """Address of the scheduler (tcp://host:8786) when the provider is `address`."""
    inline_rows: int = Field(200_000, ge=0)
    """Rows of work (items times rows of each) up to which a flow does mapped work in its own process instead of
    starting a cluster."""
    argument_limit_bytes: int = Field(256 * 1024, gt=0)
    """Maximum size of one argument or result of a mapped task, serialised, in bytes; pass larger data by reference."""
    worker_losses: int = Field(3, ge=1)
    """Number of workers that a mapped task may lose before it is Crashed; a task with more `retries` may lose one
    worker per retry."""
    no_worker_seconds: float = Field(300, gt=0)
    """Seconds that mapped tasks wait while the cluster has no worker."""
    tasks_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Level from which Prefect's own lines about mapped task runs are logged; INFO also logs `Finished in state
    Completed()` of each. Lines of the flow's author are not concerned."""
    close_seconds: float = Field(60, gt=0)
    """Timeout for closing a cluster, in seconds: finish task runs, send logs and events, stop workers."""


class KubernetesSettings(_Group):
    """Dask clusters of pods. In a driver pod, the base job template sets the first five."""

    namespace: str = ""
    """Namespace of the Dask cluster. Empty: the driver pod's, else the kubeconfig's."""
    pod_name: str = ""
    """Name of the driver pod: the Dask pods inherit its image, environment variables and placement. Empty: the driver
    runs outside of Kubernetes."""
    job_name: str = ""
    """Name of the run's Job, which owns the run's Dask clusters."""
    job_uid: str = ""
    """UID of the run's Job."""
    image: str = ""
    """Image of scheduler and workers. Empty: the driver's own, pinned by digest."""
    early_cluster: Literal["none", "small", "medium", "large"] = "none"
    """Size of the Dask cluster that the driver asks for before it loads the flow; the job variable `early_cluster` sets
    it. For flows with `dask_runner(size, start_early=True)` of the same size; another cluster is deleted."""
    max_workers: int = Field(50, ge=1)
    """Maximum number of workers of all Dask clusters of one run."""
    max_cpu: float = Field(100, gt=0)
    """Maximum CPU request of all workers of one run, in cores."""
    max_memory_gib: float = Field(400, gt=0)
    """Maximum memory of all workers of one run, in GiB."""
    adaptive_minimum: int = Field(0, ge=0)
    """Minimum number of workers of an adaptive cluster, which scales up to the size's workers. 0: not adaptive, always
    the size's workers."""
    scheduler_cpu: float = Field(0.25, gt=0)
    """CPU request of a scheduler, in cores."""
    scheduler_memory_gib: float = Field(1.0, gt=0)
    """Memory limit of a scheduler, in GiB."""
    scratch_gib: float = Field(10, gt=0)
    """Disk limit of a worker for /tmp and spilled data, in GiB."""
    worker_node_selector: dict[str, str] = {}
    """Node selector of workers, as JSON. Empty: the driver's, as for the scheduler."""
    worker_tolerations: list[dict[str, str | int]] = []
    """Tolerations of workers in addition to the driver's, as JSON; spot nodes usually need one."""
    worker_priority_class: str = ""
    """PriorityClass of workers; lower than the driver's. Empty: the cluster's default."""
    start_timeout_seconds: float = Field(600, gt=0)
    """Seconds until a cluster's first worker must be ready; covers a new node and an image pull."""
    idle_timeout_seconds: int = Field(1200, ge=60)
    """Seconds without a task and without a connected client after which the operator deletes a cluster."""
    deadline_seconds: int = Field(604_800, ge=60)
    """Seconds after which the operator deletes a cluster, whatever it does. A run's own one goes with its driver, so no
    later than the job variable `deadline_seconds` says."""
    tls: bool = True
    """Encrypt what driver, Dask scheduler and workers send each other; each refuses whoever lacks the cluster's key."""
    shared_key: Secret[Annotated[str, Field(min_length=32)]] | None = None
    """At least 32 random characters, from which runs derive the key of a cluster that they share; in a Secret of the
    runs that may use it. Unset: no shared clusters, unless `tls` is off."""
    dashboard_url: str = ""
    """URL of a cluster's dashboard, with {namespace} and {cluster}, if an ingress serves it. Empty: the run's page
    shows the port-forward command."""


class OperatorSettings(_Group):
    """The Dask operator."""

    namespaces: str = ""
    """Namespaces of flow runs, separated by spaces: the same as the operator's `--namespace` options."""
    rules_config_map: str = "tidepool-flow-run-rules"
    """ConfigMap in each of these namespaces that says what flow runs may have there."""
    read_nodes: bool = False
    """Read the nodes when a driver waits for one, to report what it lacks; needs a ClusterRole."""
    work_pools: str = ""
    """Work pools of these flow runs, separated by spaces: the operator tells the server of PREFECT_API_URL about their
    drivers. Empty: about none."""

    core_hour_price: float = Field(0, ge=0)
    """Price of one core requested for an hour, for the metric `tidepool_run_cost_total`, in any currency. 0 for both
    prices: no cost is shown."""
    gib_hour_price: float = Field(0, ge=0)
    """Price of one GiB of memory requested for an hour, in the same currency."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of the operator's metrics, at /metrics. 0: none."""
    shared_cluster_seconds: int = Field(86400, ge=60, le=604800)
    """Age in seconds at which the operator deletes a shared Dask cluster, whether or not it is in use."""


class ExporterSettings(_Group):
    """`tidepool exporter`, which shows the Prefect server's figures to Prometheus."""

    interval_seconds: float = Field(15, ge=1)
    """Polling interval of the Prefect server, in seconds."""
    deployments: int = Field(500, ge=1, le=5000)
    """Maximum number of deployments that have series of their own, in the order of their names; runs of others are
    counted together as `other`."""
    budgets: dict[str, float] = {}
    """Budget of each team for a day, as JSON, in the currency of the operator's prices."""


class SizeSettings(_Group):
    """One size of Dask cluster."""

    workers: int = Field(ge=1)
    """Worker processes (local) or pods (kubernetes)."""
    threads: int = Field(1, ge=1)
    """Threads per worker."""
    cpu: float = Field(1.0, gt=0)
    """CPU request of each worker on Kubernetes, in cores."""
    memory_gib: float = Field(1.0, gt=0)
    """Memory limit of each worker, in GiB."""


class ReportSettings(_Group):
    """The report of a run."""

    enabled: bool = True
    """Publish a report of each run at its end, as the artifact `<deployment>-run`."""
    record: str = ""
    """File in which the process of a flow keeps figures of its run for its supervisor, which sets this variable and
    writes the report if the process is killed."""


class StatusSettings(_Group):
    """`tidepool status`."""

    timeout_seconds: float = Field(2, gt=0)
    """Timeout of each source, in seconds: parts of the Prefect server's answer, and Kubernetes."""


class NotifySettings(_Group):
    """Notifications about the outcome of runs."""

    urls: SecretStr = SecretStr("")
    """Apprise URLs (slack://…, mailto://…, json://…), separated by spaces. Empty: no notifications."""
    timeout_seconds: float = Field(10, gt=0)
    """Timeout for sending one notification, in seconds."""


class ImageSettings(_Group):
    """The image in which everything runs."""

    name: str = ""
    """Registry and repository to which `prefect deploy --all` pushes the image, without a tag."""
    base: str = ""
    """Base image of the build. Empty: the Dockerfile's default."""


class RepositorySettings(_Group):
    """The repository on the web."""

    url: str = ""
    """Web address of the repository's files (https://host/owner/name/blob/main), for the links to runbooks in
    descriptions, reports, messages and automations."""


class DeploySettings(_Group):
    """Deploys from Git to the server."""

    owner: str = Field("tidepool", pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """Owner of the managed resources on the server, which carry the tag managed-by:<owner>. Only these are changed and
    deleted."""
    environment: str = "production"
    """Environment of the drift report: production, or an overlay."""
    delete_share: float = Field(0.3, ge=0, le=1)
    """Maximum share of each kind of resource that one apply or prune deletes without --yes-delete."""
    runs_per_hour: int = Field(60, ge=1)
    """Runs per hour of one schedule above which a plan warns."""


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
    operator: OperatorSettings = OperatorSettings()
    exporter: ExporterSettings = ExporterSettings()
    small: SizeSettings = SizeSettings(workers=2)
    """Size `small`: per-item work of seconds."""
    medium: SizeSettings = SizeSettings(workers=4, memory_gib=2.0)
    """Size `medium`: minutes of work."""
    large: SizeSettings = SizeSettings(workers=16, cpu=2.0, threads=2, memory_gib=8.0)
    """Size `large`: an hour of work."""
    report: ReportSettings = ReportSettings()
    status: StatusSettings = StatusSettings()
    notify: NotifySettings = NotifySettings()
    image: ImageSettings = ImageSettings()
    repository: RepositorySettings = RepositorySettings()
    deploy: DeploySettings = DeploySettings()

    def size(self, name: str) -> SizeSettings:
        """Return the size of that name.

        Raises:
            UsageError: `name` is not a size.
        """
        if name not in SIZES:
            raise UsageError(f"unknown size {name!r}{did_you_mean(name, SIZES)}")
        return cast("SizeSettings", getattr(self, name))


def variables() -> dict[str, tuple[str, str]]:
    """Return all variables by name, with the group and field that each one sets."""
    return {
        f"{PREFIX}{group}_{field}".upper(): (group, field)
        for group, info in Settings.model_fields.items()
        for field in cast("type[BaseModel]", info.annotation).model_fields
    }


def prefect_settings_problem(error: BaseException) -> str:
    """Return the sentence about an error that Prefect raises when it reads its settings; empty for another error.

    It reads them when it is imported, so that any command may end there.
    """
    files = {Path(frame.filename).parts[-3:-1] for frame in traceback.extract_tb(error.__traceback__)}
    if ("prefect", "settings") not in files:
        return ""
    if isinstance(error, ValidationError):
        text = "; ".join(f"{'.'.join(map(str, each['loc']))}: {reason(each)}" for each in error.errors())
    else:
        text = " ".join(str(error).split())
    sources = "PREFECT_* variables, its profile, .env, prefect.toml, pyproject.toml"
    return f"Prefect cannot read its settings ({sources}): {text}"


def reject_unknown(names: Any) -> None:
    """Refuse unknown `TIDEPOOL_*` variables among the names of variables.

    Raises:
        UsageError: each unknown variable with the nearest known one.
    """
    known = variables()
    wrong = sorted(name for name in names if name.startswith(PREFIX) and name not in known)
    if wrong:
        hint = "`tidepool settings` lists the known ones"
        raise UsageError("; ".join(f"unknown setting {name}{did_you_mean(name, known, hint)}" for name in wrong))


@cache
def settings() -> Settings:
    """Return the effective settings, read once per process.

    Raises:
        UsageError: a variable is unknown or its value is not accepted.
    """
    reject_unknown(os.environ)
    try:
        return Settings()
    except SettingsError as error:  # it names the group only
        raise UsageError(f"a {PREFIX}* variable is not valid JSON: {error}: {error.__cause__}") from None
    except ValidationError as error:
        found = [(PREFIX + "_".join(map(str, each["loc"])).upper(), each) for each in error.errors()]
        problems = (f"{name}: {reason(each, show_input=name not in _SECRETS)}" for name, each in found)
        raise UsageError("; ".join(problems)) from None


def effective() -> list[tuple[str, str, str]]:
    """Return each setting as (variable, effective value with secrets masked, its source)."""
    return [
        (name, str(getattr(getattr(settings(), group), field)), "environment" if name in os.environ else "default")
        for name, (group, field) in sorted(variables().items())
    ]


def meanings() -> dict[str, str]:
    """Return what each setting means, by variable: the text below its field in this file."""
    import ast

    texts: dict[tuple[str, str], str] = {}
    for group in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        body = group.body if isinstance(group, ast.ClassDef) else []
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(field.target, ast.Name)
            ):
                texts[group.name, field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    groups = {name: cast("type[BaseModel]", info.annotation).__name__ for name, info in Settings.model_fields.items()}
    return {name: texts[groups[group], field] for name, (group, field) in variables().items()}


def set_variables(values: dict[str, str]) -> None:
    """Set variables of this process and its children, as a command's options do, and read the settings again.

    Raises:
        UsageError: a variable is unknown or its value is not accepted.
    """
    reject_unknown(values)
    os.environ.update(values)
    settings.cache_clear()
    settings()


def set_prefect_variables(values: dict[str, str]) -> None:
    """Set variables of a Prefect server for this process and its children; Prefect reads its own once, at import."""
    os.environ.update(values)


def set_empty_variables(names: Collection[str]) -> None:
    """Set those of the variables that are not set to an empty text, for this process and its children."""
    for name in names:
        os.environ.setdefault(name, "")
    settings.cache_clear()


def replace_environment(values: dict[str, str]) -> None:
    """Give this process other variables, and no more: those that it would have been started with."""
    os.environ.clear()
    os.environ.update(values)
    settings.cache_clear()


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for a child process."""
    return dict(os.environ)


def repository() -> Path:
    """Return the folder that holds prefect.yaml: the current one or the nearest above it.

    Raises:
        UsageError: neither the current folder nor one above it holds the file.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if os.access(folder / "prefect.yaml", os.F_OK):  # without an error where this user may not look
            return folder
    raise UsageError(f"no prefect.yaml in {here} or above it; run this command inside the repository")
