"""`make kind-demo`: the steps of docs/kubernetes.md on the cluster of KUBECONFIG, then the six flows, to Completed.

It changes only what differs, so that it can be called again. IMAGE=name@sha256:… and STORE=name@sha256:… are installed
instead of images that are built.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import yaml
from installed import FINAL, TOP, Platform
from kube import Namespace, command

VALUES = TOP / "helm" / "tidepool" / "ci" / "dev-values.yaml"
STORE = TOP / "k8s" / "overlays" / "dev" / "store"
# Two run at once, each with a Dask cluster, on two cores.
RUN_SECONDS = 1800


def main() -> int:
    """Install it and run the flows; return 0 if all are Completed."""
    values = yaml.safe_load(VALUES.read_text())
    runs = Namespace(values["flowRuns"]["namespace"])
    platform = Namespace(yaml.safe_load((STORE / "kustomization.yaml").read_text())["namespace"], runs)
    registry = os.environ["REGISTRY"]
    image = os.environ.get("IMAGE") or built("image", f"IMAGE_NAME={registry}/tidepool", "PUSH=1")
    store = os.environ.get("STORE") or built("store-image", f"STORE_IMAGE={registry}/tidepool-store:1")
    prepare(platform, runs, store)
    install(platform, image)
    with platform.forwarded("service/tidepool-server", 4200) as port:
        return run(Platform(platform, runs, image, f"http://127.0.0.1:{port}/api"))


def built(target: str, *variables: str) -> str:
    """Build and push an image by make; return it by digest."""
    say(f"make {target}")
    printed = command("make", "--directory", str(TOP), target, *variables, timeout=1800)
    found = re.search(r"^\S+@sha256:[0-9a-f]{64}$", printed, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"make {target} printed no name@sha256:…:\n{printed}")
    return found[0]


def prepare(platform: Namespace, runs: Namespace, store: str) -> None:
    """Create the namespaces, the store, and the credentials for it."""
    say(f"namespaces {platform.name} and {runs.name}, and the store")
    command("kubectl", "apply", "--server-side", "--kustomize", str(TOP / "k8s" / "cluster"))
    command("kubectl", "apply", "--kustomize", str(TOP / "k8s" / "overlays" / "dev"))
    if "Secret/store" not in platform.names("secrets"):
        key = secrets.token_urlsafe(24)
        platform.apply(secret("store", {"access-key": "dev", "secret-key": key}))
        credentials = {
            "AWS_ACCESS_KEY_ID": "dev",
            "AWS_SECRET_ACCESS_KEY": key,
            "AWS_ENDPOINT_URL": f"http://store.{platform.name}:7070",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        runs.apply(secret("tidepool-credentials", credentials))
    manifest = command("kubectl", "kustomize", str(STORE))
    command("kubectl", "apply", "--filename=-", text=re.sub(r"(?m)(^\s*(?:- )?image: ).*$", rf"\g<1>{store}", manifest))
    platform.kubectl("rollout", "status", "deployment/store", "--timeout=300s", timeout=320)


def secret(name: str, values: dict[str, str]) -> dict[str, object]:
    """Return the manifest of a Secret."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values}


def install(platform: Namespace, image: str) -> None:
    """Install or upgrade the chart, which registers the flows of its image."""
    say(f"the chart, with {image}")
    repository, digest = image.split("@")
    command(
        "helm", "upgrade", "--install", "tidepool", str(TOP / "helm" / "tidepool"), "--namespace", platform.name,
        "--values", str(VALUES), f"--set=image.repository={repository}", f"--set=image.digest={digest}",
        "--wait", "--timeout=15m", timeout=960,
    )  # fmt: skip


def run(platform: Platform) -> int:
    """Run each flow of the README's table once; return 0 if all are Completed."""
    table = (TOP / "README.md").read_text(encoding="utf-8").split("## The flows", 1)[1].split("\n## ", 1)[0]
    names = re.findall(r"^\| \[`([a-z-]+)`\]", table, re.MULTILINE)
    say(f"{len(names)} flow runs, two at a time")
    began = time.monotonic()
    waiting = {name: platform.start(f"{name}/{name}") for name in names}
    failed: list[str] = []

    def all_ended() -> bool:
        for name, run_id in list(waiting.items()):
            state = platform.run(run_id)["state"]
            if state["type"] in FINAL:
                del waiting[name]
                say(f"{name}: {state['name']} {state['message'] or ''}".rstrip())
                failed.extend([name] if state["type"] != "COMPLETED" else [])
        return not waiting

    with suppress(AssertionError):  # those that have not ended are named below
        platform.until(all_ended, "all runs have ended", RUN_SECONDS)
    for name in waiting:
        say(f"{name}: not ended after {RUN_SECONDS} s")
    left = [*failed, *waiting]
    if left:
        say(f"not Completed: {', '.join(left)}; `kubectl -n {platform.runs.name} get events,jobs,daskclusters,pods`")
        return 1
    say(f"all {len(names)} are Completed, {time.monotonic() - began:.0f} s after the first one was asked for")
    say(
        f"the UI: kubectl -n {platform.namespace.name} port-forward service/tidepool-server 4200; "
        "docs/kubernetes.md has the rest, and how to remove it"
    )
    return 0


def say(text: str) -> None:
    """Print a line with the time."""
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, AssertionError, OSError, subprocess.SubprocessError, httpx.HTTPError) as error:
        sys.exit(f"kind-demo: {error}")
