"""Reads Parquet files and rejects decompression bombs: a few hundred bytes can encode sixty gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

# Limits on decoded data: an absolute one for small files, a ratio for larger ones. Real logs and embeddings decode to 1 to 20 bytes per byte.
_FREE_VALUES, _VALUES_PER_BYTE = 50_000_000, 64
_FREE_BYTES, _BYTES_PER_BYTE = 2**28, 200


def read_parquet(path: Path) -> pd.DataFrame:
    """
    Reads a Parquet file like `pandas.read_parquet`.

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
        metadata, schema = file.metadata, file.schema_arrow
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
        return pd.read_parquet(path)
    # Dictionary encoding keeps a repeated string once, so the decoded size is known before the strings are created.
    table = pq.read_table(path, read_dictionary=texts)
    _check_limit(
        limit, sum(_decoded_bytes(chunk) for column in table.columns for chunk in column.chunks), "bytes", size
    )
    table.validate(full=True)  # invalid UTF-8 would only fail at first access
    if not set(texts) <= set(table.column_names):  # strings inside lists
        return pd.read_parquet(path)
    return table.cast(schema).to_pandas()


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

    if pa.types.is_dictionary(array.type):
        if not (pa.types.is_string(array.type.value_type) or pa.types.is_binary(array.type.value_type)):
            return array.nbytes
        lengths = pc.binary_length(array.dictionary)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.sum(lengths.take(array.indices).cast(pa.int64())).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _decoded_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_map(array.type):
        return _decoded_bytes(array.keys) + _decoded_bytes(array.items)
    return array.nbytes
