"""The report of a run as text: the sentence, the page, the timeline, the limits. Without a server."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.report.reason import Reason, plain, reason, sentence, with_command
from tidepool.report.run_page import LIMIT_BYTES, Past, Run, duration, headline, page
from tidepool.report.run_record import FAILED, LANES, SLOWEST, Item, RunRecord, Workers
from tidepool.report.run_report import runbooks
from tidepool.report.timeline import timeline


def record_of(count: int, *, failed: int = 0, error: str = "ValueError: bad") -> RunRecord:
    record = RunRecord()
    record.submit(count)
    for at in range(count):
        text = f"{error}; item: n={at}" if at < failed else ""
        record.end(Item(f"item-{at}", 100.0 + at, 1.0 + at % 7, f"worker-{at % 2}", 1 + (at == 5), text))
    return record


def run_of(record: RunRecord, **changes: object) -> Run:
    values: dict[str, object] = {
        "id": "0" * 36,
        "name": "2026-11-27 06:00 · frames",
        "deployment": "image-etl",
        "state": "Failed",
        "reason": Reason("ValueError: bad", "Correct the cause, then retry."),
        "begun": 100.0,
        "ended": 352.0,
        "record": record,
    }
    return Run(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("Flow run encountered an exception: ValueError: no", "ValueError: no"),
        ("Task run encountered an exception ValueError: no; item: x=7", "ValueError: no; item: x=7"),
        ("Flow run encountered an exception: InputError: line 3 is not a number", "line 3 is not a number"),
        (
            "driver out of memory (limit 1Gi); raise memory_limit",
            "driver out of memory (limit 1Gi); raise memory_limit",
        ),
        ("\n first\nsecond", "first"),
        (None, ""),
    ],
)
def test_prefects_words_before_an_error_are_left_out(message: str | None, text: str) -> None:
    assert plain(message) == text


def test_the_sentence_names_the_item_and_how_many_failed() -> None:
    message = "Flow run encountered an exception: ValueError: bad"
    text = sentence("FAILED", message, record_of(60, failed=2))
    assert text == "ValueError: bad (item-0: n=0); 2 of 60 items failed"
    # It is the message of the state, from which it is made again.
    assert sentence("FAILED", text, record_of(60, failed=2)) == text


@pytest.mark.parametrize("length", [200, 290, 400])
def test_a_long_sentence_is_the_same_when_it_is_read_from_the_state(length: int) -> None:
    record = record_of(60, failed=2, error=f"ValueError: {'bad ' * (length // 4)}".strip())
    text = sentence("FAILED", record.errors[0].error.partition("; item: ")[0], record)
    assert text.endswith("; 2 of 60 items failed")
    assert plain(text) == text == sentence("FAILED", text, RunRecord())


def test_a_completed_run_names_its_retries_and_lost_workers() -> None:
    record = record_of(60, failed=0)
    assert sentence("COMPLETED", None, record) == "completed: 60 items done, 1 retried"
    for lost, text in ((1, "1 worker lost"), (2, "2 workers lost")):
        record.workers.lost = lost
        assert sentence("COMPLETED", None, record) == f"completed: 60 items done, 1 retried, {text}"


def test_the_runbook_of_failed_runs_has_the_address_of_the_deployments_own() -> None:
    def path(base: str) -> str:
        return f"| [docs/runbooks/a.md]({base}/docs/runbooks/a.md) |"

    failed = "docs/runbooks/run-failed.md"
    assert runbooks(path("http://h:1/main"), "FAILED") == {
        "Runbook": "http://h:1/main/docs/runbooks/a.md",
        "Runbook of failed runs": f"http://h:1/main/{failed}",
        "On call": "http://h:1/main/docs/on-call.md",
    }
    assert runbooks(path(""), "FAILED") == {"Runbook": "docs/runbooks/a.md", "Runbook of failed runs": failed}
    assert runbooks(path(""), "COMPLETED") == {"Runbook": "docs/runbooks/a.md"}
    assert runbooks("[docs/runbooks/a.md](https://wiki/a)", "COMPLETED") == {"Runbook": "https://wiki/a"}
    assert runbooks(None, "CRASHED") == {"Runbook of failed runs": failed}


def test_an_error_of_the_flow_itself_names_no_item() -> None:
    assert sentence("FAILED", "KeyError: 'x'", record_of(10, failed=1)) == "KeyError: 'x'; 1 of 10 items failed"


@pytest.mark.parametrize(
    ("kind", "message", "text"),
    [
        ("COMPLETED", None, "completed"),
        ("CANCELLED", "by hand", "cancelled: by hand"),
        ("CANCELLED", "cancelled", "cancelled"),
        ("CRASHED", "", "Crashed without a reason"),
    ],
)
def test_every_end_has_a_sentence(kind: str, message: str | None, text: str) -> None:
    assert sentence(kind, message, RunRecord()) == text


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("driver out of memory (limit 1Gi); raise memory_limit", "`memory_limit`"),
        ("task `item`: worker out of memory (limit 2Gi)", "Dask workers"),
        ("did not start within 60 s: image x/y@sha256:00 cannot be pulled: not found", "`tidepool rollback`"),
        ("did not start within 60 s: quota runs: pods 2 of 2", "`kubectl describe resourcequota`"),
        ("did not start within 60 s: no node has 7 CPU free (asked: 7; largest node: 2)", "`cpu_request`"),
        ("did not start within 60 s: its pod is pending", "`tidepool status`"),
        ("the store http://s3:1 does not answer: no connection for s3://b/k", "`tidepool doctor`"),
        ('EndpointConnectionError: Could not connect to the endpoint URL: "http://s/"', "Its store or a service"),
    ],
)
def test_the_advice_is_that_of_the_cause(message: str, advice: str) -> None:
    assert advice in reason("CRASHED", message, RunRecord()).advice


def test_what_to_do_depends_on_the_cause() -> None:
    assert reason("COMPLETED", None, RunRecord()).advice == ""
    assert "retry" in reason("FAILED", "something new", RunRecord()).advice
    lost = RunRecord(done=3, workers=Workers(lost=1))
    assert reason("COMPLETED", None, lost).advice == "Nothing: what the lost workers had was done again."
    assert reason("COMPLETED", None, replace(lost, failed=1)).advice == ""
    assert "doctor" not in reason("FAILED", "ValueError: the store of records is empty", RunRecord()).advice


def test_what_to_do_has_its_command() -> None:
    assert with_command("Its process is lost: retry.", "r1", "d1").endswith(": retry. `prefect flow-run retry r1`")
    stale = reason("FAILED", "InputError: shop: stale data: the last week ended on 2026-01-25", RunRecord()).advice
    assert with_command(stale, "r1", "d1").endswith(
        " a new run (this one keeps its date). `prefect deployment run --id d1`"
    )
    assert with_command(stale, "r1", None) == stale
    assert with_command("Look at the warnings below.", "r1", "d1") == "Look at the warnings below."


def test_the_page_begins_with_the_reason_then_says_what_to_do() -> None:
    text = page(run_of(record_of(60, failed=2), links={"Runbook": "https://host/docs/runbooks/image-etl.md"}))
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "# Failed: ValueError: bad"
    assert lines[1].startswith("**What to do:** Correct the cause, then retry. `prefect flow-run retry 000")
    assert lines[2] == "[Runbook](https://host/docs/runbooks/image-etl.md)"
    assert "| duration | 4 min 12 s | - |" in text
    assert "58 done, 2 failed, 0 not ended, 1 retried." in text
    assert "| item-0 | 1 | ValueError: bad; item: n=0 |" in text


def test_figures_stand_beside_the_median_of_earlier_runs() -> None:
    past = [Past(str(at), 60.0 * at, 10 * at, at) for at in (1, 2, 9)]
    text = page(run_of(record_of(12), past=past))
    assert "| | this run | median of the last 3 Completed |" in text
    assert "| duration | 4 min 12 s | 2 min 0 s |" in text
    assert "| items | 12 | 20 |" in text
    assert "| retries of items | 1 | 2 |" in text


def test_a_price_is_shown_only_if_one_is_set() -> None:
    record = record_of(1)
    record.see_workers(2, memory=2**29, limit=2**30)
    record.use(core_seconds=7200, gib_seconds=3600)
    assert "price" not in page(run_of(record))
    assert "| price of the workers | 0.3000 |" in page(run_of(record, prices=(0.1, 0.1)))
    assert "| largest memory of a worker | 0.50 of 1.00 GiB |" in page(run_of(record))


def test_a_run_of_any_size_has_a_bounded_report() -> None:
    record = record_of(20_000, failed=500, error="x" * 5000)
    for at in range(500):
        record.event(f"worker {at} lost")
        record.warn(f"warning {at}")
    assert (len(record.errors), len(record.slowest)) == (FAILED, SLOWEST)
    assert len(record.lanes) <= LANES
    assert record.items == 20_000
    text = page(run_of(record))
    assert len(text.encode()) <= LIMIT_BYTES
    assert "## Timeline" in text


@given(st.text(max_size=2000), st.text(max_size=200))
def test_no_text_of_a_run_breaks_the_page(error: str, name: str) -> None:
    record = RunRecord()
    record.submit(1)
    record.end(Item(name, 1.0, 1.0, name, 1, error or "x"))
    run = run_of(record, name=name, reason=Reason(error, ""))
    text = page(run)
    assert len(text.encode()) <= LIMIT_BYTES
    assert "\n" not in headline(run)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "item" not in line]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows), rows


def test_the_timeline_is_one_small_picture() -> None:
    record = record_of(3000, failed=1)
    text = timeline(record.lanes, 100.0, 3200.0)
    found = re.fullmatch(r"!\[.*\]\(data:image/svg\+xml;base64,(.*)\)", text)
    assert found
    svg = base64.b64decode(found[1]).decode()
    assert svg.count("<rect") <= LANES
    assert svg.count("#d64545") == 1
    assert timeline([], 0.0, 1.0) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 0 s"), (252, "4 min 12 s"), (7500, "2 h 5 min")],
)
def test_durations_are_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
