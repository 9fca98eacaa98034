"""The view of a run in the Prefect UI: tables, pages with charts, the outputs, progress, names, warnings.

Keys are global in Prefect, so every key starts with the flow's name (`weekly-forecast-report`); the page of a key is
its history.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, cast

from tidepool import storage
from tidepool.report import run_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from prefect.tasks import TaskRunNameCallbackWithParameters

# Prefect has no limit, and its Artifacts page loads every body: 100 KiB keep that page fast.
LIMIT_BYTES = 100 * 1024
# Tables cannot be sorted in the UI and show ten rows per page: longer ones belong in a file.
TABLE_ROWS = 200
# Legible on the UI's light and dark background.
_GREY = "#808080"
# Enough to compare two files by eye: `sha256:` and twelve digits.
_HASH = 19
_KIB = 1024
# Longer names of runs are cut off in the UI's lists, and those of task runs in its graph.
_VALUE, _TASK_NAME = 40, 60


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """Publish a table of at most `TABLE_ROWS` rows; the description reports how many were left out."""
    from prefect.artifacts import create_table_artifact

    if len(rows) > TABLE_ROWS:
        description = f"{description} (the first {TABLE_ROWS} of {len(rows)} rows)"
    create_table_artifact(table=[dict(row) for row in rows[:TABLE_ROWS]], key=key, description=description)


def page(key: str, text: str, description: str) -> None:
    """Publish a page of Markdown.

    Args:
        key: The artifact's key.
        text: GitHub-flavoured Markdown; charts as made by `picture`.
        description: The result in one line, for the list of artifacts.

    Raises:
        ValueError: the page is larger than `LIMIT_BYTES`.
    """
    from prefect.artifacts import create_markdown_artifact

    length = len(text.encode())
    if length > LIMIT_BYTES:
        raise ValueError(f"artifact {key!r} has {length} bytes, more than {LIMIT_BYTES}; write the rest to a file")
    create_markdown_artifact(markdown=text, key=key, description=description)


def outputs(flow: str, targets: Iterable[str]) -> list[str]:
    """Publish the files that a run wrote, with size and content hash, as the artifact `<flow>-outputs`.

    Returns:
        The URLs of the targets.
    """
    urls = [storage.url(target) for target in targets]
    # The UI cuts off what is beyond the third column: the name and the figure first, the long address last.
    rows = [
        {
            "file": url.rpartition("/")[2],
            "size": size(storage.size(url) or 0),
            "content": storage.content_hash(url)[:_HASH],
            "url": url,
        }
        for url in urls
    ]
    table(f"{flow}-outputs", rows, f"{len(rows)} file{'s' if len(rows) != 1 else ''} written")
    return urls


def size(count: int) -> str:
    """Return a number of bytes as text with its unit: `12 B`, `3.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < _KIB:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _KIB
    return f"{value:.1f} GiB"


def warn(text: str) -> None:
    """Warn about the run: in its log, its report, the message of its state.

    Call it in the flow or in a task that runs in the flow's process, not in a mapped one.
    """
    from tidepool.compute.run_log import run_log

    run_record.current().warn(text)
    run_log().warning(text)


def run_name(template: str) -> Callable[[], str]:
    """Return the `flow_run_name` of a flow whose runs are told apart by their time: `2026-11-27 17:40 · 3 of x`.

    Args:
        template: As Prefect's, with the flow's parameters in braces; a long value is shortened to its end.
    """

    def name() -> str:
        from prefect.runtime import flow_run

        due = flow_run.scheduled_start_time
        return f"{due:%Y-%m-%d %H:%M} · {template.format(**_short(flow_run.parameters))}"

    return name


def task_name(template: str) -> TaskRunNameCallbackWithParameters:
    """Return the `task_run_name` of a task, at most 60 characters long.

    Args:
        template: As Prefect's, with the task's parameters in braces; a long value is shortened to its end.
    """

    def name(parameters: dict[str, Any]) -> str:
        text = template.format(**_short(parameters))
        return text if len(text) <= _TASK_NAME else f"{text[: _TASK_NAME - 1]}…"

    # Prefect looks at the names of its parameters; its protocol has a method that only a class would have.
    return cast("TaskRunNameCallbackWithParameters", name)


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with long texts shortened to their end, where a path has its file name."""
    return {
        name: f"…{value[1 - _VALUE :]}" if isinstance(value, str) and len(value) > _VALUE else value
        for name, value in values.items()
    }


def axes(width: float = 8, height: float = 3) -> tuple[Figure, Axes]:
    """Create a figure with one set of axes (inches), legible on the UI's light and dark background."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.tick_params(colors=_GREY, which="both")
    for part in (axis.xaxis.label, axis.yaxis.label, axis.title):
        part.set_color(_GREY)
    for name, spine in axis.spines.items():
        spine.set_color(_GREY)
        spine.set_visible(name in {"left", "bottom"})
    axis.grid(color=_GREY, alpha=0.2, linewidth=0.5)
    return figure, axis


def picture(figure: Figure, title: str) -> str:
    """Embed a figure in Markdown as a data URI, which the UI displays: no second file, no further request.

    Args:
        figure: A matplotlib figure, best made by `axes`.
        title: A description, for screen readers.
    """
    from PIL import Image

    for axis in figure.axes:
        if (legend := axis.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
            for text in legend.get_texts():
                text.set_color(_GREY)
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, transparent=True)
    # 64 colours suffice for a chart, in a third of the bytes: an every-minute flow stores 1,440 of them a day.
    Image.open(drawn).quantize(64, method=Image.Quantize.FASTOCTREE).save(buffer, format="png", optimize=True)
    return f"![{title}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def show_progress(call: Callable[..., Any], **arguments: Any) -> Any:
    """Create or update a progress artifact; a server that is away or too busy is logged and does not fail the run.

    Args:
        call: `create_progress_artifact` or `update_progress_artifact`.
        arguments: Its arguments.

    Returns:
        The result of `call`; None if the server refused or did not answer.
    """
    import httpx

    from tidepool.compute.run_log import run_log

    try:
        return call(**arguments, _sync=True)
    except httpx.HTTPError as error:
        run_log().warning("the progress of the run is not shown: %r", error)
        return None


class Progress:
    """A progress bar of the run, updated in place; use it for work over ten seconds.

    Args:
        key: The artifact's key.
        total: The number of items.
        description: The name of the items.
    """

    def __init__(self, key: str, total: int, description: str) -> None:
        from prefect.artifacts import create_progress_artifact

        self._total = max(total, 1)
        self._shown = 0
        self._description = description
        self._id = show_progress(create_progress_artifact, progress=0.0, key=key, description=description)

    def update(self, done: int) -> None:
        """Report that `done` items are done; at most one request per percent, to spare the server."""
        from prefect.artifacts import update_progress_artifact

        percent = int(100 * done / self._total)
        if percent > self._shown and self._id:
            self._shown = percent
            show_progress(
                update_progress_artifact,
                artifact_id=self._id,
                progress=float(percent),
                description=f"{self._description}: {done} of {self._total}",
            )
