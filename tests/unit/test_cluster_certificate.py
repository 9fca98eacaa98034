"""Key and certificate of a Dask cluster: who has them is answered, by Dask's own connections, and no one else is."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from distributed.comm import connect
from distributed.comm.core import FatalCommClosedError
from distributed.core import Server, rpc
from distributed.security import Security

from tidepool.compute.clusters.kubernetes import certificate

KEY = "0123456789abcdef" * 2


def scheduler(of: Security) -> dict[str, Any]:
    """How the pods of a cluster listen."""
    files = {"tls_scheduler_cert": of.tls_client_cert, "tls_scheduler_key": of.tls_client_key}
    there = Security(require_encryption=True, tls_ca_file=of.tls_ca_file, **files)
    return dict(there.get_listen_args("scheduler"))


def ask(there: Security, protocol: str, connection: dict[str, Any]) -> str:
    """Connect to a server of a cluster, and ask it; return its answer."""

    async def scenario() -> str:
        async with Server({"ask": lambda: "answer"}) as server:
            await server.listen("tls://127.0.0.1:0", **scheduler(there))
            address = server.address.replace("tls", protocol)
            comm = await connect(address, timeout=1, **connection)
            await comm.close()
            async with rpc(address, connection_args=connection) as caller:
                return str(await caller.ask())

    return asyncio.run(scenario())


def test_the_holder_of_the_key_is_answered() -> None:
    mine = certificate.own().security()
    assert ask(mine, "tls", mine.get_connection_args("client")) == "answer"


def without_verification(of: Security | None) -> dict[str, Any]:
    """An attacker's connection, which accepts any server; with a certificate, or with none."""
    context = of.get_connection_args("client")["ssl_context"] if of else ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return {"ssl_context": context}


@pytest.mark.parametrize(
    ("protocol", "connection", "reason"),
    [
        ("tls", without_verification(certificate.own().security()), "certificate verify failed"),
        ("tls", without_verification(certificate.shared(KEY, "a").security()), "certificate verify failed"),
        ("tls", without_verification(None), "peer did not return a certificate"),
        ("tcp", {}, "wrong version number"),
    ],
    ids=["another cluster's key", "another shared cluster's key", "no key", "no TLS"],
)
@pytest.mark.parametrize("there", [certificate.own(), certificate.shared(KEY, "b")], ids=["own", "shared"])
def test_a_scheduler_refuses_everyone_else(
    there: certificate.Identity,
    protocol: str,
    connection: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(OSError, match=r"."):
        ask(there.security(), protocol, connection)
    assert "TLS handshake failed with remote 'tls://127.0.0.1:" in caplog.text
    assert reason in caplog.text


def test_a_driver_believes_no_other_scheduler() -> None:
    with pytest.raises(FatalCommClosedError, match="TLS certificate does not match"):
        ask(certificate.own().security(), "tls", certificate.own().security().get_connection_args("client"))


def test_runs_with_the_same_secret_have_the_same_identity_for_one_cluster_name() -> None:
    first, second = (certificate.shared(KEY, "shared-warm").security() for _ in range(2))
    assert (first.tls_ca_file, first.tls_client_key) == (second.tls_ca_file, second.tls_client_key)
    assert ask(first, "tls", second.get_connection_args("client")) == "answer"
    others = {certificate.shared(*each).key for each in (("x" + KEY, "shared-warm"), (KEY, "shared-cold"))}
    assert len(others | {first.tls_client_key}) == 3


def test_an_identity_does_not_show_its_key() -> None:
    mine = certificate.own()
    assert "BEGIN PRIVATE KEY" in mine.key
    assert "PRIVATE" not in repr(mine) + repr(mine.security()) + mine.security()._repr_html_()
