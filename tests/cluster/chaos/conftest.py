"""Fixtures of the chaos suite: the cluster tests' installation, of an image that has flows to break."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faults import undo
from installed import AUTH, Platform, build, filled
from kube import Namespace, command
from world import Watch, World

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
IF_THERE = "--ignore-not-found"


@pytest.fixture(scope="session")
def image(image: str) -> str:
    """The image under test with the flows of this suite; CHAOS_IMAGE is one that has them."""
    return os.environ.get("CHAOS_IMAGE") or build(f"{image.partition('@')[0]}:chaos", HERE / "image", image)


@pytest.fixture(scope="session")
def world(installation: Platform) -> Iterator[World]:
    """The installation, whose store can be stopped: its server gets signals from another process of its pod."""
    shared = {"template": {"spec": {"shareProcessNamespace": True}}}
    patch = {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}, **shared}}
    installation.namespace.kubectl("patch", "deployment", "store", f"--patch={json.dumps(patch)}")
    installation.namespace.kubectl("rollout", "status", "deployment/store", "--timeout=120s")
    with Watch(installation) as watch:
        found = World(installation, watch)
        undo(found)
        yield found


@pytest.fixture(scope="session")
def stock(world: World) -> Iterator[World]:
    """Prefect's and Dask's own parts in a namespace of their own, on the same server and store."""
    from prefect_kubernetes.worker import KubernetesWorker

    platform = world.platform
    namespace = Namespace(f"{platform.namespace.name}-stock")
    names = {"stock": namespace.name, "platform": platform.namespace.name, "image": platform.image}
    command("kubectl", "create", "namespace", namespace.name)
    try:
        platform.namespace.apply(filled("chaos/stock-paths.yaml", **names))
        template = KubernetesWorker.get_default_base_job_template()
        container = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
        container["resources"] = {"requests": {"cpu": "20m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}
        platform.post("work_pools/", {"name": "stock", "type": "kubernetes", "base_job_template": template})
        namespace.apply(filled("chaos/stock.yaml", **names))
        for each in ("operator", "worker"):
            namespace.kubectl("rollout", "status", f"deployment/{each}", "--timeout=180s", timeout=200)
        there = replace(platform, runs=namespace, pool="stock")
        env = {
            "PREFECT_API_URL": f"http://tidepool-server.{platform.namespace.name}:4200/api",
            "PREFECT_API_AUTH_STRING": ":".join(AUTH),
            "TIDEPOOL_STORAGE_ROOT": "s3://tidepool",
            "AWS_ACCESS_KEY_ID": "store",
            "AWS_SECRET_ACCESS_KEY": "store-test-only",
            "AWS_ENDPOINT_URL": f"http://store.{platform.namespace.name}:7070",
            "AWS_DEFAULT_REGION": "us-east-1",
            "CHAOS_IMAGE": platform.image,
            "CHAOS_NAMESPACE": namespace.name,
        }
        variables = {"namespace": namespace.name, "service_account_name": "stock", "env": env, "finished_job_ttl": 600}
        with Watch(there) as watch:
            yield World(there, watch, "chaos_stock.items", variables, "stock")
    finally:
        platform.namespace.kubectl("delete", "networkpolicy", namespace.name, f"{namespace.name}-store", IF_THERE)
        command("kubectl", "delete", "clusterrole,clusterrolebinding", namespace.name, IF_THERE)
        command("kubectl", "delete", "namespace", namespace.name, "--timeout=180s", timeout=240)
        platform.delete("work_pools/stock")
