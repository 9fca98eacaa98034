"""Limits of mapped tasks: the size of arguments and results, because data travels by reference, and transactions."""

from __future__ import annotations

import io
from collections import ChainMap
from typing import TYPE_CHECKING, Any, ClassVar, cast

import cloudpickle
from prefect.transactions import get_transaction
from prefect.utilities.annotations import allow_failure, opaque, quote

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect import Task

# Bytes that travel together, of many arguments or results.
TOGETHER_BYTES = 4 * 1024 * 1024

_ADVICE = (
    "write it to the store (tidepool.storage) and pass its URL; TIDEPOOL_COMPUTE_ARGUMENT_LIMIT_BYTES sets the limit"
)


class ArgumentRefusedError(UsageError):
    """An argument of a mapped task is too large to travel, or cannot be pickled."""


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


def pickle_arguments(task: str, parameters: Mapping[str, Any]) -> dict[str, bytes]:
    """Pickle arguments one by one.

    Args:
        task: Name of the task.
        parameters: The arguments, by the name of their parameter.

    Raises:
        ArgumentRefusedError: one cannot be pickled; the sentence names it, and the place in it.
    """
    return {name: _pickled(f"argument `{name}` of task `{task}`", value) for name, value in parameters.items()}


def pickle_context(what: str, value: Any) -> bytes:
    """Pickle what the task runs of a flow have in common.

    Args:
        what: Its name in a message.
        value: It.

    Raises:
        ArgumentRefusedError: it cannot be pickled.
    """
    try:
        return cast("bytes", cloudpickle.dumps(value))
    except Exception as error:
        raise ArgumentRefusedError(f"{what} cannot be pickled: {error}") from error


def _pickled(what: str, value: Any) -> bytes:
    try:
        return pickle_argument(value)
    except Exception as error:
        place = "".join(_unpicklable(value))
        place = f" at {place}" if place else ""
        raise ArgumentRefusedError(
            f"{what} cannot be pickled{place}: {error}; pass what it is made from, such as a path or a URL"
        ) from error


def _unpicklable(value: Any) -> Iterator[str]:
    """Yield the way to the part that cannot be pickled, through lists, tuples and mappings."""
    while isinstance(value, (list, tuple, dict)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            try:
                pickle_argument(part)
            except Exception:  # noqa: BLE001 - this is the one that is looked for
                yield f"[{key!r}]"
                value = part
                break
        else:
            return


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


def readable_error(error: BaseException, limit: int) -> BaseException:
    """Return an error that can travel: it, or its text if it cannot be pickled, not read again, or is too large.

    Args:
        error: Any exception: its own `__reduce__` or `__init__` may raise anything.
        limit: Bytes that it may have, pickled.
    """
    try:
        pickled = cloudpickle.dumps(error)
        if len(pickled) > limit:
            return RuntimeError(f"{type(error).__name__}: {str(error)[:1000]} (shortened: {_words(len(pickled))})")
        cloudpickle.loads(pickled)
    except Exception as unreadable:  # noqa: BLE001 - see above
        return RuntimeError(f"{type(error).__name__}: {error} (unpicklable: {unreadable})")
    return error


def refuse_result(task: str, result: Any, limit: int) -> bytes:
    """Refuse a result that is too large or cannot be pickled.

    Args:
        task: Name of the task.
        result: Its return value; of a cached result, Prefect's record.
        limit: Bytes that a result may have, pickled.

    Returns:
        It, pickled.

    Raises:
        ResultRefusedError: it is too large, or cannot be pickled; the sentence says what to do instead.
    """
    try:
        pickled = cast("bytes", cloudpickle.dumps(result))
    except Exception as error:
        raise ResultRefusedError(f"the result of task `{task}` cannot be pickled: {error}") from error
    if len(pickled) > limit:
        raise ResultRefusedError(
            f"the result of task `{task}` has {_words(len(pickled))}, the limit is {_words(limit)}: {_ADVICE}"
        )
    return pickled


def refuse_unreadable(task: str, pickled: bytes) -> None:
    """Refuse a result that can be pickled, and not be read again.

    Raises:
        ResultRefusedError: it cannot be read.
    """
    try:
        cloudpickle.loads(pickled)
    except Exception as error:
        raise ResultRefusedError(f"the result of task `{task}` cannot be read from its pickle: {error}") from error


def refuse_hooks(task: Task[..., Any]) -> None:
    """Refuse a task with hooks of a transaction inside of one whose end they would not follow.

    Raises:
        UsageError: its hooks would not run, or too early; the sentence says what to do instead.
    """
    if (task.on_rollback_hooks or task.on_commit_hooks) and get_transaction() is not None:
        raise UsageError(
            f"task `{task.name}` has on_rollback or on_commit hooks and is submitted inside a transaction, whose end a "
            "task run in another process does not see: call the task here, without submit or map, or let it run in "
            "threads of this process (TIDEPOOL_COMPUTE_PROVIDER=threads)"
        )


def _words(size: int) -> str:
    for unit, step in (("MiB", 1024**2), ("KiB", 1024)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
