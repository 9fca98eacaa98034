"""The errors that are meant for a person.

Each carries one sentence that names the thing, the place and the accepted values, and is shown without a traceback::

    TidepoolError
    ├── UsageError      a command, a setting or a parameter is wrong: nothing was started, exit code 2
    ├── InputError      the data that a flow reads is wrong: the run fails with this sentence, and is not retried
    ├── StorageError    an object cannot be read or written as asked
    └── ClusterError    a Dask cluster cannot be had as asked: the sentence says what it waited for
"""

from __future__ import annotations


class TidepoolError(Exception):
    """An error whose text is for the person who runs the thing."""


class UsageError(TidepoolError):
    """A command line, a setting or a parameter is wrong; nothing was started."""


class InputError(TidepoolError, ValueError):
    """The data that a flow reads is not what it says it takes; trying again changes nothing."""


class StorageError(TidepoolError):
    """An object cannot be read or written as asked."""


class ClusterError(TidepoolError):
    """A Dask cluster did not start, or is not what was asked for."""
