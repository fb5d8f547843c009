"""Names of table files and their content: suffixes, compression, and a bound on what a compressed file expands to."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, NamedTuple

from onerec_hf.data.columns import DataError

#: Compressions by the last suffix, as pyarrow calls them.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# A compressed log expands 3 to 50 times; files that expand further are refused.
_FREE_BYTES, _BYTES_PER_BYTE = 2**28, 200
_CHUNK = 2**22


class TableName(NamedTuple):
    """
    What a file's name says about it.

    Args:
        stem: the name without the suffixes.
        suffix: of the table, in lower case.
        compression: as pyarrow calls it; None for plain files.
    """

    stem: str
    suffix: str
    compression: str | None


def table_name(path: str | Path) -> TableName:
    """
    Splits a file's name.

    Example:
        >>> table_name("logs/2024.ratings.CSV.gz")
        TableName(stem='2024.ratings', suffix='.csv', compression='gzip')
    """
    path = Path(path)
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = Path(path.stem) if compression else path
    return TableName(inner.stem, inner.suffix.lower(), compression)


def stream_table(path: str | Path) -> IO[bytes]:
    """
    The bytes of a file, decompressed as they are read.

    Raises:
        OSError: no such file, or, when it is read, a damaged one.

    Example:
        >>> import gzip, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv.gz")
        ...     _ = path.write_bytes(gzip.compress(b"user_id,item_id"))
        ...     with stream_table(path) as file:
        ...         file.readline()
        b'user_id,item_id'
    """
    compression = table_name(path).compression
    if compression is None:
        return open(path, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _CHUNK)


def open_table(path: str | Path) -> IO[bytes]:
    """
    The bytes of a file; those of a compressed one are read into memory.

    Raises:
        DataError: a compressed file that expands beyond 256 MiB and 200 times its size.
        OSError: no such file, or a damaged one.

    Example:
        >>> import gzip, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv.gz")
        ...     _ = path.write_bytes(gzip.compress(b"user_id,item_id"))
        ...     open_table(path).read()
        b'user_id,item_id'
    """
    path = Path(path)
    if table_name(path).compression is None:
        return open(path, "rb")
    limit = max(_FREE_BYTES, path.stat().st_size * _BYTES_PER_BYTE)
    content = io.BytesIO()
    with stream_table(path) as stream:
        while chunk := stream.read(_CHUNK):
            content.write(chunk)
            if content.tell() > limit:
                raise DataError(
                    f"{path}: its {path.stat().st_size:,} bytes expand to more than {limit:,}, beyond the limit for untrusted files. If you "
                    "trust it, decompress it first."
                )
    content.seek(0)
    return content
