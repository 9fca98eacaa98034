"""The task runner: Prefect tasks on a Dask cluster.

`TidepoolTaskRunner` has the constructor and the public behaviour of `prefect_dask.DaskTaskRunner`.
"""

from __future__ import annotations

from typing import Any

from prefect_dask import DaskTaskRunner


class TidepoolTaskRunner(DaskTaskRunner):
    """Runs tasks on a Dask cluster that starts with the first submitted task.

    Args:
        *args: As `prefect_dask.DaskTaskRunner` takes them.
        start_early: Begin to create the cluster when the flow begins, not with its first submitted task.
        **kwargs: As `prefect_dask.DaskTaskRunner` takes them.
    """

    def __init__(self, *args: Any, start_early: bool = False, **kwargs: Any) -> None:  # noqa: ANN401 - the stock signature
        super().__init__(*args, **kwargs)
        self.start_early = start_early

    def duplicate(self) -> TidepoolTaskRunner:
        """A new runner with the same settings, as every flow run gets."""
        copy: TidepoolTaskRunner = super().duplicate()
        copy.start_early = self.start_early
        return copy
