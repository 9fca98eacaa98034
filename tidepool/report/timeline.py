"""The timeline of a run's items as SVG, for a page of Markdown: the UI removes inline SVG and shows a data URI."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.report.run_record import Item

_WIDTH, _LEFT, _ROW, _LANES = 900, 4, 10, 40
# Legible on the UI's light and dark background.
_GREY, _GOOD, _BAD = "#808080", "#2e9e6b", "#d64545"


def timeline(items: Sequence[Item], begun: float, ended: float) -> str:
    """Return an image of the items in lanes, one for each worker, as Markdown; empty without items.

    Args:
        items: Items with their start and duration.
        begun: Left edge, in seconds since the epoch.
        ended: Right edge.
    """
    drawn = [each for each in items if each.begun]
    if not drawn:
        return ""
    begun = min(begun, *(each.begun for each in drawn)) if len(drawn) > 1 else min(begun, drawn[0].begun)
    span = max(ended - begun, 1e-3)
    workers = sorted({each.worker for each in drawn})[:_LANES]
    lanes: dict[str, list[tuple[float, int]]] = {}
    height = 0
    # Threads of one worker overlap: each takes the first free row of its worker.
    rows: list[tuple[Item, int, str]] = []
    for worker in workers:
        free: list[float] = []
        for each in sorted((one for one in drawn if one.worker == worker), key=lambda one: one.begun):
            row = next((at for at, until in enumerate(free) if until <= each.begun), len(free))
            if row == len(free):
                free.append(0.0)
            free[row] = each.begun + each.seconds
            if height + row < _LANES:
                rows.append((each, height + row, worker))
        height += len(free)
    del lanes
    height = min(height, _LANES)
    parts = []
    for each, row, _ in rows:
        left = _LEFT + (each.begun - begun) / span * (_WIDTH - 2 * _LEFT)
        width = max(each.seconds / span * (_WIDTH - 2 * _LEFT), 1)
        color = _BAD if each.error else _GOOD
        parts.append(f'<rect x="{left:.0f}" y="{row * _ROW + 1}" width="{width:.0f}" height="8" fill="{color}"/>')
    label = f'font-size="11" fill="{_GREY}" font-family="sans-serif"'
    bottom = height * _ROW + 14
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{bottom + 4}">{"".join(parts)}'
        f'<text x="{_LEFT}" y="{bottom}" {label}>0 s</text>'
        f'<text x="{_WIDTH - _LEFT}" y="{bottom}" text-anchor="end" {label}>{span:.1f} s</text></svg>'
    )
    title = f"{len(rows)} items in {height} lanes over {span:.1f} s"
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
