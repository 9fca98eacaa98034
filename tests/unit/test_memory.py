"""The memory of a container, as the kernel writes it into the container's cgroup."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tidepool.operate import memory
from tidepool.operate.flow_run import cause, exit_code
from tidepool.operate.memory import Memory
from tidepool.upstream.prefect_runner import Ending

if TYPE_CHECKING:
    from pathlib import Path

V2 = "low 0\nhigh 0\nmax 812\noom 2\noom_kill {kills}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("limit", "shown"), [("1073741824", "1Gi"), ("536870912", "512Mi"), ("1000000000", "1000000000"), ("max", "")]
)
def test_version_2(tmp_path: Path, limit: str, shown: str) -> None:
    write(tmp_path, memory_dot_events=V2.format(kills=1), memory_dot_max=f"{limit}\n")
    assert memory.read(tmp_path) == Memory(1, shown)


@pytest.mark.parametrize(("limit", "shown"), [("1610612736", "1536Mi"), ("9223372036854771712", "")])
def test_version_1(tmp_path: Path, limit: str, shown: str) -> None:
    write(tmp_path, memory__memory_dot_oom_control=V1.format(kills=0), memory__memory_dot_limit_in_bytes=f"{limit}\n")
    assert memory.read(tmp_path) == Memory(0, shown)


def test_a_cgroup_that_does_not_tell_is_no_statement(tmp_path: Path) -> None:
    assert memory.read(tmp_path) is None
    write(tmp_path, memory_dot_events="low 0\n", memory_dot_max="max\n")
    assert memory.read(tmp_path) is None


@pytest.mark.parametrize(
    ("ending", "known", "words"),
    [
        (Ending(-9), Memory(1, "1Gi"), "driver out of memory (limit 1Gi); raise memory_limit"),
        (Ending(-9), Memory(1, ""), "driver out of memory (no limit: the node's); raise memory_limit"),
        (Ending(-9), Memory(0, "1Gi"), "driver's process killed by SIGKILL, not for its memory limit"),
        (Ending(-11), Memory(1, "1Gi"), "driver's process killed by SIGSEGV"),
        (Ending(-40), Memory(1, "1Gi"), "driver's process killed by signal 40"),
        (Ending(-9), None, ""),
        (Ending(3), Memory(1, "1Gi"), ""),
        (Ending(None), Memory(1, "1Gi"), ""),
        (Ending(-9, "COMPLETED"), Memory(1, "1Gi"), ""),
    ],
)
def test_the_cause_of_an_end_in_words(ending: Ending, known: Memory | None, words: str) -> None:
    assert cause(ending, known) == words


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (Ending(0), 0),
        (Ending(0, "COMPLETED"), 0),
        (Ending(0, "CANCELLED"), 0),
        (Ending(0, "SCHEDULED"), 0),
        (Ending(-9, "COMPLETED"), 0),
        (Ending(0, "FAILED"), 1),
        (Ending(0, "CRASHED"), 1),
        (Ending(None), 1),
        (Ending(3), 3),
        (Ending(-9), 137),
        (Ending(-15), 143),
    ],
)
def test_the_exit_code_of_an_end(ending: Ending, code: int) -> None:
    assert exit_code(ending) == code
