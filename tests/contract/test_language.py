"""The language rules of docs/glossary.md: phrases that the field does not use, and how a docstring begins."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]

ROOMS = (
    "tidepool/",
    "flows/",
    "tests/",
    "benchmarks/",
    "docs/",
    "helm/",
    "k8s/",
    "make/",
    "environments/",
    ".github/",
    ".ci/",
    "requirements/",
)
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile", "pyproject.toml")
# This file names the phrases; the other two kinds are copies of other people's text.
LEFT_OUT = ("tests/contract/test_language.py", "k8s/crds/", "helm/tidepool/crds/", "tests/helm/schemas/")

BANNED = {
    "is no": "say 'is not a …' or use the field's word (unknown, invalid, unmanaged)",
    "anew": "say 'again', or name the verb (recreate, measure again)",
    "for ever": "say 'indefinitely' or 'forever'",
    "in the place of": "say 'instead of'",
    "somebody": "name the role: a user, on-call, another writer",
    "nobody": "name what is missing: no reason recorded, no reader",
    "there twice": "say 'duplicate'",
    "says so": "say 'reports it', or what is reported",
    "nicer": "say 'at niceness +N'",
}
# A phrase may be broken by the end of a line, of a comment, or of a string that the next line continues.
_GAP = r"""(?:[ \t]+|[ \t]*"?[ \t]*\n[ \t#*]*(?:f?"[ \t]*)?)"""
_PHRASES = re.compile(r"\b(" + "|".join(phrase.replace(" ", _GAP) for phrase in BANNED) + r")\b", re.IGNORECASE)
# The correct uses of a banned phrase.
_CORRECT = re.compile(r"there\s+is no\b|\bis no\s+longer", re.IGNORECASE)
_QUESTION = re.compile(r"(What|Where|How|Whether|Why|Who|Whose|When|Which)\b")


def phrases(text: str) -> list[tuple[int, str]]:
    """Line and message of each banned phrase in a text."""
    found = []
    for hit in _PHRASES.finditer(text):
        if _CORRECT.search(text[max(0, hit.start() - 6) : hit.end() + 7]):
            continue
        phrase = " ".join(re.findall(r"[a-z]{2,}", hit.group().lower()))
        found.append((text.count("\n", 0, hit.start()) + 1, f"'{phrase}': {BANNED[phrase]}"))
    return found


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and message of each docstring that begins with a question word."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        begin = _QUESTION.match(docstring or "")
        if begin is not None:
            advice = "a noun phrase for a class or module, an imperative verb for a function"
            found.append((node.body[0].lineno, f"docstring begins with '{begin.group()}': use {advice}"))
    return found


def checked() -> list[str]:
    """Names of the files whose language is checked, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(
        name
        for name in listed
        if (name.startswith(ROOMS) or name in TOP_LEVEL or ("/" not in name and name.endswith(".yaml")))
        and not name.startswith(LEFT_OUT)
        and (TOP / name).is_file()
    )


def test_the_repository_uses_the_fields_language() -> None:
    found = []
    for name in checked():
        try:
            text = (TOP / name).read_text()
        except UnicodeDecodeError:
            continue
        hits = phrases(text)
        if name.startswith(("tidepool/", "flows/")) and name.endswith(".py"):
            hits += docstrings(text)
        found += [f"{name}:{line}: {message}" for line, message in sorted(hits)]
    if found:
        pytest.fail("\n".join([f"{len(found)} places; docs/glossary.md has the words:", *found]), pytrace=False)


@pytest.mark.parametrize("phrase", BANNED)
def test_a_banned_phrase_is_found_with_its_line(phrase: str) -> None:
    in_comment, in_string = phrase.replace(" ", "\n# ", 1), phrase.replace(" ", ' "\n    f"', 1)
    assert [line for line, _ in phrases(f"first\nIt {phrase} here.\n# It {in_comment} here.\n")] == [2, 3]
    assert phrases(f'f"It {in_string} here"')[0][1] == f"'{phrase}': {BANNED[phrase]}"


def test_words_that_only_contain_a_phrase_are_allowed() -> None:
    assert phrases("a renewed lease is not lost; this node is noted, forever") == []
    assert phrases("there is no such pool; it is no longer used") == []


def test_a_docstring_that_begins_with_a_question_word_is_found() -> None:
    source = '"""Parts."""\nclass Part:\n    """What it is."""\n    def f(self):\n        """Whether it is."""\n'
    assert [line for line, _ in docstrings(source)] == [3, 5]
    assert docstrings('def f():\n    """Return whether it is; whatever."""\n') == []
