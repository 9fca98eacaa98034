"""Private parts of kr8s: its HTTP session, and what it raises for a kubeconfig that is not one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    import kr8s.asyncio

_NO_CREDENTIALS = "no Kubernetes credentials: neither a pod's ServiceAccount nor a kubeconfig"
_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def require_credentials(kubeconfig: str) -> None:
    """Refuse, as `connect` does, where nothing holds credentials, without the import of kr8s.

    Args:
        kubeconfig: Value of the variable KUBECONFIG, files with colons between them; empty: ~/.kube/config.

    Raises:
        ValueError: there is neither a pod's ServiceAccount nor a kubeconfig.

    Why: on a laptop that has none, half a second of CPU time would tell only that.
    Watch: `kr8s._auth.KubeAuth.__init__`, which has these places.
    Delete when: kr8s is imported in a tenth of a second.
    """
    files = (kubeconfig or "~/.kube/config").split(os.pathsep)
    if not any(Path(each).expanduser().exists() for each in (_SERVICE_ACCOUNT, *files) if each):
        raise ValueError(_NO_CREDENTIALS)


async def connect() -> kr8s.asyncio.Api:
    """Find the credentials of the Kubernetes API, the pod's ServiceAccount or the kubeconfig's, and try them.

    Raises:
        ValueError: there are none, or the kubeconfig is not one; the message says which.

    Why: kr8s 0.20.15 takes what it needs from a kubeconfig without a look at what is there.
    Watch: `KubeConfig`, `KubeAuth`: a file that is empty, has no `current-context`, or is not YAML.
    Delete when: it raises one kind of error for these.
    """
    import kr8s.asyncio

    try:
        return await kr8s.asyncio.api()
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else "it is empty, or not YAML with contexts"
        raise ValueError(f"the kubeconfig (KUBECONFIG, or ~/.kube/config) is not valid: {missing}") from error
    except ValueError as error:
        raise ValueError(_NO_CREDENTIALS) from error


async def close_connection(connection: kr8s.asyncio.Api) -> None:
    """Close the connections to the Kubernetes API, which stay open until the garbage collector finds them otherwise.

    Why: kr8s 0.20.15 closes its session only to open another one.
    Watch: `kr8s._api.Api._session` and its uses.
    Delete when: `Api` has a public `close`.
    """
    if (session := connection._session) is not None:
        await session.aclose()
