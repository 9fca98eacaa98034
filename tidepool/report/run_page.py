"""The report of a run as a page of Markdown: the reason first, then what to do, then figures. Pure functions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidepool.report.reason import with_command
from tidepool.report.timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidepool.report.reason import Reason
    from tidepool.report.run_record import Item, RunRecord

_GIB = 1024**3
_MINUTE, _HOUR = 60, 3600
_NAME = 60
_ERROR = 160
LIMIT_BYTES = 100 * 1024


@dataclass(frozen=True)
class Past:
    """A Completed run of the same deployment.

    Attributes:
        id: Its id.
        seconds: Its duration.
        items: Items that ended; None if it is not known.
        retried: Additional tries of items; None if it is not known.
    """

    id: str
    seconds: float
    items: int | None = None
    retried: int | None = None


@dataclass(frozen=True)
class Run:
    """A flow run that has ended.

    Attributes:
        id: Its id.
        name: Its name.
        deployment: The deployment, or the flow without one.
        state: Name of its final state, such as Failed.
        reason: Why it ended so.
        begun: Start, in seconds since the epoch; 0 if it never began.
        ended: End.
        record: Figures of the run.
        past: The last Completed runs; None if they are not known.
        links: Addresses by title, the runbook first.
        prices: Price of a core-hour and of a GiB-hour; 0 for none.
        incomplete: Why figures are missing; empty if none is.
        deployment_id: Id of the deployment; empty without one.
    """

    id: str
    name: str
    deployment: str
    state: str
    reason: Reason
    begun: float
    ended: float
    record: RunRecord
    past: Sequence[Past] | None = ()
    links: dict[str, str] = field(default_factory=dict)
    prices: tuple[float, float] = (0.0, 0.0)
    incomplete: str = ""
    deployment_id: str = ""

    @property
    def what_to_do(self) -> str:
        """The advice with its command; empty if there is nothing to do."""
        return with_command(self.reason.advice, self.id, self.deployment_id)

    @property
    def seconds(self) -> float:
        """Its duration."""
        return max(self.ended - self.begun, 0.0) if self.begun else 0.0


def duration(seconds: float) -> str:
    """Return a duration as text, such as `4 min 12 s`."""
    if seconds < 10:  # noqa: PLR2004 - a digit more where it matters
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def headline(run: Run) -> str:
    """Return the run's end in one line, for the list of artifacts."""
    took = f" · {duration(run.seconds)}" if run.begun else ""
    told = "items done" in run.reason.sentence
    items = f" · {run.record.done} of {run.record.submitted} items" if run.record.submitted and not told else ""
    return " ".join(f"{_title(run)}{took}{items}".split())


def _title(run: Run) -> str:
    """Return state and sentence; a Completed run's sentence begins with its state."""
    said = run.reason.sentence
    if said.startswith(run.state.lower()):
        return run.state + said.removeprefix(run.state.lower())
    return f"{run.state}: {said}"


def page(run: Run) -> str:
    """Return the page, within `LIMIT_BYTES`: the timeline goes first, then the tables of items."""
    for lanes, items in ((True, True), (False, True), (False, False)):
        text = _page(run, lanes=lanes, items=items)
        if len(text.encode()) <= LIMIT_BYTES:
            return text
    return text.encode()[:LIMIT_BYTES].decode(errors="ignore")


def _page(run: Run, *, lanes: bool, items: bool) -> str:
    parts = [f"# {_text(_title(run))}"]
    if run.reason.advice or run.links:
        parts.append(_what_to_do(run))
    parts += [f"- Warning: {_text(each)}" for each in run.record.warnings]
    if not run.begun:
        parts.append("Its flow did not begin.")
    elif run.incomplete:
        parts.append(f"Figures are incomplete: {run.incomplete}.")
    if run.begun:
        parts.append(_beside(run))
    if items:
        parts += _items(run.record)
    if lanes and (drawn := timeline(run.record.lanes, run.begun, run.ended)):
        shown = len(run.record.lanes)
        thinned = f" {shown} of {run.record.items} items are drawn." if shown < run.record.items else ""
        parts += ["## Timeline", drawn, f"One lane for each thread of a worker; failed items are red.{thinned}"]
    parts += _cluster(run)
    parts.append(f"Flow run `{run.id}` ({_text(run.name)}). `tidepool status {run.id[:8]}` shows it with its pods.")
    return "\n\n".join(parts) + "\n"


def _what_to_do(run: Run) -> str:
    links = " · ".join(_link(title, address) for title, address in run.links.items())
    advice = f"**What to do:** {run.what_to_do}" if run.what_to_do else ""
    return "\n\n".join(each for each in (advice, links) if each)


def _link(title: str, address: str) -> str:
    return f"[{title}]({address})" if address.startswith(("http://", "https://")) else f"{title}: `{address}`"


def _beside(run: Run) -> str:
    record, past = run.record, run.past or ()

    def usual(values: Iterable[int | None]) -> str:
        known = [each for each in values if each is not None]
        return f"{statistics.median(known):,.0f}" if known else "-"

    seconds = duration(statistics.median([each.seconds for each in past])) if past else "-"
    rows = [
        f"| duration | {duration(run.seconds)} | {seconds} |",
        f"| items | {record.items:,} | {usual(each.items for each in past)} |",
        f"| retries of items | {record.retried:,} | {usual(each.retried for each in past)} |",
    ]
    none = "unknown: the store did not answer" if run.past is None else "no Completed run before"
    count = f"median of the last {len(past)} Completed" if past else none
    return "\n".join([f"| | this run | {count} |", "|---|---:|---:|", *rows])


def _items(record: RunRecord) -> list[str]:
    if not record.submitted and not record.items:
        return []
    left = max(record.submitted - record.items, 0)
    parts = [
        "## Items",
        f"{record.done:,} done, {record.failed:,} failed, {left:,} not ended, {record.retried:,} retried.",
    ]
    if record.errors:
        rows = [f"| {_cell(each.name, _NAME)} | {each.tries} | {_cell(each.error, _ERROR)} |" for each in record.errors]
        parts.append("\n".join(["| failed item | tries | error |", "|---|---:|---|", *rows]))
        if record.failed > len(record.errors):
            parts.append(f"And {record.failed - len(record.errors):,} more.")
    if slowest := [each for each in record.slowest if each.seconds]:
        parts.append("\n".join(["| slowest items | seconds | tries |", "|---|---:|---:|", *map(_slow, slowest)]))
    return parts


def _slow(item: Item) -> str:
    return f"| {_cell(item.name, _NAME)} | {item.seconds:,.1f} | {item.tries} |"


def _cluster(run: Run) -> list[str]:
    workers, events = run.record.workers, run.record.events
    if not workers.had and not events:
        return []
    rows = [f"| workers | {workers.asked} asked, {workers.had} had, {workers.lost} lost |"]
    if workers.memory_peak:
        limit = f" of {workers.memory_limit / _GIB:.2f} GiB" if workers.memory_limit else ""
        rows.append(f"| largest memory of a worker | {workers.memory_peak / _GIB:.2f}{limit or ' GiB'} |")
    if workers.core_seconds:
        rows.append(f"| core-seconds | {workers.core_seconds:,.1f} |")
        rows.append(f"| GiB-seconds | {workers.gib_seconds:,.1f} |")
    core, gib = run.prices
    if core or gib:
        cost = (workers.core_seconds * core + workers.gib_seconds * gib) / _HOUR
        rows.append(f"| price of the workers | {cost:,.4f} |")
    parts = ["## Dask cluster", "\n".join(["| | |", "|---|---|", *rows])]
    if events:
        parts.append("\n".join(f"- {at - run.begun:+z.1f} s: {_text(text)}" for at, text in events))
    return parts


def _cell(text: str, most: int) -> str:
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return _text(short).replace("|", "\\|")


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    line = " ".join(text.split())
    for each in "\\`*_[]<>":
        line = line.replace(each, f"\\{each}")
    return line
