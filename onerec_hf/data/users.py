"""The table of users: ids and what is known of each user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from onerec_hf.data.aliases import find_column
from onerec_hf.data.columns import DataError, column_of, first, names_source, require_columns
from onerec_hf.data.interactions import ids_as, ids_of
from onerec_hf.data.tables import load_table

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource


@dataclass(frozen=True, eq=False)
class UserTable:
    """
    Users, one row each.

    Args:
        user_ids: (U,) distinct ids, int64 or object array of `str`.
        frame: (U rows) the other columns.

    Example:
        >>> users = read_users(pd.DataFrame({"userId": ["u1", "u2"], "age": [31, 45]}), user_column="userId")
        >>> users.user_ids.tolist(), users.frame["age"].tolist()
        (['u1', 'u2'], [31, 45])
    """

    user_ids: np.ndarray
    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.user_ids)

    def rows_of(self, user_ids: np.ndarray) -> np.ndarray:
        """The rows of users; -1 where there is none."""
        return pd.Index(self.user_ids).get_indexer(pd.Index(user_ids))

    def with_ids_like(self, user_ids: np.ndarray) -> UserTable:
        """
        The table with ids of the other type, where its own differ from `user_ids` in type only: "7" and 7.

        Warns:
            UserWarning: the ids were converted.
        """
        ids = ids_as("users", self.user_ids, user_ids)
        return self if ids is self.user_ids else UserTable(ids, self.frame)


@names_source
def read_users(
    source: TableSource, *, user_column: str = "user_id", column_names: Sequence[str] | None = None
) -> UserTable:
    """
    Reads the table of users, in the row order of the source.

    Args:
        source: a table, as `read_interactions` takes it.
        user_column: column of user ids; ids are kept unchanged, and other usual names of a default are found (see `read_interactions`).
        column_names: the columns of a text file without a header, in order.

    Raises:
        DataError: unreadable or empty source, missing column, null, mixed or duplicate ids.

    Example:
        >>> read_users(pd.DataFrame({"user_id": [1, 1], "age": [31, 45]}))
        Traceback (most recent call last):
        ...
        onerec_hf.data.columns.DataError: column 'user_id': 1 of 2 rows duplicate an earlier user id (first: row 1, 1). Keep one row per user.
    """
    table = load_table(source, (user_column,), column_names)
    user_column = find_column(table.columns, user_column, "user_id")
    require_columns(table, [user_column], "users")
    ids = ids_of(source, column_of(table, user_column), user_column)
    repeated = pd.Series(ids).duplicated().to_numpy()
    if repeated.any():
        raise DataError(
            f"column {user_column!r}: {repeated.sum():,} of {len(ids):,} rows duplicate an earlier user id (first: {first(ids, repeated)}). "
            "Keep one row per user."
        )
    return UserTable(ids, table.drop(columns=user_column).reset_index(drop=True))
