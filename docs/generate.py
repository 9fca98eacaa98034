# ruff: noqa: INP001 - a script, not a package
"""Generate the reference pages: `docs/settings.md` from the settings, `docs/commands.md` from the command line.

Usage: `python -m docs.generate` (`make reference`). A test fails if the result differs from the committed files.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tidepool.settings import SIZES, Settings, meanings, variables

if TYPE_CHECKING:
    from pydantic import BaseModel

HERE = Path(__file__).parent
_SETTINGS = """# Settings

Each setting is an environment variable. `tidepool settings` prints the effective values and where each comes from,
`tidepool settings --explain` also what they mean. A variable `TIDEPOOL_*` that is not listed here is refused. On
Kubernetes the chart sets them from its [values](../helm/tidepool/README.md), and [prefect.yaml](../prefect.yaml) from
job variables.
"""
_COMMANDS = """# Commands

As `tidepool COMMAND --help` prints them. Exit codes are the same everywhere: 0 it is done or there is nothing to do; 1
an error of any kind, or what was looked at is not well; 2 there are changes and `--detailed-exitcode` asked for that.
"""


def settings_page() -> str:
    """Return the page of all settings, a table for each group."""
    texts = meanings()
    parts = [_SETTINGS]
    for group, info in Settings.model_fields.items():
        model = cast("type[BaseModel]", info.annotation)
        defaults = cast("BaseModel", info.default)
        title = f"Size {group}" if group in SIZES else str(model.__doc__).partition(".")[0]
        parts += [f"## {title}", "", "| variable | default | meaning |", "|---|---|---|"]
        for name, (of, field) in variables().items():
            if of == group:
                value = str(getattr(defaults, field))
                shown = f"`{value}`" if value not in {"", "None"} else "-"
                parts.append(f"| `{name}` | {shown} | {texts[name].replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts)


def commands_page() -> str:
    """Return the page of all commands."""
    typer = Path(sys.executable).with_name("typer")
    command = (str(typer), "tidepool.cli", "utils", "docs", "--name", "tidepool")
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = html.unescape(text).partition("**Commands**:")[2]
    # Typer shortens the lines of its list of commands; each command's own part says the whole.
    body = re.sub(r"^\* `([a-z][\w-]*)`: .*$", r"* [`tidepool \1`](#tidepool-\1)", body, flags=re.MULTILINE)
    return f"{_COMMANDS}\n{body.strip()}\n"


def pages() -> dict[Path, str]:
    """Return the text of each page."""
    return {HERE / "settings.md": settings_page(), HERE / "commands.md": commands_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
