"""Key and certificate of a Dask cluster: its parts encrypt what they send, and each refuses who does not have them.

One self-signed certificate is the identity of driver, scheduler and workers, and the only one that they trust. It is a
function of 32 bytes, which are random for a run's own cluster. Runs that share a cluster derive them from a secret that
all of them hold: none may read the Secret that the first one created. Hence Ed25519, whose signatures contain nothing
random, and constant dates, with which no clock can be wrong.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed.security import Security

_NAME = "tidepool-dask-cluster"
# RFC 5280's date for a certificate without an end.
_VALID = (datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))


@dataclass(frozen=True)
class Identity:
    """Key and certificate of a cluster, as PEM."""

    certificate: str
    key: str = field(repr=False)

    def security(self) -> Security:
        """Return what Dask's connections take."""
        # Not at the top: a driver makes the identity of its first cluster before it imports Dask.
        from distributed.security import Security

        return Security(
            require_encryption=True,
            tls_ca_file=self.certificate,
            tls_client_cert=self.certificate,
            tls_client_key=self.key,
        )


def own() -> Identity:
    """Return a new identity, for the cluster of one run."""
    return _identity(secrets.token_bytes(32))


def shared(key: str, cluster: str) -> Identity:
    """Return the identity of a shared cluster of that name; the same for everyone who has the key."""
    return _identity(hmac.digest(key.encode(), cluster.encode(), "sha256"))


def _identity(seed: bytes) -> Identity:
    # Not at the top: each driver imports this module, and many have no cluster.
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    key = Ed25519PrivateKey.from_private_bytes(seed)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
    builder = builder.not_valid_before(_VALID[0]).not_valid_after(_VALID[1]).public_key(key.public_key())
    return Identity(
        builder.sign(key, None).public_bytes(Encoding.PEM).decode(),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    )
