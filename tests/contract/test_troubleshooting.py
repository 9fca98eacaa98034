"""docs/troubleshooting.md: each message that it quotes is in the source, in these words."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
PAGE = TOP / "docs" / "troubleshooting.md"
_GAP = "…"
# What a message gets when it is written: of logging, of printf in a template, of make.
_FILLED = re.compile(r"%(?:[-0-9.]*[sdrgf]|\([a-z]+\)s)|\$\([^)]*\)|\$\$?\([^)]*\)+")
_CODE = re.compile(r"(`+)(.+?)\1(?!`)")


def quoted() -> list[str]:
    """The messages of the page's first columns."""
    rows = re.findall(r"^\| (?!message|---)(.+?) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [message.strip() for row in rows for _, message in _CODE.findall(row)]


def literals(source: str) -> Iterator[str]:
    """Texts of a module, with … for what is filled in; a constant of the module that is filled in is its text."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = []
            for part in node.values:
                if isinstance(part, ast.Constant):
                    parts.append(str(part.value))
                else:
                    name = (
                        part.value.id
                        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name)
                        else ""
                    )
                    parts.append(constants.get(name, _GAP))
            yield "".join(parts)


@cache
def texts() -> str:
    """All texts that tidepool, its chart and its Makefile write."""
    python = [text for path in (TOP / "tidepool").rglob("*.py") for text in literals(path.read_text(encoding="utf-8"))]
    others = [path.read_text(encoding="utf-8") for path in (TOP / "helm/tidepool/templates").glob("*.tpl")]
    others += [path.read_text(encoding="utf-8") for path in (TOP / "Makefile", *(TOP / "make").glob("*.mk"))]
    return "\0".join(_FILLED.sub(_GAP, text) for text in [*python, *others])


def missing(message: str) -> list[str]:
    """Parts of a message that are in no text."""
    parts = [part.strip() for part in message.split(_GAP)]
    return [part for part in parts if part and part not in texts()]


@pytest.mark.parametrize("message", quoted())
def test_the_message_is_in_the_source(message: str) -> None:
    assert max(len(part) for part in message.split(_GAP)) > 4, "too little to search for"
    assert missing(message) == []


def test_the_page_has_the_messages_of_each_part() -> None:
    assert len(quoted()) > 80
    assert missing("these resources are not managed by anything; nothing was written: …") != []
    assert missing("a TIDEPOOL_* variable is not valid JSON: …") == [], "a constant that is filled in"
    assert missing("server.replicas is …: more than one needs") == [], "a template of the chart"
