"""Taxi files as tables: the first rows with pandas, all rows with Dask.

A file is CSV (`.csv`, `.csv.gz`) with a header line, or Parquet (`.parquet`).
"""

from __future__ import annotations

import gzip
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from flows.taxi import transform
from tidepool import storage
from tidepool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

# The rows of a CSV file begin after its header line.
_FIRST_LINE = 2
_CHUNK_ROWS = 100_000
_THREADS = 16
BROKEN = (ValueError, TypeError, EOFError, zlib.error, gzip.BadGzipFile)
"""What a table of invalid data raises, in pandas, PyArrow and Dask."""


def matching(source: str) -> list[str]:
    """List the URLs of the files that a source refers to.

    Args:
        source: Path or URL of a file, or a pattern with `*`.

    Returns:
        At least one URL; all CSV or all Parquet.

    Raises:
        InputError: no file matches, or a file is neither CSV nor Parquet, or both kinds match.
    """
    place = storage.source(source)
    urls = storage.listing(place) if "*" in place else [place]
    if not urls:
        raise InputError(f"{source}: no file matches")
    if len({is_parquet(url) for url in urls}) > 1:
        raise InputError(f"{source}: matches both CSV and Parquet files; read them in two runs")
    return urls


def is_parquet(url: str) -> bool:
    """Tell by its name whether a file is Parquet; otherwise it is CSV.

    Raises:
        InputError: it is neither.
    """
    if url.endswith(".parquet"):
        return True
    if url.endswith((".csv", ".csv.gz")):
        return False
    raise InputError(f"{url}: neither CSV (.csv, .csv.gz) nor Parquet (.parquet)")


def first_rows(url: str, wanted: Sequence[str], count: int) -> pd.DataFrame:
    """Read the first rows of a file, typed; the rest of the file is not read.

    Args:
        url: URL of the file.
        wanted: The columns, as keys of `transform.NAMES`.
        count: Number of rows.

    Raises:
        InputError: a column is missing, or a value is invalid for its column.
        StorageError: the file does not exist.
    """
    import pandas as pd

    parts: list[pd.DataFrame] = []
    for raw in _raw(url, wanted, min(count, _CHUNK_ROWS)):
        parts.append(_typed(raw.head(count), url))
        count -= len(raw)
        if count <= 0:
            break
    return pd.concat(parts) if parts else pd.DataFrame(columns=list(wanted))


def all_rows(urls: Sequence[str], wanted: Sequence[str], blocksize: int) -> Any:
    """Return all rows of the files as a Dask table that reads the wanted columns only.

    Args:
        urls: URLs of the files, all CSV or all Parquet.
        wanted: Numeric columns, as keys of `transform.NAMES`.
        blocksize: Bytes of a file per partition; a compressed CSV file is always one partition.

    Raises:
        InputError: a column is missing in a file, or named differently than in the first file.
        StorageError: a file does not exist.
    """
    import dask.dataframe as dd

    names = _same_columns(urls, wanted)
    types = {column: "Int64" if column == "passengers" else "float64" for column in wanted}
    storage_options = storage.options(urls[0])
    if is_parquet(urls[0]):
        table = dd.read_parquet(
            urls, columns=list(names.values()), blocksize=blocksize, storage_options=storage_options
        )
    else:
        compressed = any(url.endswith(".gz") for url in urls)
        table = dd.read_csv(
            urls,
            usecols=list(names.values()),
            dtype={name: types[column] for column, name in names.items()},
            index_col=False,
            blocksize=None if compressed else blocksize,
            storage_options=storage_options,
        )
    renamed = table.rename(columns={name: column for column, name in names.items()})
    return renamed.astype(types) if is_parquet(urls[0]) else renamed


def check_values(urls: Sequence[str], wanted: Sequence[str]) -> None:
    """Read all rows with pandas, to find the value on which Dask failed without naming its place.

    Raises:
        InputError: a value is invalid; names the place and the value.
    """
    for url in urls:
        for raw in _raw(url, wanted, _CHUNK_ROWS):
            _typed(raw, url)


def _typed(raw: pd.DataFrame, url: str) -> pd.DataFrame:
    return transform.typed(raw, url, first_line=None if is_parquet(url) else _FIRST_LINE)


def _same_columns(urls: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda url: transform.columns(_header(url), wanted, url), urls))
    for url, names in zip(urls, found, strict=True):
        if names != found[0]:
            raise InputError(
                f"{url}: columns {', '.join(names.values())}, but {urls[0]} has {', '.join(found[0].values())}; "
                "read them in two runs"
            )
    return found[0]


def _header(url: str) -> list[str]:
    """Read the names of a file's columns."""
    import pandas as pd
    from pyarrow import parquet

    with storage.reader(url) as stream, _readable(url):
        if is_parquet(url):
            return cast("list[str]", parquet.read_schema(stream).names)
        return [str(name) for name in pd.read_csv(stream, nrows=0, compression=_compression(url)).columns]


def _raw(url: str, wanted: Sequence[str], rows: int) -> Iterator[pd.DataFrame]:
    """Read a file in tables of that many rows with the wanted columns: text from CSV, values from Parquet."""
    import pandas as pd
    from pyarrow import parquet

    names = transform.columns(_header(url), wanted, url)
    wanted_names = {name: column for column, name in names.items()}
    with storage.reader(url) as stream, _readable(url):
        if is_parquet(url):
            start = 0
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=rows, columns=list(wanted_names)):
                table = batch.to_pandas().rename(columns=wanted_names)
                yield table.set_index(pd.RangeIndex(start, start + len(table)))[list(wanted)]
                start += len(table)
            return
        with pd.read_csv(
            stream,
            usecols=list(wanted_names),
            dtype=str,
            index_col=False,
            # Keeps the row number equal to the line number.
            skip_blank_lines=False,
            chunksize=rows,
            compression=_compression(url),
        ) as chunks:
            for chunk in chunks:
                yield chunk.rename(columns=wanted_names)[list(wanted)].dropna(how="all")


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Raise an InputError with the URL for data that is not in the file's format."""
    import pandas as pd

    try:
        yield
    except pd.errors.EmptyDataError:
        raise InputError(f"{url}: empty; expected a header line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{url}: {_not_utf8(url) or error}") from None
    except (*BROKEN, OSError) as error:
        if isinstance(error, InputError) or storage.is_transient(error):
            raise
        kind = "Parquet" if is_parquet(url) else "CSV" + (" in gzip" if _compression(url) else "")
        raise InputError(f"{url}: not readable as {kind}: {error}") from None


def _not_utf8(url: str) -> str:
    """Return the place of the first byte that is not UTF-8; pandas knows it within a part of the file only."""
    with storage.reader(url) as stream, gzip.GzipFile(fileobj=stream) if _compression(url) else stream as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: byte {error.start + 1} of it is not UTF-8"
    return ""


def _compression(url: str) -> Any:
    return "gzip" if url.endswith(".gz") else None
