"""A Parquet file as a table, unless it unfolds to far more than it holds: a few hundred bytes can say sixty gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

# What a file of any size may unfold to; a larger one in proportion. Measured logs and embeddings lie at 1 to 20 bytes per byte.
_FREE_VALUES, _VALUES_PER_BYTE = 50_000_000, 64
_FREE_BYTES, _BYTES_PER_BYTE = 2**28, 200


def read_parquet(path: Path) -> pd.DataFrame:
    """
    Reads a Parquet file as pandas does.

    Raises:
        ValueError: damaged, or it unfolds to more than 50 million values or 256 MiB of text, and to that in no proportion to its size.
        OSError: damaged, or no such file.

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
    most = max(_FREE_BYTES, size * _BYTES_PER_BYTE)
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
        groups = range(metadata.num_row_groups)
        _refuse_beyond(most, sum(metadata.row_group(group).total_byte_size for group in groups), "bytes", size)
        for group in groups:
            # Asked about a damaged column, pyarrow ends the process; reading a row of it, it raises.
            next(file.iter_batches(batch_size=1, row_groups=[group], use_threads=False), None)
        chunks = [
            metadata.row_group(group).column(column) for group in groups for column in range(metadata.num_columns)
        ]
    leaves = [metadata.schema.column(column) for column in range(metadata.num_columns)]
    _refuse_beyond(
        max(_FREE_VALUES, size * _VALUES_PER_BYTE), sum(chunk.num_values for chunk in chunks), "values", size
    )
    fixed = sum(
        chunk.num_values * leaf.length
        for chunk, leaf in zip(chunks, leaves * metadata.num_row_groups, strict=True)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY"
    )
    _refuse_beyond(most, fixed + sum(chunk.total_uncompressed_size for chunk in chunks), "bytes", size)
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    if not texts:
        return pd.read_parquet(path)
    # A text that is repeated is written once. Read so, it can be said what all of them are together before they are made.
    table = pq.read_table(path, read_dictionary=texts)
    _refuse_beyond(most, sum(_unfolded(chunk) for column in table.columns for chunk in column.chunks), "bytes", size)
    table.validate(full=True)  # texts that are none would break whoever looks at them first
    if not set(texts) <= set(table.column_names):  # inside lists
        return pd.read_parquet(path)
    return table.cast(schema).to_pandas()


def _refuse_beyond(most: int, found: int, what: str, size: int) -> None:
    if found > most:
        raise ValueError(
            f"its {size:,} bytes unfold to {found:,} {what}, which no table of interactions or items does; read it yourself where you trust "
            "it, and pass a DataFrame"
        )


def _unfolded(array: Any) -> int:
    """Bytes of an Arrow array once every value stands for itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        if not (pa.types.is_string(array.type.value_type) or pa.types.is_binary(array.type.value_type)):
            return array.nbytes
        lengths = pc.binary_length(array.dictionary)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.sum(lengths.take(array.indices).cast(pa.int64())).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _unfolded(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(map(_unfolded, array.flatten()))
    if pa.types.is_map(array.type):
        return _unfolded(array.keys) + _unfolded(array.items)
    return array.nbytes
