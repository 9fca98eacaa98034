"""Prefect's settings without Prefect's client."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.settings.models.api import APISettings
    from prefect.settings.models.client import ClientSettings as OfClient


@dataclass(frozen=True)
class ClientSettings:
    """The settings by which Prefect's client reaches the API.

    Attributes:
        url: URL of the API; empty if it is not set.
        password: `user:password`; empty without.
        headers: Additional headers of each request.
        unverified: The server's certificate is not verified.
        certificates: File of the authorities' certificates; None for those of the system.
    """

    url: str
    password: str
    headers: dict[str, str]
    unverified: bool
    certificates: str | None


def client_settings() -> ClientSettings:
    """Return the settings as a process that imports Prefect has them: of variables, files and the profile.

    No other thread may import Prefect meanwhile.

    Why: the package imports its whole client before it is asked for anything, and `prefect.settings` the models of all
    settings: two thirds of the time of a command that asks the server by itself.
    Watch: `prefect/__init__.py` and `prefect/settings/__init__.py`; what the two models import besides.
    Delete when: `import prefect.settings` takes a tenth of a second.
    """
    if "prefect" in sys.modules:
        from prefect.settings import get_current_settings

        found = get_current_settings()
        return _of(found.api, found.client)
    return _without_prefect()


# Once: what is imported and forgotten is never freed.
@cache
def _without_prefect() -> ClientSettings:
    try:
        for package in ("prefect", "prefect.settings"):
            spec = find_spec(package)
            assert spec is not None  # noqa: S101 - Prefect is a dependency
            # A package that has not been executed: its modules are found, and nothing else is imported.
            sys.modules[package] = module_from_spec(spec)
        from prefect.settings.models.api import APISettings
        from prefect.settings.models.client import ClientSettings as OfClient

        return _of(APISettings(), OfClient())
    finally:
        for name in [each for each in sys.modules if each.partition(".")[0] == "prefect"]:
            del sys.modules[name]


def _of(api: APISettings, client: OfClient) -> ClientSettings:
    return ClientSettings(
        url=api.url or "",
        password=api.auth_string.get_secret_value() if api.auth_string else "",
        headers=client.custom_headers,
        unverified=bool(api.tls_insecure_skip_verify),
        certificates=api.ssl_cert_file,
    )
