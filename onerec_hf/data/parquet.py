"""Reads Parquet files and rejects decompression bombs: a few hundred bytes can encode sixty gigabytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from onerec_hf.data.types import table_from_arrow

# Limits on decoded data: an absolute one for small files, a ratio for larger ones. Real logs and embeddings decode to 1 to 20 bytes per byte.
_FREE_VALUES, _VALUES_PER_BYTE = 50_000_000, 64
_FREE_BYTES, _BYTES_PER_BYTE = 2**28, 200
_INDEX = re.compile(r"__index_level_\d+__")


def read_parquet(path: Path) -> pd.DataFrame:
    """
    Reads a Parquet file, with columns as `plain_columns` has them.

    Raises:
        ValueError: the file is damaged, or decodes to more than 50 million values or 256 MiB, out of proportion to its size.
        OSError: the file is damaged or missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "items.parquet")
        ...     pd.DataFrame({"item_id": ["a", "b"], "tags": [["x"], []]}).to_parquet(path)
        ...     read_parquet(path)["item_id"].tolist()
        ['a', 'b']
    """
    import pyarrow as pa

    try:
        return _read(path)
    except pa.ArrowException as error:
        if isinstance(error, ValueError | OSError):
            raise
        raise ValueError(f"damaged: {error}") from error


def _read(path: Path) -> pd.DataFrame:
    import pyarrow.parquet as pq

    size = path.stat().st_size
    limit = max(_FREE_BYTES, size * _BYTES_PER_BYTE)
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        groups = range(metadata.num_row_groups)
        _check_limit(limit, sum(metadata.row_group(group).total_byte_size for group in groups), "bytes", size)
        for group in groups:
            # For a damaged column, pyarrow's metadata calls abort the process, while reading a row raises.
            next(file.iter_batches(batch_size=1, row_groups=[group], use_threads=False), None)
        chunks = [
            metadata.row_group(group).column(column) for group in groups for column in range(metadata.num_columns)
        ]
    leaves = [metadata.schema.column(column) for column in range(metadata.num_columns)]
    _check_limit(max(_FREE_VALUES, size * _VALUES_PER_BYTE), sum(chunk.num_values for chunk in chunks), "values", size)
    fixed = sum(
        chunk.num_values * leaf.length
        for chunk, leaf in zip(chunks, leaves * metadata.num_row_groups, strict=True)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY"
    )
    _check_limit(limit, fixed + sum(chunk.total_uncompressed_size for chunk in chunks), "bytes", size)
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    if not texts:
        return _plain(pq.read_table(path))
    # Dictionary encoding keeps a repeated string once, so the decoded size is known before the strings are created.
    table = pq.read_table(path, read_dictionary=texts)
    _check_limit(
        limit, sum(_decoded_bytes(chunk) for column in table.columns for chunk in column.chunks), "bytes", size
    )
    table.validate(full=True)  # invalid UTF-8 would only fail at first access
    if not set(texts) <= set(table.column_names):  # strings inside lists
        table = pq.read_table(path)
    return _plain(table)


def _plain(table: Any) -> pd.DataFrame:
    """Without the index that pandas writes if it has no name."""
    unnamed = [name for name in table.column_names if _INDEX.fullmatch(name)]
    return table_from_arrow(table.drop_columns(unnamed))


def _check_limit(limit: int, found: int, what: str, size: int) -> None:
    if found > limit:
        raise ValueError(
            f"its {size:,} bytes decode to {found:,} {what}, beyond the limit for untrusted files; if you trust it, read it with pandas "
            "and pass the DataFrame"
        )


def _decoded_bytes(array: Any) -> int:
    """Bytes of an Arrow array after dictionary decoding."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    if pa.types.is_dictionary(array.type):
        kind, values = array.type.value_type, array.dictionary
        if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
            values = values.cast(pa.large_binary())
        elif not any(test(kind) for test in texts):
            return array.nbytes
        lengths = pc.binary_length(values)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.sum(lengths.take(array.indices).cast(pa.int64())).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _decoded_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_map(array.type):
        return _decoded_bytes(array.keys) + _decoded_bytes(array.items)
    return array.nbytes
