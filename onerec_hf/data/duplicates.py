"""Exact duplicates among interactions, and the columns that hide them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from onerec_hf.data.columns import column_of
from onerec_hf.data.times import Instants
from onerec_hf.modeling.files import listed

# The index that pandas and spreadsheets write beside the columns. It would hide duplicates.
ROW_NUMBERS = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")


def repeated_rows(
    table: pd.DataFrame, ids: Mapping[str, np.ndarray], times: Instants, names: Mapping[str, str]
) -> np.ndarray:
    """
    (N,) whether a row is an exact duplicate of an earlier one.

    Args:
        table: the rows.
        ids, times: what was read from them, by `names`.
        names: the columns of user, item and time.

    Warns:
        UserWarning: how many rows are duplicates; how many would be, but for a column that differs in every row.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1, 1], "item_id": [7, 7], "timestamp": [3, 4]})
        >>> ids = {"user_id": np.array([1, 1]), "item_id": np.array([7, 7])}
        >>> repeated_rows(rows, ids, Instants(np.array([3, 4]), None), {name: name for name in rows}).tolist()
        [False, False]
    """
    compared = table.drop(columns=[name for name in table.columns if ROW_NUMBERS.fullmatch(str(name))])
    compared = compared.assign(
        **{names[name]: values for name, values in ids.items()}, **{names["timestamp"]: times.whole}
    )
    if times.rest is not None:
        compared["__rest__"] = times.rest
    keys = [names["user_id"], names["item_id"], names["timestamp"]]
    again = compared.duplicated(keys, keep=False).to_numpy()
    repeated = np.zeros(len(table), dtype=bool)
    if not again.any():
        return repeated
    suspects = _comparable(compared.loc[again])
    repeated[again] = suspects.duplicated().to_numpy()
    if repeated.any():
        warnings.warn(
            f"interactions: dropped {repeated.sum():,} of {len(table):,} rows as exact duplicates "
            f"(first: row {int(repeated.argmax())})."
        )
    suspects = suspects.loc[~repeated[again]]
    kept = compared.loc[~repeated]
    numbering = [
        str(name)
        for name in suspects.columns
        if name not in (*keys, "__rest__") and _all_distinct(column_of(kept, name))
    ]
    warn_hidden(int(suspects.drop(columns=numbering).duplicated().sum()), len(table), numbering)
    return repeated


def warn_hidden(hidden: int, rows: int, numbering: Sequence[str]) -> None:
    """
    Warns of duplicates that columns hide.

    Args:
        hidden: how many of the `rows` equal an earlier one but for the columns `numbering`, which differ in every row.

    Example:
        >>> warn_hidden(0, 10, ["event"])
    """
    if hidden:
        warnings.warn(
            f"interactions: {hidden:,} of {rows:,} rows equal an earlier row but for {listed(numbering)}, which differs in every row; they "
            "are kept. If that column only numbers the rows, drop it."
        )


def _all_distinct(series: pd.Series) -> bool:
    try:
        return bool(series.is_unique)
    except TypeError:  # lists
        return False


def _comparable(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with lists and arrays converted to strings, since `duplicated` cannot hash them."""
    unhashable = [
        column
        for column in table.columns
        if table[column].dtype == object and pd.api.types.infer_dtype(table[column], skipna=True).startswith("mixed")
    ]
    written = table.copy(deep=False)
    for column in unhashable:
        written[column] = table[column].map(lambda v: repr(v.tolist() if isinstance(v, np.ndarray) else v))
    return written
