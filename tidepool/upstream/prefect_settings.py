"""Prefect's settings without Prefect's client."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.settings import Settings


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

    Why: the package imports its whole client before it is asked for anything, two thirds of the time of a command that
    asks the server by itself.
    Watch: `prefect/__init__.py`; what `prefect.settings` imports of the package besides itself.
    Delete when: `import prefect.settings` takes a tenth of a second.
    """
    if "prefect" in sys.modules:
        from prefect.settings import get_current_settings

        return _of(get_current_settings())
    return _without_prefect()


# Once: what is imported and forgotten is never freed.
@cache
def _without_prefect() -> ClientSettings:
    spec = find_spec("prefect")
    assert spec is not None  # noqa: S101 - it is a dependency
    # A package that has not been executed: its modules are found, and nothing else is imported.
    sys.modules["prefect"] = module_from_spec(spec)
    try:
        from prefect.settings.models.root import Settings

        return _of(Settings())
    finally:
        for name in [each for each in sys.modules if each.partition(".")[0] == "prefect"]:
            del sys.modules[name]


def _of(found: Settings) -> ClientSettings:
    api = found.api
    return ClientSettings(
        url=api.url or "",
        password=api.auth_string.get_secret_value() if api.auth_string else "",
        headers=found.client.custom_headers,
        unverified=bool(api.tls_insecure_skip_verify),
        certificates=api.ssl_cert_file,
    )
