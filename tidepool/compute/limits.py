"""Size limits of arguments and results of mapped tasks: data travels by reference."""

from __future__ import annotations

import io
from collections import ChainMap
from typing import TYPE_CHECKING, Any, ClassVar

import cloudpickle
from prefect.utilities.annotations import allow_failure, opaque, quote

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADVICE = (
    "write it to the store (tidepool.storage) and pass its URL; TIDEPOOL_COMPUTE_ARGUMENT_LIMIT_BYTES sets the limit"
)


class ArgumentRefusedError(UsageError):
    """An argument of a mapped task is too large to travel."""


class ResultRefusedError(UsageError):
    """A result of a mapped task is too large to travel, or cannot be pickled; trying again changes nothing."""


def _by_call(annotation: Any) -> tuple[Any, tuple[Any]]:
    return type(annotation), (annotation.unwrap(),)


class _ArgumentPickler(cloudpickle.Pickler):
    """Pickles Prefect's annotations by their class: being tuples, they would come back nested once."""

    dispatch_table: ClassVar = ChainMap(
        dict.fromkeys((allow_failure, opaque, quote), _by_call), cloudpickle.Pickler.dispatch_table
    )


def pickle_argument(value: Any) -> bytes:
    """Pickle an argument of a task."""
    with io.BytesIO() as buffer:
        _ArgumentPickler(buffer).dump(value)
        return buffer.getvalue()


def refuse_arguments(task: str, pickled: Mapping[str, int], limit: int) -> None:
    """Refuse the first argument that is too large.

    Args:
        task: Name of the task.
        pickled: Size of each argument, pickled (bytes), by the name of its parameter.
        limit: Bytes that an argument may have.

    Raises:
        ArgumentRefusedError: an argument is too large; the sentence names it, its size and what to do instead.
    """
    for parameter, size in pickled.items():
        if size > limit:
            raise ArgumentRefusedError(
                f"argument `{parameter}` of task `{task}` has {_words(size)}, the limit is {_words(limit)}: {_ADVICE}"
            )


def refuse_result(task: str, result: Any, limit: int) -> None:
    """Refuse a result that is too large or cannot be pickled.

    Args:
        task: Name of the task.
        result: Its return value; of a cached result, Prefect's record.
        limit: Bytes that a result may have, pickled.

    Raises:
        ResultRefusedError: it is too large, or cannot be pickled; the sentence says what to do instead.
    """
    try:
        size = len(cloudpickle.dumps(result))
    except Exception as error:
        raise ResultRefusedError(f"the result of task `{task}` cannot be pickled: {error}") from error
    if size > limit:
        raise ResultRefusedError(
            f"the result of task `{task}` has {_words(size)}, the limit is {_words(limit)}: {_ADVICE}"
        )


def _words(size: int) -> str:
    for unit, step in (("MiB", 1024**2), ("KiB", 1024)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
