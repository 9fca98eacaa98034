"""An installed platform, and what a person does with it in the UI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from kube import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from kube import Namespace

TOP = Path(__file__).parents[2]
AUTH = ("admin", "test-only")
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
# A busy two-core machine is slow, not wrong.
RUN_SECONDS = 420.0


def create(namespace: Namespace, kind: str) -> None:
    """Create a namespace as k8s/base has it: `platform` or `flow-runs`."""
    manifest = yaml.safe_load((TOP / "k8s" / "base" / kind / "namespace.yaml").read_text())
    manifest["metadata"]["name"] = namespace.name
    namespace.apply(manifest)


def build(name: str, context: Path, base: str = "") -> str:
    """Build an image, push it as `name:tag`, return it by digest: a node keeps what it once pulled under a tag."""
    arguments = [f"--build-arg=BASE_IMAGE={base}"] if base else []
    command("docker", "buildx", "build", "--quiet", "--tag", name, "--push", *arguments, str(context), timeout=600)
    inspect = ["docker", "buildx", "imagetools", "inspect", name, "--format"]
    return command(*inspect, f"{name.rpartition(':')[0]}@{{{{.Manifest.Digest}}}}").strip()


def filled(file: str, **names: str) -> str:
    """Return a YAML file of this folder with its $names replaced."""
    return Template((Path(__file__).parent / file).read_text()).substitute(names)


@dataclass(frozen=True)
class Platform:
    """An installed platform.

    Attributes:
        namespace: Where it is.
        runs: Where the flow runs of a team are.
        image: The image that everything runs, by digest.
        api: URL of its Prefect API from here.
        pool: The team's work pool.
        team: What the names of the team's objects in `namespace` add to those of the default team.
    """

    namespace: Namespace
    runs: Namespace
    image: str
    api: str
    pool: str = "kubernetes"
    team: str = ""

    def until(self, condition: Callable[[], Any], what: str, seconds: float) -> Any:
        """Wait for a true value; at the deadline fail with a report of all namespaces."""
        return self.namespace.until(condition, what, seconds)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the Prefect API."""
        return self._ask("POST", path, json=body or {})

    def read(self, path: str) -> Any:
        """Read from the Prefect API."""
        return self._ask("GET", path)

    def delete(self, path: str) -> None:
        """Delete through the Prefect API."""
        self._ask("DELETE", path)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        """Send a request, again while the server is replaced, unless that could create something twice."""

        def attempt() -> httpx.Response | None:
            try:
                return httpx.request(method, f"{self.api}/{path}", auth=AUTH, timeout=60, **options)
            except httpx.TransportError as error:
                reads = method == "GET" or path.endswith("/filter")
                if reads or isinstance(error, httpx.ConnectError):
                    return None
                raise

        answer: httpx.Response = self.until(attempt, f"the Prefect API answers {method} {path}", 60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def copy(self, deployment: str, name: str, **fields: Any) -> str:
        """Create a deployment of the same flow in the team's pool, which may overlap itself; return its full name."""
        found = self.read(f"deployments/name/{deployment}")
        wanted = ("flow_id", "entrypoint", "path", "parameters", "job_variables", "version")
        body = {**{key: found[key] for key in wanted}, "work_pool_name": self.pool, "name": name, **fields}
        self.post("deployments/", body)
        return f"{deployment.split('/', maxsplit=1)[0]}/{name}"

    def start(self, deployment: str, **parameters: Any) -> str:
        """Start a run of `flow/deployment` as a person does in the UI; return its id."""
        found = self.read(f"deployments/name/{deployment}")
        body = {
            "parameters": {**found["parameters"], **parameters},
            "state": {"type": "SCHEDULED", "name": "Scheduled"},
        }
        return str(self.post(f"deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """Return a flow run as the server knows it."""
        return dict(self.read(f"flow_runs/{run_id}"))

    def state(self, run_id: str) -> str:
        """Return the type of its state."""
        return str(self.run(run_id)["state_type"])

    def wait(self, run_id: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Wait until a run has ended; return it."""
        self.until(lambda: self.state(run_id) in FINAL, f"flow run {run_id} has ended", seconds)
        return self.run(run_id)

    def logs(self, run_id: str) -> str:
        """Return the log of a run."""
        query = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.post("logs/filter", query))

    def artifacts(self, run_id: str) -> dict[str, Any]:
        """Return a run's artifacts by key, the newest of each."""
        query = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}
        found = sorted(self.post("artifacts/filter", query), key=lambda each: each["created"])
        return {each["key"]: each for each in found}
