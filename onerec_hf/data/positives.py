"""Rules for positive feedback: which interactions enter histories and targets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, column_of, require_columns


@dataclass(frozen=True)
class PositiveFeedback:
    """
    A row is positive if any of the named columns reaches its threshold. Without columns every row is positive.

    The paper's history holds videos "effectively watched or interacted with (likes, follows, shares)" (arXiv 2502.18965, the definition of
    H_u); the matching columns and thresholds depend on the data.

    Args:
        any_of: column -> minimum positive value. Null is not positive.

    Example:
        >>> rows = pd.DataFrame({"item_id": [1, 2, 3], "rating": [5, 2, 3], "like": [0, 1, 0]})
        >>> PositiveFeedback({"rating": 4, "like": 1}).apply(rows)["item_id"].tolist()
        [1, 2]
    """

    any_of: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, rules: Iterable[str]) -> PositiveFeedback:
        """
        Parses "column>=number" rules from the command line.

        Raises:
            DataError: malformed rule, or two rules for one column.

        Example:
            >>> str(PositiveFeedback.parse(["rating>=4", "like >= 1"]))
            'rating >= 4 or like >= 1'
        """
        any_of: dict[str, float] = {}
        for rule in rules:
            match = re.fullmatch(r"\s*([^<>=]*[^<>=\s])\s*>=\s*([^<>=\s]+)\s*", rule)
            try:
                threshold = float(match[2]) if match else math.nan
            except ValueError:
                threshold = math.nan
            if match is None or math.isnan(threshold):
                raise DataError(f"positive feedback {rule!r}: expected 'column>=number', e.g. 'rating>=4'.")
            if match[1] in any_of:
                raise DataError(f"positive feedback: two thresholds for column {match[1]!r}. Keep one of them.")
            any_of[match[1]] = threshold
        return cls(any_of)

    @property
    def rules(self) -> list[str]:
        """
        The rules as `parse` takes them.

        Example:
            >>> PositiveFeedback.parse(["rating >= 3.5", "like>=1"]).rules
            ['rating>=3.5', 'like>=1']
        """
        return [f"{column}>={float(value)!r}".removesuffix(".0") for column, value in self.any_of.items()]

    def __str__(self) -> str:
        return " or ".join(f"{column} >= {value:g}" for column, value in self.any_of.items()) or "every interaction"

    def apply(self, interactions: pd.DataFrame) -> pd.DataFrame:
        """
        The positive rows, in order, renumbered from 0.

        Raises:
            DataError: a named column is missing or not numeric, or no row is positive.

        Example:
            >>> PositiveFeedback().apply(pd.DataFrame({"item_id": [1, 2]})).shape
            (2, 1)
        """
        if not self.any_of:
            return interactions.reset_index(drop=True)
        require_columns(interactions, list(self.any_of), "positive feedback")
        keep = np.zeros(len(interactions), dtype=bool)
        for column, threshold in self.any_of.items():
            keep |= numeric_column(interactions, column) >= threshold
        if not keep.any():
            seen = ", ".join(f"{column} at most {interactions[column].max()}" for column in self.any_of)
            raise DataError(
                f"positive feedback: none of {len(interactions):,} rows has {self} (found: {seen}). Lower a threshold."
            )
        return interactions.loc[keep].reset_index(drop=True)


def numeric_column(table: pd.DataFrame, column: str) -> np.ndarray:
    """
    (N,) float64 values of a feedback column, NaN where null.

    Raises:
        DataError: the column is not numeric.

    Example:
        >>> numeric_column(pd.DataFrame({"like": [True, False]}), "like").tolist()
        [1.0, 0.0]
    """
    series = column_of(table, column)
    if not pd.api.types.is_numeric_dtype(series.dtype):
        raise DataError(
            f"column {column!r}: expected numbers, got {series.dtype} (first: row 0, {series.iloc[0]!r}). Convert it, e.g. with "
            "pandas.to_numeric."
        )
    return series.to_numpy(dtype=np.float64, na_value=np.nan)
