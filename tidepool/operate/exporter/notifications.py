"""Messages about failed runs: what on-call reads on a phone. They go to the targets of `TIDEPOOL_NOTIFY_URLS`."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidepool import notify
from tidepool.operate.exporter.incidents import FAILED, Failure, Incidents
from tidepool.report.reason import reason, why, with_command
from tidepool.report.run_page import duration
from tidepool.report.run_record import RunRecord
from tidepool.report.run_report import runbooks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from tidepool.operate.exporter.incidents import Told
    from tidepool.operate.exporter.reader import Fact
    from tidepool.operate.exporter.records import Deployment, Run

# A target may be away for so long before a message is given up; between two tries there are ever more seconds.
_TRY_SECONDS = 900.0
_PAUSE_SECONDS, _LONGER = 15.0, 4
_MOST_WAITING = 100
_LISTED = 10
_TITLE = 120
_DIGEST = re.compile(r"(@sha256:[0-9a-f]{12})[0-9a-f]{52}")
_NAMES = "sig|signature|token|secret|password|passwd|credential|api_?key|access_?key"
_MASKED = (
    (re.compile(r"://\S+@"), "://***@"),
    (re.compile(rf"(?i)([\w.-]*(?:{_NAMES})[\w.-]*['\"]?\s*[=:]\s*)[^&\s,;)]+"), r"\1***"),
)
# What `report.reason` and a worker say of an item: its arguments.
_ITEM = re.compile(r"(?:; item: .*?| \([\w.-]+: .*\))(?=; [0-9]+ of [0-9]+ items failed$|$)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
        title: The event in one line, as a phone shows it.
        body: Markdown.
        kind: Of `notify.send`.
    """

    title: str
    body: str
    kind: notify.Kind


@dataclass
class _Letter:
    """A message that waits: what it tells, since when, how often it was tried, and when it is due."""

    told: Told
    message: Message
    since: float
    tries: int = 0
    due: float = 0.0


class Notifications:
    """Tells on-call what has failed, of the runs that the exporter reads.

    Args:
        states: Returns the present states of flow runs, by id.
        link: Returns the address of a flow run in the UI by its id; None without one.
        count: Takes note of a message's end: one of `metrics.MESSAGE_ENDS`.
    """

    def __init__(
        self,
        states: Callable[[Iterable[str]], Awaitable[dict[str, str]]],
        link: Callable[[str], str | None],
        count: Callable[[str], None],
    ) -> None:
        self._states = states
        self._link = link
        self._count = count
        self._incidents = Incidents()
        self._unknown: list[Run] = []
        self._outbox: deque[_Letter] = deque()

    async def observe(
        self, finished: Iterable[Run], deployments: dict[str, Deployment], facts: dict[str, Fact], now: float
    ) -> bool:
        """Take note of runs that have ended, and put what is to be told into the outbox.

        Args:
            finished: Runs that have ended since the last time, oldest first.
            deployments: Deployments by id.
            facts: The latest ends of their runs.
            now: Unix time.

        Returns:
            Whether a run has failed whose deployment is not known: it is looked for once more, the next time.
        """
        again, self._unknown = self._unknown, []
        completed = [each for each in finished if each.state == "Completed" and each.deployment in deployments]
        for run in (*again, *(each for each in finished if each.state in FAILED)):
            if run.deployment in deployments:
                success = facts[run.deployment].success if run.deployment in facts else None
                self._incidents.add(Failure(run, deployments[run.deployment], _sentence(run), success))
            elif run.deployment and run not in again:
                self._unknown.append(run)
        self._incidents.completed(completed)
        # The server may not answer: what was noted above stays.
        if due := self._incidents.due(now):
            states = await self._states(due)
            self._incidents.settle(due, [key for key in due if states.get(key) in FAILED])
        # Behind so many messages that wait, more would say the same: what lasts is told when there is room.
        if len(self._outbox) < _MOST_WAITING:
            self._outbox += [_Letter(each, message(each, self._link, now), now) for each in self._incidents.told(now)]
        return bool(self._unknown)

    async def send(self) -> None:
        """Send what is in the outbox, in its order; what no target accepts is tried again for a quarter of an hour.

        After that, what it has told and still lasts is part of a later message.
        """
        while self._outbox and self._outbox[0].due <= time.time():
            letter = self._outbox[0]
            try:
                accepted = await asyncio.to_thread(
                    notify.send, _log, letter.message.title, letter.message.body, letter.message.kind
                )
            except Exception:  # noqa: BLE001 - a plug-in of a target may raise anything; the figures go on
                _log.exception("a message was not sent: %s", letter.message.title)
                accepted = 0
            if not accepted and time.time() - letter.since < _TRY_SECONDS:
                letter.due = time.time() + _PAUSE_SECONDS * _LONGER**letter.tries
                letter.tries += 1
                return
            if not accepted:
                _log.error("gave up a message that no target has accepted: %s", letter.message.title)
                self._incidents.lost(letter.told)
            self._count("accepted" if accepted else "given up")
            self._outbox.popleft()


def _sentence(run: Run) -> str:
    """Return why a run failed, without secrets and without the arguments of an item."""
    text = run.message
    for pattern, mask in _MASKED:
        text = pattern.sub(mask, text)
    return _ITEM.sub("", why(run.state, text)) or why(run.state, "")


def _harmless(text: str) -> str:
    """Return a text of a flow on one line, in which a chat finds no mention; the digest of an image can be copied."""
    return re.sub(r"([!@])(?!sha256:)(?=\S)", "\\1\u200b", " ".join(text.split()))


def _quoted(text: str) -> str:
    """Return a text of a flow as code: its author's Markdown and HTML are none of the message's."""
    return f"`{_harmless(text).replace('`', chr(39))}`"


def message(told: Told, link: Callable[[str], str | None], now: float) -> Message:
    """Return what to tell as a message: the reason first.

    It has no parameters of a run: not its name either, which may be made of them.

    Args:
        told: What to tell.
        link: Returns the address of a flow run in the UI.
        now: Unix time.
    """
    if told.over:
        names = [f"{_name(each.deployment)} (after {_attempts(each.attempts)})" for each in told.over]
        return _message(f"Completed again: {_first(names)}", [_list(names)], "success")
    if told.causes > 1:
        names = sorted({_name(each.deployment) for each in told.failures})
        subject = f"{len(names)} deployments fail" if len(names) > 1 else f"{names[0]} fails"
        lines = [f"{_name(each.deployment)}: {_quoted(each.sentence)}" for each in told.failures]
        return _message(f"{subject}, for {told.causes} reasons", [_list(lines)], "failure")
    failure = told.failures[0]
    names = [_name(each.deployment) for each in told.failures]
    lines = [_quoted(failure.sentence), ""]
    lines += [_list(names), ""] if len(names) > 1 else []
    advice = reason(failure.run.state.upper(), failure.sentence, RunRecord()).advice
    lines += [f"Do: {with_command(advice, failure.run.id, failure.run.deployment)}", ""] if advice else []
    lines += [
        _facts(failure, told.attempts, now),
        "",
        *_links(failure, link),
        "",
        f"`tidepool status {failure.run.id[:8]}`",
    ]
    # What is wrong comes after the image, and a title has few characters.
    short = _DIGEST.sub(r"\1…", _harmless(failure.sentence))
    return _message(f"{failure.run.state}: {_first(names)}: {short}", lines, "failure")


def _message(title: str, lines: list[str], kind: notify.Kind) -> Message:
    return Message(title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…", "\n".join(lines), kind)


def _name(deployment: Deployment) -> str:
    return _harmless("/".join(deployment.key))


def _facts(failure: Failure, attempts: int, now: float) -> str:
    _, _, tier, team, _ = (_harmless(each) for each in failure.deployment.labels)
    parts = ["did not begin" if failure.run.started is None else f"ran {duration(failure.run.seconds)}"]
    parts += [f"{_attempts(attempts)} so far"] if attempts > 1 else []
    success = "no success known" if failure.success is None else f"last success {duration(now - failure.success)} ago"
    return ", ".join([*parts, success, *([f"tier {tier}"] if tier else []), *([f"team {team}"] if team else [])])


def _links(failure: Failure, link: Callable[[str], str | None]) -> list[str]:
    found = runbooks(failure.deployment.description, failure.run.state.upper())
    if ui := link(failure.run.id):
        found = {"Run": ui, "Report": ui.partition("/runs/")[0] + f"/artifacts/key/{report_key(failure)}", **found}
    # Not Markdown's links, which not every target makes links of.
    return [f"- {title}: {url}" for title, url in found.items()]


def report_key(failure: Failure) -> str:
    """Return the key of the report of a failed run."""
    from tidepool.report.run_report import key

    return key(failure.deployment.labels[1])


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _list(lines: list[str]) -> str:
    more = [f"- and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join([*(f"- {each}" for each in lines[:_LISTED]), *more])


def _attempts(number: int) -> str:
    return f"{number} failed attempt" + ("s" if number > 1 else "")
