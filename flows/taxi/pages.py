"""The pages and messages that show the taxi flows' results, from their summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidepool import report

if TYPE_CHECKING:
    from collections.abc import Mapping


def tips_headline(summary: Mapping[str, Any]) -> str:
    """Summarise the result in one line."""
    highest = max(summary["tips"], key=lambda row: float(row["tip"]))
    count = _count(highest["passengers"], "passenger")
    return f"Highest mean tip: {highest['tip']:.2f} USD with {count} ({summary['rides']:,} rides)"


def tips(summary: Mapping[str, Any], url: str) -> str:
    """Render the page with the chart of mean tips; `url` is the written file."""
    rows = summary["tips"]
    figure, axis = report.axes()
    axis.bar([str(row["passengers"]) for row in rows], [row["tip"] for row in rows])
    axis.set_xlabel("passengers")
    axis.set_ylabel("mean tip, USD")
    table = [
        "| passengers | mean tip, USD | rides |",
        "|---:|---:|---:|",
        *(f"| {row['passengers']} | {row['tip']:.2f} | {row['rides']:,} |" for row in rows),
    ]
    return "\n\n".join(
        [
            f"# {tips_headline(summary)}",
            report.picture(figure, "Mean tip by passenger count"),
            "\n".join(table),
            f"Left out: {_count(summary['left_out'], 'ride')} without a passenger count above 0.",
            f"Read from `{summary['source']}`, written to `{url}`.",
        ]
    )


def riders_headline(summary: Mapping[str, Any]) -> str:
    """Summarise the result in one line."""
    if not summary["top"]:
        return f"No ride with a tip in {_count(summary['rides'], 'ride')}"
    first = summary["top"][0]
    return (
        f"Most generous rider: {first['ratio']:.1%} of {first['total']:.2f} USD was a tip "
        f"({_count(summary['rides'], 'ride')}, {_count(summary['hours'], 'hour')})"
    )


def top_riders_list(summary: Mapping[str, Any]) -> str:
    """List the top riders, one line each, for a message."""
    return "\n".join(
        f"{rank}. {ride['ratio']:.1%}: {ride['tip']:.2f} of {ride['total']:.2f} USD, {_time(ride)}"
        for rank, ride in enumerate(summary["top"], start=1)
    )


def riders(summary: Mapping[str, Any], url: str) -> str:
    """Render the page with the top riders; `url` is the written file."""
    table = [
        "| rank | tip / total | tip, USD | total, USD | passengers | pickup |",
        "|---:|---:|---:|---:|---:|---|",
        *(
            f"| {rank} | {ride['ratio']:.1%} | {ride['tip']:.2f} | {ride['total']:.2f} "
            f"| {'?' if ride['passengers'] is None else ride['passengers']} | {_time(ride)} |"
            for rank, ride in enumerate(summary["top"], start=1)
        ),
    ]
    hours = f"{_count(summary['hours'], 'hour')}, {summary['hours_without_tip']:,} of them without a tip"
    return "\n\n".join(
        [
            f"# {riders_headline(summary)}",
            "\n".join(table),
            f"The best ride of each pickup hour competes: {hours}.",
            f"Left out: {_count(summary['without_pickup'], 'ride')} without a pickup time.",
            f"Read from `{summary['source']}`, written to `{url}`.",
        ]
    )


def _time(ride: Mapping[str, Any]) -> str:
    return str(ride["pickup"]).replace("T", " ")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
