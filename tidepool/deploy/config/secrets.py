"""Values that look like a secret in plain text; a reference to one (`{{ … }}`) is fine."""

from __future__ import annotations

import re

from tidepool.deploy.config import placeholders

_NAME = re.compile(
    r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL|AUTH_STRING)", re.IGNORECASE
)
_NAME_OF_A_REFERENCE = re.compile(r"(_NAME|_FILE|_PATH|_ID|_REF|_ENABLED|_SECONDS)$", re.IGNORECASE)
_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|hooks\.slack\.com/services/\w|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^/\s:@]+:[^/\s@{]+@|pnu_[A-Za-z0-9]{20,}"
)


def is_secret_value(value: object) -> bool:
    """Return whether a value is a credential by its form: a key of a cloud, a token, a URL with a password."""
    return isinstance(value, str) and _VALUE.search(value) is not None


def is_secret_variable(name: str, value: object) -> bool:
    """Return whether the name or the value of a variable shows that it is a credential in plain text."""
    if not isinstance(value, str) or not value or placeholders.find(value):
        return False
    named = _NAME.search(name) is not None and _NAME_OF_A_REFERENCE.search(name) is None
    return named or is_secret_value(value)
