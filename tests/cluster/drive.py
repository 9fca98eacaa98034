"""Run a Python script as a flow run's driver: a Job made from the work pool's own template, with its account."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from installed import Platform


@dataclass(frozen=True)
class Driver:
    """A Job that runs a script.

    Attributes:
        platform: The installation, as its team sees it.
        name: The Job's name.
    """

    platform: Platform
    name: str

    def wait(self, seconds: float = 300) -> tuple[bool, str]:
        """Wait for its end; return whether it succeeded, and all that it printed."""

        def ended() -> list[str]:
            [job] = [each for each in self.platform.runs.get("jobs") if each["metadata"]["name"] == self.name]
            conditions = job["status"].get("conditions", [])
            # Before Complete comes SuccessCriteriaMet.
            final = {"Complete", "Failed"}
            return [each["type"] for each in conditions if each["status"] == "True" and each["type"] in final]

        conditions = self.platform.until(ended, f"job {self.name} has ended", seconds)
        return "Complete" in conditions, self.log()

    def log(self) -> str:
        """Return what it has printed so far; nothing before its start."""
        pods = self.platform.runs.get("pods", f"job-name={self.name}")
        begun = [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] != "Pending"]
        return self.platform.runs.kubectl("logs", begun[-1]) if begun else ""

    def result(self, seconds: float = 300) -> dict[str, Any]:
        """Return the JSON object that it printed last, after it succeeded."""
        succeeded, log = self.wait(seconds)
        assert succeeded, f"{log}\n{self.platform.namespace.report()}"
        # What it logs goes another way than what it prints: a line of the closing cluster may stand after the object.
        printed = [line for line in log.splitlines() if line.startswith("{")]
        assert printed, f"it printed no JSON object:\n{log}"
        return dict(json.loads(printed[-1]))


def drive(platform: Platform, script: str, **environment: str) -> Driver:
    """Start a script.

    Args:
        platform: The installation, as the team of the driver sees it.
        script: Python; it is `__main__`, so its functions travel to workers by value.
        environment: Further variables.
    """
    name = f"driver-{uuid4().hex[:6]}"
    pool = platform.namespace.kubectl("get", "configmap", f"tidepool-work-pool{platform.team}", "--output=json")
    template = json.loads(json.loads(pool)["data"]["base-job-template.json"])
    values = {key: each.get("default") for key, each in template["variables"]["properties"].items()}
    values |= {"name": name, "command": ["python", "-c", script], "finished_job_ttl": 3600}
    job = _fill(template["job_configuration"]["job_manifest"], values)
    job["metadata"] = {"name": name}
    # Prefect's template has these two in the pod, where Kubernetes knows them not.
    spec = job["spec"]["template"]["spec"]
    for key in ("parallelism", "completions"):
        spec.pop(key, None)
    [container] = spec["containers"]
    container["env"] += [
        {"name": "PREFECT_API_URL", "value": template["job_configuration"]["env"]["PREFECT_API_URL"]},
        {
            "name": "PREFECT_API_AUTH_STRING",
            "valueFrom": {"secretKeyRef": {"name": f"tidepool-flow-run-api{platform.team}", "key": "auth-string"}},
        },
        *({"name": key, "value": value} for key, value in environment.items()),
    ]
    platform.runs.apply(job)
    return Driver(platform, name)


def _fill(part: Any, values: dict[str, Any]) -> Any:
    """Return the template with its `{{ variables }}` replaced and those without a value left out, as Prefect does."""
    if isinstance(part, dict):
        filled = {key: _fill(each, values) for key, each in part.items()}
        return {key: each for key, each in filled.items() if each is not None}
    if isinstance(part, list):
        return [_fill(each, values) for each in part]
    if isinstance(part, str) and part.startswith("{{") and part.endswith("}}"):
        return values.get(part.strip("{} "))
    return part
