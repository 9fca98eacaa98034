"""Processes of a pod, as a program that runs in it finds them."""

from __future__ import annotations

# Finds a process of a pod by its part, and sends it a signal: `main` is what the pod's tini has started, `engine` the
# process in which the flow runs.
SIGNAL = """
import os, sys
which, number = sys.argv[1:]
def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
def is_engine(pid):
    modules = ("tidepool.operate.engine", "prefect.flow_engine", "prefect.engine")
    with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/comm") as name:
        # One that was forked has the command line of its parent, but a name of its own.
        return name.read() == "tidepool-engine\\n" or any(each in command.read() for each in modules)
pids = [int(each) for each in os.listdir("/proc") if each.isdigit()]
[main] = [pid for pid in pids if parent(pid) == 1]
engines = [pid for pid in pids if pid != os.getpid() and is_engine(pid)]
[target] = [main] if which == "main" else engines
os.kill(target, int(number))
"""
