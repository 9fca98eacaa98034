"""A pytest plugin for prefect-dask's own tests; SUITE_RUNNER=ours runs them with our task runner.

Prefect's server may take longer to start than the 30 s that the tests give it: on a busy machine it does.
"""

from __future__ import annotations

import os
from functools import partial

import prefect.testing.utilities
import prefect_dask

prefect.testing.utilities.prefect_test_harness = partial(
    prefect.testing.utilities.prefect_test_harness, server_startup_timeout=600
)
if os.environ.get("SUITE_RUNNER") == "ours":
    from tidepool.compute.runner.task_runner import TidepoolTaskRunner

    prefect_dask.DaskTaskRunner = TidepoolTaskRunner  # type: ignore[misc] # the tests import it from there
