"""Task runs that have ended, until the server is known to have recorded them.

A worker sends its events in the background. Two things follow. What a lost worker had not sent, the driver sends. And
the server must not fall behind: Prefect drops events of any flow run when 10,000 wait, three for each task run. So no
more is submitted than the server can record: back-pressure.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Sequence

    from tidepool.compute.runner.recorder import Conclusion, Recorder

# Events that a worker sent more than this before its loss became known have arrived. A node that vanishes is noticed
# after distributed.comm.timeouts.tcp, 30 s.
_UNSENT_SECONDS = 40.0
# How many task runs may have ended without being recorded, and how long the server is waited for at that.
_AHEAD = 1000
_FOLLOW_SECONDS = 60.0


class Backlog:
    """Task runs that the server may not have recorded yet.

    Args:
        recorder: Asks the server, and sends what it lacks.
        log: Reports a server that lags.
    """

    def __init__(self, recorder: Recorder, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._recorder = recorder
        self._log = log
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, Conclusion]] = deque()
        self._unconfirmed: deque[Conclusion] = deque()
        self._unsent: list[Conclusion] = []
        self._lost_workers: set[str] = set()
        self._follow_seconds = _FOLLOW_SECONDS

    def add(self, ended: Sequence[Conclusion]) -> None:
        """Note task runs that ended on their workers."""
        now = time.monotonic()
        with self._lock:
            self._forget_sent(now)
            self._unconfirmed += ended
            for conclusion in ended:
                # The news of a loss may overtake the outcomes of the worker.
                if conclusion.outcome.worker in self._lost_workers:
                    self._unsent.append(conclusion)
                else:
                    self._recent.append((now, conclusion))

    def on_worker_lost(self, address: str) -> None:
        """Note that a worker is lost, and with it the events of task runs that ended there just before."""
        with self._lock:
            self._lost_workers.add(address)
            self._forget_sent(time.monotonic())
            self._unsent += [each for _, each in self._recent if each.outcome.worker == address]
            self._recent = deque(each for each in self._recent if each[1].outcome.worker != address)

    def record_unsent(self, seconds: float) -> None:
        """Send the final states that lost workers may not have sent.

        It does not raise: failures are logged, and are tried again when the cluster closes.

        Args:
            seconds: How long the server may take to hear of them from the worker itself.
        """
        with self._lock:
            unsent, self._unsent = self._unsent, []
        if unsent and not self._recorder.record_unsent(unsent, seconds):
            with self._lock:
                self._unsent += unsent

    def wait_for_server(self) -> None:
        """Wait while the server has more than `_AHEAD` ended task runs to record."""
        with self._lock:
            due = [self._unconfirmed.popleft() for _ in range(len(self._unconfirmed) - _AHEAD)]
        if not due:
            return
        # The server records in the order in which it hears of them: only the last one is asked for.
        if self._recorder.has_recorded(due[-1], self._follow_seconds):
            self._follow_seconds = _FOLLOW_SECONDS
        else:
            # It may record nothing at all: it is not waited for again before it does.
            self._follow_seconds = 0.0
            self._log.warning("Prefect server lags by more than %d task runs; continuing without back-pressure", _AHEAD)
            with self._lock:
                self._unsent += due

    def _forget_sent(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > _UNSENT_SECONDS:
            self._recent.popleft()
