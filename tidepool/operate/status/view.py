"""The status as text for a terminal and as JSON. Pure."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from tidepool.operate.status.picture import Overview, RunStatus
from tidepool.report.reason import with_command
from tidepool.report.run_page import duration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidepool.operate.status.picture import Finding

_LABEL = 14
_RUNBOOKS = "docs/runbooks/"


def as_json(status: Overview | RunStatus) -> str:
    """Return the status as one JSON object; `wrong` says what the exit code says."""
    return json.dumps({**asdict(status), "wrong": status.wrong}, indent=2)


def as_text(status: Overview | RunStatus, width: int) -> str:
    """Return the status as lines of at most that many characters, where words allow it."""
    lines = _run(status) if isinstance(status, RunStatus) else _overview(status)
    return "\n".join(part for line in lines for part in _wrapped(line, width))


def _overview(status: Overview) -> list[tuple[str, str]]:
    wrong = [each for each in status.findings if each.wrong]
    count = f"{len(wrong)} thing{'' if len(wrong) == 1 else 's'} wrong" if wrong else "nothing is wrong"
    if paused := len(status.findings) - len(wrong):
        count += f", {paused} paused"
    lines = [("", count if "prefect" not in status.unknown else "the Prefect server does not answer")]
    newest_first = sorted(wrong, key=lambda one: one.since, reverse=True)
    lines += [(each.kind, f"{each.subject}: {each.text}{_runbook(each)}") for each in newest_first]
    meant: dict[tuple[str, str], list[str]] = {}
    for each in status.findings:
        if not each.wrong:
            meant.setdefault((each.kind, f"{each.text}{_runbook(each)}"), []).append(each.subject)
    lines += [(kind, f"{', '.join(subjects)}: {text}") for (kind, text), subjects in meant.items()]
    return [*lines, *_unknown(status.unknown.items())]


def _runbook(finding: Finding) -> str:
    return f"  {_RUNBOOKS}{finding.runbook}" if finding.runbook else ""


def _run(status: RunStatus) -> list[tuple[str, str]]:
    lines = [("", f"{status.state.upper()}  {status.deployment} / {status.name}  {duration(status.seconds)}")]
    lines += [("MISMATCH", each) for each in status.mismatches]
    lines.append(("why", status.why))
    if status.advice:
        lines.append(("do", with_command(status.advice, status.id, status.deployment_id)))
    lines += [("", f"{title}: {address}") for title, address in status.links.items()]
    for at, (seconds, name, message) in enumerate(status.timeline):
        lines.append(("" if at else "timeline", f"{seconds:+z9.1f} s  {name}{f': {message}' if message else ''}"))
    if status.items:
        count = ", ".join(f"{number} {kind.lower()}" for kind, number in status.items.items())
        lines.append(("items", f"{sum(status.items.values())} task runs: {count}"))
    lines += [("" if at else "failed", f"{name}: {error}") for at, (name, error) in enumerate(status.failed)]
    lines += [("" if at else "kubernetes", each) for at, each in enumerate(status.objects)]
    lines += [("" if at else "warnings", each) for at, each in enumerate(status.warnings)]
    return [*lines, ("run", status.id), *_unknown(status.unknown.items())]


def _unknown(sources: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [("unknown", f"{name}: {why}") for name, why in sources]


def _wrapped(line: tuple[str, str], width: int) -> list[str]:
    label, text = line
    if not label and text.split("  ")[0].isupper():
        return [text]  # the first line: a run's state
    indent = " " * _LABEL
    return textwrap.wrap(
        text,
        max(width, 2 * _LABEL),
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label]
