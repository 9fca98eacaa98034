"""Private parts of kr8s: its HTTP session, and what it raises for a kubeconfig that is not one."""

from __future__ import annotations

import kr8s.asyncio
import yaml


async def connect() -> kr8s.asyncio.Api:
    """Find the credentials of the Kubernetes API, the pod's ServiceAccount or the kubeconfig's, and try them.

    Raises:
        ValueError: there are none, or the kubeconfig is not one; the message says which.

    Why: kr8s 0.20.15 takes what it needs from a kubeconfig without a look at what is there.
    Watch: `KubeConfig`, `KubeAuth`: a file that is empty, has no `current-context`, or is not YAML.
    Delete when: it raises one kind of error for these.
    """
    try:
        return await kr8s.asyncio.api()
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else "it is empty, or not YAML with contexts"
        raise ValueError(f"the kubeconfig (KUBECONFIG, or ~/.kube/config) is not valid: {missing}") from error
    except ValueError as error:
        raise ValueError("no Kubernetes credentials: neither a pod's ServiceAccount nor a kubeconfig") from error


async def close_connection(connection: kr8s.asyncio.Api) -> None:
    """Close the connections to the Kubernetes API, which stay open until the garbage collector finds them otherwise.

    Why: kr8s 0.20.15 closes its session only to open another one.
    Watch: `kr8s._api.Api._session` and its uses.
    Delete when: `Api` has a public `close`.
    """
    if (session := connection._session) is not None:
        await session.aclose()
