"""The commands of a runbook: its fenced blocks, each with the words that say what it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
DIAGNOSIS, MITIGATION, FIXED = "Diagnosis", "Mitigation", "How to know it is fixed"
_FENCE = re.compile(r"\s*```(\w*)$")
BLANK = re.compile(r"<([a-z -]+)>")


@dataclass(frozen=True)
class Block:
    """A block of commands.

    Attributes:
        section: Heading of its section.
        words: The words before it: the item of a list that it belongs to, or the paragraphs.
        commands: Its commands, without comments.
    """

    section: str
    words: str
    commands: tuple[str, ...]


def path(name: str) -> str:
    """Return the path of a runbook in the repository."""
    return f"docs/runbooks/{name}.md"


def blocks(name: str) -> list[Block]:
    """Return the blocks of commands of a runbook."""
    found: list[Block] = []
    section, words = "", list[str]()
    commands: list[str] | None = None
    shell = False
    for line in (TOP / path(name)).read_text().splitlines():
        if fence := _FENCE.match(line):
            if commands is None:
                commands, shell = [], fence[1] in {"bash", "console"}
            else:
                if shell:
                    found.append(Block(section, " ".join(words), tuple(commands)))
                commands, words = None, []
        elif commands is not None:
            if (command := line.strip()) and not command.startswith("#"):
                continued = bool(commands) and commands[-1].endswith("\\")
                commands[-1:] = [f"{commands[-1][:-1]}{command}"] if continued else [*commands[-1:], command]
        elif line.startswith("## "):
            section, words = line[3:], []
        else:
            words = [line.strip()] if line.startswith("- ") else [*words, line.strip()]
    return found


def chosen(name: str, section: str, *causes: str) -> list[Block]:
    """Return the blocks of a section; with `causes`, one for each: that whose words contain it.

    Raises:
        AssertionError: not exactly one does.
    """
    mine = [each for each in blocks(name) if each.section == section]
    for cause in causes:
        hits = [each.words for each in mine if cause in each.words]
        assert len(hits) == 1, f"{path(name)}: {len(hits)} blocks of commands in {section} are about {cause!r}"
    return [each for cause in causes for each in mine if cause in each.words] if causes else mine


def filled(command: str, values: dict[str, str]) -> str:
    """Return a command with the values of its `<blanks>`; a blank without a value stays."""
    return BLANK.sub(lambda blank: values.get(blank[1], blank[0]), command)
