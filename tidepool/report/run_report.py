"""The report of each run: the artifact `<deployment>-run`, written at the run's end, whatever the end.

Three processes write it, each when those before it cannot: the flow's own process at its end; its supervisor in the
driver pod, when that process was killed or cancelled; the operator, when the driver is gone (`operate/sweep`).
"""

from __future__ import annotations

import re
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

from tidepool.report import history, run_record
from tidepool.report.reason import command, reason, sentence
from tidepool.report.run_page import Past, Run, headline, page
from tidepool.settings import settings

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.client.schemas.responses import DeploymentResponse

    from tidepool.report.run_record import RunRecord

# The state is recorded by then, only the end of the process waits.
_REQUEST_SECONDS = 10.0
_HISTORY_SECONDS = 5.0
_RUNBOOK = re.compile(r"\[(docs/runbooks/[\w.-]+\.md)\]\(([^)]*)\)")
_NO_WORD = re.compile(r"[^a-z0-9]+")


def install() -> None:
    """Have each flow run of this process report its end; idempotent. Its author does nothing for it."""
    from tidepool.upstream.prefect import follow_flow_runs

    if settings().report.enabled:
        follow_flow_runs(_begin, explain, _ended)


def explain(state: State[Any]) -> None:
    """Give a final state the sentence that the report begins with as its message; an author's own words stay."""
    kind, record = state.type.value, run_record.current()
    if kind != "COMPLETED" or record.warnings or not state.message:
        state.message = sentence(kind, state.message, record)


def key(name: str) -> str:
    """Return the key of the reports of a deployment, or of a flow: Prefect's keys are lower case, digits and dashes."""
    return f"{_NO_WORD.sub('-', name.lower()).strip('-') or 'flow'}-run"


def publish(flow_run_id: UUID, record: RunRecord, *, kind: str = "", message: str = "", incomplete: str = "") -> None:
    """Write the report of a flow run, and add a Completed one to the history of its deployment.

    Args:
        flow_run_id: The flow run.
        record: Its figures.
        kind: Type of its final state, if the server does not know it yet, such as CRASHED.
        message: The message of that state.
        incomplete: Why figures are missing; empty if none is.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate
    from prefect.logging.loggers import flow_run_logger
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}),
        get_client(sync_client=True, httpx_settings={"timeout": _REQUEST_SECONDS}) as client,
    ):
        flow_run = client.read_flow_run(flow_run_id)
        deployment = client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
        name = deployment.name if deployment else client.read_flow(flow_run.flow_id).name
        log = cast("logging.Logger", flow_run_logger(flow_run))
        if not kind and flow_run.state is not None:
            kind, message = flow_run.state.type.value, flow_run.state.message or ""
        run = replace(_run(flow_run, name, deployment, record, kind, message), incomplete=incomplete)
        if kind in {"FAILED", "CRASHED"}:
            _tell(run, log)
        past = _past(key(name), log)
        run = replace(run, past=past)
        client.create_artifact(
            ArtifactCreate(
                key=key(name), type="markdown", description=headline(run), data=page(run), flow_run_id=flow_run_id
            )
        )
    if kind == "COMPLETED" and past is not None:
        _remember(key(name), run, past, log)


def _begin() -> None:
    run_record.begin(settings().report.record)


def _ended(flow_run: FlowRun) -> None:
    from prefect.logging.loggers import flow_run_logger

    state = flow_run.state
    if state is None or not state.is_final():
        return
    try:
        publish(flow_run.id, run_record.current(), kind=state.type.value, message=state.message or "")
        run_record.save(published=True)
    except Exception as error:  # noqa: BLE001 - a missing report must not fail a run
        cast("logging.Logger", flow_run_logger(flow_run)).warning("the report of the run was not published: %r", error)


def _run(
    flow_run: FlowRun,
    name: str,
    deployment: DeploymentResponse | None,
    record: RunRecord,
    kind: str,
    message: str,
) -> Run:
    state = flow_run.state
    same = state is not None and state.type.value == kind
    prices = settings().operator
    return Run(
        id=str(flow_run.id),
        name=flow_run.name,
        deployment=name,
        state=(state.name if same and state else None) or kind.capitalize(),
        reason=reason(kind, message, record),
        begun=flow_run.start_time.timestamp() if flow_run.start_time else 0.0,
        ended=flow_run.end_time.timestamp() if flow_run.end_time else time.time(),
        record=record,
        links={**_links(flow_run, deployment, kind), **record.links},
        prices=(prices.core_hour_price, prices.gib_hour_price),
        deployment_id=str(flow_run.deployment_id or ""),
    )


def _links(flow_run: FlowRun, deployment: DeploymentResponse | None, kind: str) -> dict[str, str]:
    from prefect.utilities.urls import url_for

    links = runbooks(deployment.description if deployment else "", kind)
    if ui := url_for("flow-run", obj_id=flow_run.id):
        links["Run and logs"] = ui
    if deployment:
        links |= deployed(deployment.version, flow_run.job_variables, deployment.job_variables)
    return links


def deployed(version: str | None, *job_variables: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what a run consists of, by title: the version of its deployment, and the image of the first that has one.

    Args:
        version: The deployment's version.
        job_variables: Those of the flow run, and of its deployment.
    """
    images = [str(each["image"]) for each in job_variables if each and each.get("image")]
    return {title: text for title, text in (("Version", version), ("Image", next(iter(images), ""))) if text}


def runbooks(description: str | None, kind: str) -> dict[str, str]:
    """Return the runbooks of a run by title: the one that its deployment's description links, and those of failures."""
    own, base = _RUNBOOK.search(description or ""), settings().repository.url.rstrip("/")
    path, target = own.groups() if own else ("", "")
    if own and not base and target.endswith(f"/{path}"):
        base = target.removesuffix(f"/{path}")  # the setting's value when the deployment was registered
    links = {}
    if own:
        links["Runbook"] = f"{base}/{path}" if base else target if "://" in target else path
    if kind in {"FAILED", "CRASHED"}:
        links["Runbook of failed runs"] = "/".join(each for each in (base, "docs/runbooks/run-failed.md") if each)
        links |= {"On call": f"{base}/docs/on-call.md"} if base else {}
    return links


def _tell(run: Run, log: logging.Logger) -> None:
    """Log what to do about a run that ended badly: of a run's page, its log is what people see first."""
    advice = run.reason.advice
    lines = [f"What to do: {advice}", command(advice, run.id, run.deployment_id)]
    lines += [f"{title}: {address}" for title, address in run.links.items() if title.startswith("Runbook")]
    lines.append(f"Report: artifact {key(run.deployment)}")
    # A warning: whoever looks at errors and warnings only sees it, too.
    log.warning("%s", "\n".join(line for line in lines if line))


def _past(name: str, log: logging.Logger) -> list[Past] | None:
    """Return the last Completed runs; None if the store does not tell, and may have some."""
    found: Future[list[Past]] = Future()

    def read() -> None:
        try:
            found.set_result(history.read(name))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            found.set_exception(error)

    # A store that does not answer is often why the run failed: whoever looks into it must not wait for it, too.
    Thread(target=read, name=f"history of {name}", daemon=True).start()
    wait([found], _HISTORY_SECONDS)
    if not found.done():
        log.warning(
            "the store has not answered within %g s, so the report of %s has no usual figures", _HISTORY_SECONDS, name
        )
        return None
    try:
        return found.result()
    except Exception as error:  # noqa: BLE001 - any store; the report is written without the usual figures
        log.warning("the history of the runs of %s cannot be read, so the report has no usual figures: %r", name, error)
        return [] if isinstance(error, ValueError) else None  # one that is not a history is begun again


def _remember(name: str, run: Run, past: Sequence[Past], log: logging.Logger) -> None:
    try:
        history.add(name, past, Past(run.id, run.seconds, run.record.items, run.record.retried))
    except Exception as error:  # noqa: BLE001 - any store; the run is Completed
        log.warning("the run was not added to the history of %s: %r", name, error)
