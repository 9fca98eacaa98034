"""Connection to the Prefect server, and the requests that `config`, `reconcile` and the commands share."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from tidepool.errors import TidepoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect.client.orchestration import SyncPrefectClient

Json = dict[str, Any]

PAGE = 200
"""Objects per request, and ids in a filter: the server's limit."""


class ServerError(TidepoolError):
    """The Prefect server does not answer, or rejected a request."""


@contextmanager
def connect(retries: int = 1) -> Iterator[SyncPrefectClient]:
    """Open a client of the server of PREFECT_API_URL.

    Args:
        retries: Number of times that a request without an answer is sent again; the delays double from two seconds.

    Raises:
        UsageError: PREFECT_API_URL is not set.
        ServerError: the server does not answer or rejects a request, while the client is in use.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        raise UsageError("PREFECT_API_URL is not set; set it to the API of the Prefect server (http://host:4200/api)")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}), get_client(sync_client=True) as client:
        try:
            yield client
        except PrefectHTTPStatusError as error:
            detail = error.response.text[:500]
            raise ServerError(
                f"the Prefect server at {url} rejected {error.request.method} {error.request.url.path} "
                f"({error.response.status_code}): {detail}"
            ) from error
        except httpx.TransportError as error:
            raise ServerError(
                f"the Prefect server at {url} does not answer: {error or type(error).__name__}"
            ) from error


def pages(client: SyncPrefectClient, path: str, body: Mapping[str, Any]) -> list[Json]:
    """Return all objects that a filter request finds."""
    found: list[Json] = []
    while True:
        page = client.request("POST", cast("Any", path), json={**body, "limit": PAGE, "offset": len(found)}).json()
        found += page
        if len(page) < PAGE:
            return found


def set_schedules_active(client: SyncPrefectClient, deployment: Json, *, active: bool) -> None:
    """Turn all schedules of a deployment on or off. Idempotent: only those that differ are written.

    Args:
        client: A client of the server.
        deployment: The deployment, as the API returns it.
        active: False to turn them off.
    """
    for schedule in deployment["schedules"]:
        if schedule["active"] is not active:
            client.update_deployment_schedule(deployment["id"], schedule["id"], active=active)
