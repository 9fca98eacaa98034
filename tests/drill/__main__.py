"""`make drill`: break a local stack, see what on-call sees, and repair it by the runbook; without a name, the list."""

from __future__ import annotations

import shutil
import sys
import time

from rich.console import Console

from tests.drill.drills import DRILLS
from tests.drill.stack import TOP, Stack, stack
from tidepool.errors import TidepoolError, did_you_mean
from tidepool.local.processes import signals_interrupt


def execute(name: str, running: Stack) -> None:
    """Execute a drill."""
    found, begun = DRILLS[name], time.monotonic()
    running.say("drill", f"{name}: {found.text}; runbook docs/runbooks/{found.runbook}.md")
    found.run(running)
    running.say("drill", f"{name}: broken and repaired in {time.monotonic() - begun:.0f} s")


def main(*names: str) -> int:
    """Execute the named drills, each on a stack of its own; return the exit code: 0 if all are green again."""
    out = Console(highlight=False)
    if not names:
        out.print("make drill NAME=…", *(f"  {name:<18} {each.text}" for name, each in DRILLS.items()), sep="\n")
        return 0
    chosen = list(DRILLS) if names == ("--all",) else names
    if unknown := [name for name in chosen if name not in DRILLS]:
        out.print(f"unknown drill {unknown[0]!r}{did_you_mean(unknown[0], sorted(DRILLS))}", style="red")
        return 1
    failed = []
    with signals_interrupt():
        for name in chosen:
            folder = TOP / ".tidepool" / "drill" / name
            shutil.rmtree(folder, ignore_errors=True)
            try:
                with stack(folder, out) as running:
                    execute(name, running)
            except (AssertionError, TidepoolError) as error:
                failed.append(name)
                out.print(f"drill {name} failed: {error}\nlogs: {folder}/logs", style="red", markup=False)
    if len(chosen) > 1:
        out.print(f"{len(chosen) - len(failed)} of {len(chosen)} drills are green again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
