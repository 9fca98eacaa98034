"""What on-call is told of failed runs, and when."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.operate.exporter import incidents, notifications
from tidepool.operate.exporter.incidents import AGAIN_SECONDS, HOLD_SECONDS, MOST, Failure, Incidents, Told
from tidepool.operate.exporter.notifications import Notifications, message
from tidepool.operate.exporter.reader import Fact
from tidepool.operate.exporter.records import Deployment, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.conftest import Receiver

UI = "http://127.0.0.1:4200/v2/runs/flow-run/"


def deployment(name: str = "nightly", tier: str = "1") -> Deployment:
    text = "| [docs/runbooks/nightly.md](https://host/main/docs/runbooks/nightly.md) |"
    return Deployment(("sell", name, tier, "media", "pool"), (), scheduled=True, changed=0.0, description=text)


def run(
    number: int, ended: float, state: str = "Failed", name: str = "nightly", text: str = "no rows", attempts: int = 1
) -> Run:
    id_ = f"{number:08x}-0000-0000-0000-000000000000"
    return Run(id_, name, "pool", state, ended, ended, ended - 9, ended, 9.0, text, attempts)


def failure(number: int, ended: float, **more: Any) -> Failure:
    tier = more.pop("tier", "1")
    found = run(number, ended, **more)
    return Failure(found, deployment(found.deployment, tier), found.message, success=None)


class Shift:
    """Incidents over some minutes; every failure lasts, unless it is `retried`."""

    def __init__(self) -> None:
        self.incidents = Incidents()
        self.retried: set[str] = set()

    def at(self, now: float, *failures: Failure, completed: Iterable[Run] = ()) -> list[Told]:
        for each in failures:
            self.incidents.add(each)
        self.incidents.completed(completed)
        due = self.incidents.due(now)
        self.incidents.settle(due, due - self.retried)
        return self.incidents.told(now)


def over(told: Told) -> list[tuple[str, int]]:
    return [(each.deployment.labels[1], each.attempts) for each in told.over]


def test_a_failure_is_told_when_it_has_lasted_and_once() -> None:
    shift = Shift()
    assert shift.at(0, failure(1, 0)) == []
    assert shift.at(HOLD_SECONDS - 1) == []
    [told] = shift.at(HOLD_SECONDS)
    assert [each.run.id for each in told.failures] == [failure(1, 0).run.id]
    assert (told.attempts, told.causes) == (1, 1)
    for minute in range(2, 60):
        assert shift.at(60 * minute, failure(minute, 60 * minute - HOLD_SECONDS)) == [], "the same again"


def test_a_retry_that_begins_within_a_minute_is_not_told() -> None:
    shift = Shift()
    shift.retried = {failure(1, 0).run.id}
    assert shift.at(0, failure(1, 0)) == []
    assert shift.at(HOLD_SECONDS) == []
    assert shift.incidents.held == {}


def test_equal_failures_are_one_message() -> None:
    shift = Shift()
    texts = [f"bucket 'b{number}' does not answer after {number} s" for number in range(20)]
    [told] = shift.at(
        HOLD_SECONDS, *(failure(number, 0, name=f"d{number}", text=text) for number, text in enumerate(texts))
    )
    assert (len(told.failures), told.attempts, told.causes) == (20, 20, 1)


def test_deployments_that_join_later_are_one_more_message() -> None:
    shift = Shift()
    said = []
    for number in range(20):
        now = 15.0 * number
        said += shift.at(now, failure(number, now - HOLD_SECONDS, name=f"d{number}"))
    assert [len(each.failures) for each in said] == [1]
    [rest] = shift.at(AGAIN_SECONDS)
    assert len(rest.failures) == 19


def test_many_causes_are_one_message_too() -> None:
    shift = Shift()
    words = ["alpha", "beta", "gamma", "delta", "zeta", "eta", "theta", "iota"]
    told = shift.at(HOLD_SECONDS, *(failure(n, 0, name=f"d{n}", text=word) for n, word in enumerate(words)))
    assert [each.causes for each in told] == [1] * MOST + [len(words) - MOST]
    assert shift.at(HOLD_SECONDS + 15, failure(99, 0, name="d99", text="kappa")) == [], "not before ten minutes"
    [later] = shift.at(HOLD_SECONDS + AGAIN_SECONDS)
    assert later.failures[0].sentence == "kappa"


def test_a_deployment_with_a_new_cause_each_time_has_few() -> None:
    shift = Shift()
    said = []
    for number in range(200):
        now = 60.0 * number + HOLD_SECONDS
        said += shift.at(now, failure(number, now - HOLD_SECONDS, text="x" * (number + 1)))
    assert len(said) <= MOST + 1


def test_what_is_over_is_told_if_the_failure_was() -> None:
    shift = Shift()
    shift.at(HOLD_SECONDS, failure(1, 0), failure(2, 10))
    shift.at(HOLD_SECONDS + 10, failure(3, 50, name="other"))
    assert shift.at(80, completed=[run(0, 5, "Completed")]) == [], "it ended before the last failure"
    [told] = shift.at(90, completed=[run(4, 85, "Completed"), run(5, 85, "Completed", name="other")])
    assert over(told) == [("nightly", 2)], "the other is still held"
    assert shift.at(200, completed=[run(6, 195, "Completed")]) == [], "once"


# Each crash with `on_crash: retry 2`: when the exporter reads it, attempts that began, the state a minute later.
READ = [(0.0, 1, "Running"), (100.0, 2, "Running"), (200.0, 3, "Crashed")]


@pytest.mark.parametrize("seen", [READ, READ[1:], READ[2:], [(at, 0, then) for at, _, then in READ]])
def test_each_crash_of_a_run_that_was_retried_counts(seen: list[tuple[float, int, str]]) -> None:
    """Also those that a retry followed before the exporter could read them, and those of a run that never began."""
    shift = Shift()
    said = []
    for at, attempts, then in seen:
        shift.retried = {failure(1, 0).run.id} if then == "Running" else set()
        said += shift.at(at, failure(1, at, state="Crashed", attempts=attempts))
        said += shift.at(at + HOLD_SECONDS)
    [told] = said
    assert told.attempts == 3
    [told] = shift.at(400, completed=[run(2, 390, "Completed")])
    assert over(told) == [("nightly", 3)]


def test_a_run_that_is_completed_at_last_has_failed_before() -> None:
    shift = Shift()
    shift.at(HOLD_SECONDS, failure(1, 0, attempts=2))
    [told] = shift.at(300, completed=[run(1, 290, "Completed", attempts=4)])
    assert over(told) == [("nightly", 3)], "its third attempt failed between two readings"


def test_a_failure_of_the_last_minute_counts_too() -> None:
    shift = Shift()
    shift.at(HOLD_SECONDS, failure(1, 0))
    shift.at(80, failure(2, 80))
    [told] = shift.at(90, completed=[run(3, 85, "Completed")])
    assert over(told) == [("nightly", 2)]
    shift.at(1000 + HOLD_SECONDS, failure(4, 1000))
    [told] = shift.at(1200, failure(6, 1195), completed=[run(5, 1190, "Completed")])
    assert over(told) == [("nightly", 1)], "the later one is held, and none before"
    shift.at(2000)
    [told] = shift.at(2100, completed=[run(7, 2050, "Completed")])
    assert over(told) == [("nightly", 1)]


def test_the_count_goes_on_beyond_the_runs_that_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents, "_COUNTED", 2)
    shift = Shift()
    for number in range(5):
        shift.at(100.0 * number, failure(number, 100.0 * number))
    assert len(shift.incidents._attempts["nightly"].runs) == 2
    [told] = shift.at(900, completed=[run(9, 890, "Completed")])
    assert over(told) == [("nightly", 5)]
    assert not shift.incidents._attempts


def many(shift: Shift) -> list[Failure]:
    """More causes than are told in ten minutes: the last one waits."""
    words = ["alpha", "beta", "gamma", "delta", "zeta", "eta"]
    shift.at(HOLD_SECONDS, *(failure(n, 0, name=f"d{n}", text=word) for n, word in enumerate(words)))
    waiting = failure(99, 10, name="late", text="kappa")
    assert shift.at(HOLD_SECONDS + 15, waiting) == []
    return [waiting]


def test_a_failure_that_waits_behind_others_is_asked_for_again() -> None:
    """A retry that has begun meanwhile is not told as a failure; if it fails, that is told."""
    shift = Shift()
    [waiting] = many(shift)
    shift.retried = {waiting.run.id}
    assert shift.at(HOLD_SECONDS + AGAIN_SECONDS) == []
    shift.retried = set()
    again = failure(99, 700, name="late", text="kappa", attempts=2)
    [told] = shift.at(700 + HOLD_SECONDS, again)
    assert (told.failures, told.attempts) == ((again,), 2)


def test_of_two_runs_that_wait_the_one_that_was_not_retried_is_told() -> None:
    shift = Shift()
    [waiting] = many(shift)
    newer = failure(100, 20, name="late", text="kappa")
    shift.at(HOLD_SECONDS + 30, newer)
    shift.retried = {newer.run.id}
    [told] = shift.at(HOLD_SECONDS + AGAIN_SECONDS)
    assert told.failures == (waiting,)


def test_what_was_told_is_not_asked_for_again() -> None:
    shift = Shift()
    shift.at(HOLD_SECONDS, failure(1, 0))
    assert shift.incidents.due(1000) == set()


@pytest.mark.parametrize("causes", [1, 7])
def test_what_no_target_accepts_is_told_again_while_it_lasts(causes: int) -> None:
    shift = Shift()
    failures = [failure(n, 0, name=f"d{n}", text="x" * (n + 1)) for n in range(causes)]
    for each in shift.at(HOLD_SECONDS, *failures):
        shift.incidents.lost(each)
    told = [one.run.deployment for each in shift.at(90) for one in each.failures]
    assert told == [each.run.deployment for each in failures]
    assert shift.at(105) == [], "they are on their way again"


def test_what_no_target_has_heard_of_and_is_over_needs_no_message() -> None:
    shift = Shift()
    [told] = shift.at(HOLD_SECONDS, failure(1, 0))
    shift.incidents.lost(told)
    assert shift.at(90, completed=[run(2, 80, "Completed")]) == []


def test_an_end_that_no_target_accepts_is_told_later() -> None:
    shift = Shift()
    shift.at(HOLD_SECONDS, failure(1, 0), failure(2, 0, name="other"))
    [lost] = shift.at(90, completed=[run(3, 80, "Completed"), run(4, 80, "Completed", name="other")])
    # One of them fails again meanwhile.
    [failed_again] = shift.at(AGAIN_SECONDS + 100, failure(5, AGAIN_SECONDS, name="other"))
    assert failed_again.attempts == 1
    shift.incidents.lost(lost)
    [told] = shift.at(AGAIN_SECONDS + 200)
    assert over(told) == [("nightly", 1)]
    [told] = shift.at(AGAIN_SECONDS + 300, completed=[run(6, AGAIN_SECONDS + 250, "Completed", name="other")])
    assert over(told) == [("other", 2)]


def test_tier_3_is_silent() -> None:
    shift = Shift()
    assert shift.at(HOLD_SECONDS, failure(1, 0, tier="3")) == []


async def failed(ids: Iterable[str]) -> dict[str, str]:
    """All of them still are Failed."""
    return dict.fromkeys(ids, "Failed")


def text_of(*failures: Failure, **more: int) -> tuple[str, str]:
    found = message(Told(failures, causes=more.get("causes", 1), attempts=len(failures)), lambda id_: UI + id_, 7200)
    return found.title, found.body


def test_a_message_leads_with_the_reason_and_has_the_command() -> None:
    one = Failure(run(0x750895CA, 60), deployment(), "no rows", success=0.0)
    title, body = text_of(one)
    assert title == "Failed: sell/nightly: no rows"
    assert body.splitlines() == [
        "`no rows`",
        "",
        f"Do: Find the message in the runbook; correct the cause, then retry. `prefect flow-run retry {one.run.id}`",
        "",
        "ran 9.0 s, last success 2 h 0 min ago, tier 1, team media",
        "",
        f"- Run: {UI}{one.run.id}",
        "- Report: http://127.0.0.1:4200/v2/artifacts/key/nightly-run",
        "- Runbook: https://host/main/docs/runbooks/nightly.md",
        "- Runbook of failed runs: https://host/main/docs/runbooks/run-failed.md",
        "- On call: https://host/main/docs/on-call.md",
        "",
        "`tidepool status 750895ca`",
    ]


def test_a_message_about_many_names_ten() -> None:
    title, body = text_of(*(failure(n, 0, name=f"d{n}") for n in range(12)))
    assert title == "Failed: sell/d0 and 11 more: no rows"
    assert "- sell/d9\n- and 2 more" in body
    title, body = text_of(*(failure(n, 0, name=f"d{n}", text="x" * n) for n in range(3)), causes=3)
    assert title == "3 deployments fail, for 3 reasons"


@given(st.text())
def test_any_reason_makes_a_title_of_one_line_for_a_phone(text: str) -> None:
    found: list[str] = []

    async def scenario() -> None:
        seen = Notifications(failed, lambda _: None, print)
        await seen.observe([run(1, 0, text=text)], {"nightly": deployment()}, {"nightly": Fact()}, HOLD_SECONDS)
        found.extend(each.message.title for each in seen._outbox)

    asyncio.run(scenario())
    [title] = found
    assert len(title) <= 120
    assert len(title.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cannot read https://user:s3cret/x@host/x", "cannot read https://***@host/x"),
        ("x" * 280 + " https://user:s3cret@host/x", "x" * 280 + " https://***@host/x"),
        ("403 https://host/x?sig=s3cret&b=1", "403 https://host/x?sig=***&b=1"),
        ("login failed: password = 's3cret'", "login failed: password = ***"),
        ("ValueError: bad frame; item: token='s3cret'", "ValueError: bad frame"),
        ("ValueError: bad (load: url='x', key='s3cret'); 1 of 3 items failed", "ValueError: bad; 1 of 3 items failed"),
        ("worker lost (SIGKILL); item: number=1", "worker lost (SIGKILL)"),
    ],
)
def test_no_secrets_and_no_parameters_in_a_message(text: str, said: str) -> None:
    async def scenario() -> str:
        seen = Notifications(failed, lambda _: None, print)
        await seen.observe([run(1, 0, text=text)], {"nightly": deployment()}, {}, HOLD_SECONDS)
        return seen._outbox[0].message.body

    body = asyncio.run(scenario())
    assert body.splitlines()[0].replace("\u200b", "") == f"`{said}`"
    assert "s3cret" not in body
    assert "run-1" not in body, "a name may be made of parameters"


def test_a_later_success_within_the_minute_ends_a_failure() -> None:
    shift = Shift()
    assert shift.at(0, failure(1, 0)) == []
    assert shift.at(40, completed=[run(2, 30, "Completed")]) == []
    assert shift.at(HOLD_SECONDS) == []
    assert shift.at(100, failure(3, 40)) != [], "one that came after it is told"


def test_a_deployment_that_is_not_known_yet_is_looked_for_once() -> None:
    async def scenario() -> list[bool]:
        seen = Notifications(failed, lambda _: None, print)
        known = {"nightly": deployment()}
        asked = [await seen.observe([run(1, 0), run(2, 0, name="")], {}, {}, HOLD_SECONDS)]
        asked.append(await seen.observe([], known, {}, HOLD_SECONDS + 15))
        asked.append(len(seen._outbox) == 1)
        asked.append(await seen.observe([run(3, 0, name="gone")], known, {}, HOLD_SECONDS + 30))
        asked.append(await seen.observe([], known, {}, HOLD_SECONDS + 45))
        return asked

    assert asyncio.run(scenario()) == [True, False, True, True, False]


def test_what_was_noted_stays_when_the_server_does_not_answer() -> None:
    async def scenario() -> int:
        away = [True]

        async def states(ids: Iterable[str]) -> dict[str, str]:
            if away.pop():
                raise OSError("away")
            return dict.fromkeys(ids, "Failed")

        seen = Notifications(states, lambda _: None, print)
        known = {"nightly": deployment()}
        with pytest.raises(OSError, match="away"):
            await seen.observe([run(1, 0)], known, {}, HOLD_SECONDS)
        away.append(False)
        await seen.observe([], known, {}, HOLD_SECONDS + 15)
        return len(seen._outbox)

    assert asyncio.run(scenario()) == 1


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("<!channel> @here `x` [click](https://evil)", "`<!\u200bchannel> @\u200bhere 'x' [click](https://evil)`"),
        ("no image example.com/etl@sha256:0123", "`no image example.com/etl@sha256:0123`"),
    ],
)
def test_a_flows_own_markdown_and_mentions_are_none_of_the_messages(text: str, first: str) -> None:
    async def scenario() -> str:
        seen = Notifications(failed, lambda _: None, print)
        await seen.observe([run(1, 0, text=text)], {"nightly": deployment()}, {}, HOLD_SECONDS)
        return seen._outbox[0].message.body

    assert asyncio.run(scenario()).splitlines()[0] == first


def test_a_title_has_the_begin_of_an_images_digest_and_the_text_all_of_it() -> None:
    digest = f"{0:064x}"

    async def scenario() -> notifications.Message:
        seen = Notifications(failed, lambda _: None, print)
        text = f"image example.com/etl@sha256:{digest} cannot be pulled: not found"
        await seen.observe([run(1, 0, text=text)], {"nightly": deployment()}, {}, HOLD_SECONDS)
        return seen._outbox[0].message

    sent = asyncio.run(scenario())
    assert sent.title.endswith("image example.com/etl@sha256:000000000000… cannot be pulled: not found")
    assert digest in sent.body


def test_a_run_that_did_not_begin_has_no_duration() -> None:
    waited = replace(failure(1, 0), run=replace(run(1, 0), started=None, seconds=0.0))
    assert "did not begin, no success known" in text_of(waited)[1]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # by a plug-in of Apprise
def test_a_target_that_is_away_gets_the_message_later(receiver: Receiver, targets: Callable[..., None]) -> None:
    targets(receiver.target)
    ends: list[str] = []

    async def scenario() -> None:
        now = time.time()
        seen = Notifications(failed, lambda _: None, ends.append)
        await seen.observe([run(1, now - HOLD_SECONDS)], {"nightly": deployment()}, {}, now)
        receiver.answer = 500
        await seen.send()
        await seen.send()  # not due yet
        assert ends == []
        seen._outbox[0].due = 0.0
        later = [run(2, now, "Completed")]
        await seen.observe(later, {"nightly": deployment()}, {}, now + 15)
        receiver.answer = 200
        await seen.send()
        await seen.send()

    asyncio.run(scenario())
    titles = [each["title"].partition(":")[0] for each in receiver.got]
    assert titles == ["Failed", "Failed", "Completed again"], "in their order"
    assert ends == ["accepted", "accepted"]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # by a plug-in of Apprise
def test_a_message_that_is_given_up_is_counted(receiver: Receiver, targets: Callable[..., None]) -> None:
    targets(receiver.target)
    receiver.answer = 500
    ends: list[str] = []

    async def scenario() -> None:
        now = time.time() - 3600.0  # since when it waits
        seen = Notifications(failed, lambda _: None, ends.append)
        await seen.observe([run(1, now - HOLD_SECONDS)], {"nightly": deployment()}, {}, now)
        await seen.send()

    asyncio.run(scenario())
    assert ends == ["given up"]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # by a plug-in of Apprise
def test_a_storm_while_the_target_is_away_arrives_later_and_is_resolved(
    receiver: Receiver, targets: Callable[..., None]
) -> None:
    targets(receiver.target)
    ends: list[str] = []
    words = ["alpha", "beta", "gamma", "delta", "zeta", "eta", "theta", "iota"]
    known = {f"d{number}": deployment(f"d{number}") for number in range(len(words))}

    async def scenario() -> None:
        begun = time.time() - 7200.0
        seen = Notifications(failed, lambda _: None, ends.append)
        storm = [run(number, begun, name=f"d{number}", text=word) for number, word in enumerate(words)]
        await seen.observe(storm, known, {}, begun + HOLD_SECONDS)
        receiver.answer = 500
        await seen.send()  # all of it is two hours old
        assert ends == ["given up"] * (MOST + 1)
        receiver.got.clear()
        receiver.answer = 200
        await seen.observe([run(90, begun + 80, "Completed", name="d0")], known, {}, begun + 90)
        await seen.send()
        first = "\n".join(each["title"] + each["message"] for each in receiver.got)
        assert [word for word in words if word not in first] == ["alpha"], "that one is over"
        assert len(receiver.got) == MOST + 1
        receiver.got.clear()
        later = [run(100 + number, begun + 900, "Completed", name=each) for number, each in enumerate(known)]
        await seen.observe(later, known, {}, begun + 910)
        await seen.send()

    asyncio.run(scenario())
    [over] = receiver.got
    assert [each for each in known if f"sell/{each} (after 1 failed attempt)" not in over["message"]] == ["d0"]


def test_behind_too_many_messages_nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "_MOST_WAITING", 1)
    known = {name: deployment(name) for name in ("one", "two")}

    async def scenario() -> None:
        seen = Notifications(failed, lambda _: None, print)
        await seen.observe([run(1, 0, name="one", text="a")], known, {}, HOLD_SECONDS)
        later = [run(2, 0, name="two", text="b"), run(3, HOLD_SECONDS, "Completed", name="one")]
        await seen.observe(later, known, {}, HOLD_SECONDS + 15)
        assert [each.message.title for each in seen._outbox] == ["Failed: sell/one: a"]
        seen._outbox.clear()
        await seen.observe([], known, {}, HOLD_SECONDS + 30)
        titles = [each.message.title for each in seen._outbox]
        assert titles == ["Completed again: sell/one (after 1 failed attempt)", "Failed: sell/two: b"]

    asyncio.run(scenario())
