"""benchmarks.scale on a Kubernetes control plane of its own, whose settings can be changed: no machine, no Prefect.

    python -m benchmarks.control_plane --binaries DIR --controller-qps 100 -- --runs 20 --every 10

DIR has etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubectl. They run with empty data, beside
`--operators` Dask operators of this working tree; with `--no-policies` without the admission policies of k8s/cluster.
What follows `--` are arguments of benchmarks.scale. The Jobs are made by the benchmark, the fake node is the only one,
and no name of a scheduler can be looked up: the operator's questions to them fail at once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from benchmarks.fake_node import IMAGE, KEY
from tests.polling import until

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[1]
NAMESPACE, ACCOUNT = "tidepool-scale", "tidepool-flow-run"
_LOOK_SECONDS = 2.0
_CALM_PERCENT = 50.0  # of one core, of all parts together
TOKEN = "only-on-this-machine"  # noqa: S105 - of an API server on localhost that lives for minutes
RULES = {
    "annotations": "", "configMaps": "tidepool-flow-run", "images": "", "labels": "", "maxCpu": "1000",
    "maxDisk": "20Gi",
    "maxMemory": "4000Gi", "maxWorkers": "200", "nodeSelectors": KEY, "priorityClasses": "", "pullSecrets": "",
    "repositories": IMAGE.partition("@")[0], "secrets": "tidepool-credentials", "serviceAccounts": ACCOUNT,
    "tolerations": KEY,
}  # fmt: skip


def _is_calm(percent: float) -> bool:
    return percent < _CALM_PERCENT


class ControlPlane:
    """Processes of a control plane, in a folder of their own.

    Args:
        binaries: Folder of its programs.
        folder: Where its data and logs are; empty.
        stack: What ends the processes.

    Attributes:
        parts: Process ids by the name of the part.
    """

    def __init__(self, binaries: Path, folder: Path, stack: ExitStack) -> None:
        self.parts: dict[str, int] = {}
        self.kubeconfig = folder / "kubeconfig"
        self._binaries, self._folder, self._stack = binaries, folder, stack

    def start(self, name: str, *command: str) -> None:
        """Start a process that ends with the stack."""
        log = self._stack.enter_context((self._folder / f"{name}.log").open("w"))
        with_config = ["env", f"KUBECONFIG={self.kubeconfig}", *command]
        process = subprocess.Popen(with_config, stdout=log, stderr=log)
        self._stack.callback(process.wait, 30)
        self._stack.callback(process.terminate)
        self.parts[name] = process.pid

    def kubectl(self, *arguments: str, text: str | None = None) -> None:
        """Run kubectl."""
        program = [str(self._binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        subprocess.run(program, input=text, text=True, check=True, stdout=subprocess.DEVNULL)

    def up(self, controller_qps: int) -> None:
        """Start all parts, and wait until the API server is ready."""
        folder, of = self._folder, self._binaries
        subprocess.run(["openssl", "genrsa", "-out", folder / "key", "2048"], check=True, capture_output=True)
        (folder / "tokens").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
        cluster = {"server": "https://127.0.0.1:16443", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": cluster}], "users": [{"name": "it", "user": {"token": TOKEN}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": NAMESPACE}}],
        }  # fmt: skip
        self.kubeconfig.write_text(json.dumps(config))
        etcd, peers = "http://127.0.0.1:12379", "http://127.0.0.1:12380"
        self.start(
            "etcd", f"{of}/etcd", "--data-dir", f"{folder}/etcd", "--listen-client-urls", etcd, "--unsafe-no-fsync",
            "--advertise-client-urls", etcd, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"default={peers}",
        )  # fmt: skip
        self.start(
            "API server", f"{of}/kube-apiserver", f"--etcd-servers={etcd}", "--secure-port=16443",
            "--bind-address=127.0.0.1", "--service-cluster-ip-range=10.97.0.0/16", f"--cert-dir={folder}/certificates",
            f"--token-auth-file={folder}/tokens", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder}/key", f"--service-account-signing-key-file={folder}/key",
            "--authorization-mode=RBAC",
        )  # fmt: skip
        self.wait_for("--raw=/readyz")
        qps = [f"--kube-api-qps={controller_qps}", f"--kube-api-burst={controller_qps * 3 // 2}"]
        self.start(
            "controller manager", f"{of}/kube-controller-manager", f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={folder}/key", "--use-service-account-credentials=true",
            "--leader-elect=false", "--secure-port=21257", f"--authentication-kubeconfig={self.kubeconfig}",
            f"--authorization-kubeconfig={self.kubeconfig}", *qps,
        )  # fmt: skip
        self.start(
            "kube-scheduler", f"{of}/kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false",
            "--secure-port=21259",
        )  # fmt: skip

    def waited(self) -> str:
        """Return how long the requests of the controller manager have waited for its own limit of their rate."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        text = httpx.get("https://127.0.0.1:21257/metrics", headers=headers, verify=False).text  # noqa: S501 - as above
        found = dict.fromkeys(("sum", "count"), 0.0)
        for name, value in re.findall(
            r"^rest_client_rate_limiter_duration_seconds_(sum|count){.*} (.*)$", text, re.MULTILINE
        ):
            found[name] += float(value)
        return f"controller manager: {found['count']:.0f} requests waited {found['sum']:.0f} s for its --kube-api-qps"

    def wait_for(self, *what: str) -> None:
        """Wait until `kubectl get` finds something."""
        program = [str(self._binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}", "get", *what]
        until(lambda: subprocess.run(program, capture_output=True, check=False), lambda ended: ended.returncode == 0)

    def wait_until_calm(self) -> None:
        """Wait until the parts use little CPU time: the operators have started, and the policies are compiled."""
        processes = [psutil.Process(pid) for pid in self.parts.values()]
        until(lambda: sum(each.cpu_percent(_LOOK_SECONDS / len(processes)) for each in processes), _is_calm)

    def prepare(self, namespace: str) -> None:
        """Create a namespace of flow runs, with what the chart has for it."""
        labels = {"tidepool.dev/flow-runs": "true", "pod-security.kubernetes.io/enforce": "restricted"}
        component = {"app.kubernetes.io/name": "tidepool", "app.kubernetes.io/component": "flow-run-rules"}
        rules = {"metadata": {"name": "tidepool-flow-run-rules", "labels": component}, "data": RULES}
        role = {
            "rules": [
                {"apiGroups": ["kubernetes.dask.org"], "resources": ["*"], "verbs": ["create", "delete"]},
                {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
            ]
        }
        group = "rbac.authorization.k8s.io"
        binding = {
            "roleRef": {"apiGroup": group, "kind": "Role", "name": ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": namespace}],
        }
        named = {"metadata": {"name": ACCOUNT}}
        self.kubectl(
            "apply",
            "--filename=-",
            text=json.dumps(
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
            ),
        )
        for version, kind, body in (
            ("v1", "ConfigMap", rules),
            ("v1", "ServiceAccount", named),
            (f"{group}/v1", "Role", named | role),
            (f"{group}/v1", "RoleBinding", named | binding),
        ):
            text = json.dumps({"apiVersion": version, "kind": kind, **body})
            self.kubectl("apply", f"--namespace={namespace}", "--filename=-", text=text)
        self.wait_for("serviceaccount/default", f"--namespace={namespace}")

    def operate(self, namespace: str, name: str) -> None:
        """Start the Dask operator of a namespace."""
        self.start(
            name, "env", f"TIDEPOOL_OPERATOR_NAMESPACES={namespace}",
            "TIDEPOOL_OPERATOR_RULES_CONFIG_MAP=tidepool-flow-run-rules", sys.executable, "-m", "kopf", "run",
            "--module=tidepool.operate.dask_operator", f"--namespace={namespace}", "--standalone",
        )  # fmt: skip


@contextmanager
def control_plane(binaries: Path, controller_qps: int, *, policies: bool) -> Iterator[ControlPlane]:
    """Run a control plane with what k8s/ has for a whole Kubernetes cluster."""
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="tidepool-scale-", ignore_cleanup_errors=True)
        plane = ControlPlane(binaries, Path(stack.enter_context(folder)), stack)
        plane.up(controller_qps)
        kustomization = TOP / "k8s" / ("cluster" if policies else "crds")
        plane.kubectl("apply", "--server-side", "--kustomize", str(kustomization))
        yield plane


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--binaries", type=Path, required=True)
    arguments.add_argument(
        "--controller-qps", type=int, default=20, help="of the controller manager: 20 is its default"
    )
    arguments.add_argument("--no-policies", action="store_true")
    arguments.add_argument("--label", default="own control plane")
    arguments.add_argument("--namespaces", type=int, default=1, help="of flow runs, each with an operator of its own")
    arguments.add_argument("--deployments", type=int, default=0, help="so many pods, by as many Deployments and by one")
    arguments.add_argument("scale", nargs="*", help="arguments of benchmarks.scale, after --")
    chosen = arguments.parse_args()
    with control_plane(chosen.binaries, chosen.controller_qps, policies=not chosen.no_policies) as plane:
        path = f"PATH={chosen.binaries}:/usr/bin:/bin"
        before = ["env", f"KUBECONFIG={plane.kubeconfig}", path, sys.executable, "-m"]
        if pods := chosen.deployments:
            for number, replicas in ((pods, 1), (1, pods)):
                subprocess.run([*before, "benchmarks.deployments", str(number), str(replicas)], check=True)
                print(plane.waited(), flush=True)
            return
        namespaces = [f"{NAMESPACE}-{number}" for number in range(chosen.namespaces)]
        for number, each in enumerate(namespaces):
            plane.prepare(each)
            plane.operate(each, f"operator {number + 1}" if number else "operator")
        plane.wait_until_calm()
        parts = [f"--part={name}={pid}" for name, pid in plane.parts.items()]
        program = ["benchmarks.scale", "--no-prefect", *parts]
        program.append(f"--runs-namespace={','.join(namespaces)}")
        for arguments_of in (["--idle=40", f"--label={chosen.label}"], [*chosen.scale, f"--label={chosen.label}"]):
            subprocess.run([*before, *program, *arguments_of], check=True, stdout=subprocess.DEVNULL)
            print(plane.waited(), flush=True)


if __name__ == "__main__":
    main()
