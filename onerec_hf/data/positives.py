"""Rules for positive feedback: which interactions enter histories and targets."""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, column_of, require_columns, to_numbers
from onerec_hf.data.times import ISO, instants, seconds_of
from onerec_hf.data.types import plain_column
from onerec_hf.modeling.features import LATEST_SECONDS
from onerec_hf.modeling.files import short

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_RULE = re.compile(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|!=|==|>|<|=)\s*([^<>=!\s][^<>=!]*?)\s*")


class Condition(NamedTuple):
    """
    One comparison of a column.

    Args:
        column, sign: its name, and one of >=, <=, >, <, =, !=.
        value: a number (seconds since 1970 for a date), or a text.
        is_date: whether the value was given as a date.
    """

    column: str
    sign: str
    value: float | str
    is_date: bool = False

    @classmethod
    def parse(cls, rule: str) -> Condition:
        """
        From "column>=number", "column=text" or "column<date".

        Raises:
            DataError: anything else.

        Example:
            >>> Condition.parse("rating > 4"), Condition.parse("day>=1970-01-02").value, Condition.parse("event == buy").value
            (Condition(column='rating', sign='>', value=4.0, is_date=False), 86400.0, 'buy')
        """
        match = _RULE.fullmatch(rule)
        if match is not None:
            column, sign, text = match[1], match[2].replace("==", "="), match[3]
            try:
                value = seconds_of(text)
                if not math.isnan(value):
                    return cls(column, sign, value, is_date=re.match(ISO, text) is not None)
            except ValueError:
                if sign in ("=", "!="):
                    return cls(column, sign, text)
        raise DataError(
            f"positive feedback {rule!r}: expected 'column>=number', e.g. 'rating>=4', 'rating>4', 'day>=2024-01-31' or 'event=purchase'."
        )

    @property
    def operator(self) -> Callable[[Any, Any], Any]:
        """The comparison, also for arrays and polars expressions."""
        return _OPERATORS[self.sign]

    def holds(self, table: pd.DataFrame) -> np.ndarray:
        """
        (N,) bool: rows for which the comparison is true; never where the column is null.

        Raises:
            DataError: a column of another kind than the value.
        """
        series = plain_column(column_of(table, self.column))
        known = series.notna().to_numpy()
        kept = np.zeros(len(table), dtype=bool)
        if self.is_date:
            times = instants(cast("pd.Series", series[known]), self.column)
            if len(times.whole) and times.whole.max() > LATEST_SECONDS:
                raise DataError(
                    f"column {self.column!r} holds numbers that are no seconds since 1970. Compare it with a number, not a date."
                )
            rest = 0 if times.rest is None else times.rest != 0
            value = float(self.value)
            # A fraction of a second is later than the whole one.
            kept[known] = self.operator(2 * times.whole + rest, 2 * math.floor(value) + (value % 1 != 0))
        elif isinstance(self.value, str):
            kept[known] = self.operator(cast("Any", series[known]).astype(str).to_numpy(dtype=object), self.value)
        else:
            values = numeric_column(table, self.column)
            kept = known & self.operator(values, self.value) & ~np.isnan(values)
        return kept

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) and not self.is_date else self.shown
        return f"{self.column} {self.sign} {value}"

    @property
    def shown(self) -> str:
        """The value as `parse` takes it."""
        if self.is_date:
            return datetime.datetime.fromtimestamp(float(self.value), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return repr(self.value).removesuffix(".0") if isinstance(self.value, float) else str(self.value)


@dataclass(frozen=True)
class PositiveFeedback:
    """
    A row is positive if any of the named columns reaches its threshold. Without columns every row is positive.

    The paper's history holds videos "effectively watched or interacted with (likes, follows, shares)" (arXiv 2502.18965, the definition of
    H_u); the matching columns and thresholds depend on the data.

    Args:
        any_of: column -> minimum positive value, or a comparison as text: ">4", "<=3", "=purchase", ">=2024-01-31", or a list of these.
            Null is not positive.

    Example:
        >>> rows = pd.DataFrame({"item_id": [1, 2, 3], "rating": [5, 2, 3], "like": [0, 1, 0], "event": ["view", "view", "buy"]})
        >>> PositiveFeedback({"rating": 4, "like": 1}).apply(rows)["item_id"].tolist()
        [1, 2]
        >>> PositiveFeedback({"rating": ">3", "event": "=buy"}).apply(rows)["item_id"].tolist()
        [1, 3]
    """

    any_of: Mapping[str, float | str | Sequence[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, rules: Iterable[str]) -> PositiveFeedback:
        """
        Parses rules from the command line: "column>=number", also with >, <, <=, = and !=, with ISO dates, and "column=text".

        Raises:
            DataError: malformed rule, or two thresholds for one column.

        Example:
            >>> str(PositiveFeedback.parse(["rating>=4", "like >= 1"]))
            'rating >= 4 or like >= 1'
            >>> str(PositiveFeedback.parse(["event=buy", "event=cart", "rating>4"]))
            'event = buy or event = cart or rating > 4'
        """
        found: dict[str, list[Condition]] = {}
        for condition in map(Condition.parse, rules):
            before = found.setdefault(condition.column, [])
            if before and not all(each.sign == "=" for each in (*before, condition)):
                raise DataError(
                    f"positive feedback: two thresholds for column {condition.column!r}. Keep one of them."
                )
            before.append(condition)
        any_of: dict[str, float | str | Sequence[str]] = {}
        for column, conditions in found.items():
            texts = [f"{each.sign}{each.shown}" for each in conditions]
            [first, *others] = conditions
            simple = first.sign == ">=" and isinstance(first.value, float) and not first.is_date
            any_of[column] = texts if others else first.value if simple else texts[0]
        return cls(any_of)

    @property
    def conditions(self) -> list[Condition]:
        """
        The comparisons.

        Raises:
            DataError: malformed text in `any_of`.
        """
        found = []
        for column, values in self.any_of.items():
            for value in [values] if isinstance(values, str | float | int) else values:
                found.append(
                    Condition(column, *Condition.parse(f"x{value}")[1:])
                    if isinstance(value, str)
                    else Condition(column, ">=", float(value))
                )
        return found

    @property
    def columns(self) -> list[str]:
        """The columns that the rule needs."""
        return list(self.any_of)

    @property
    def rules(self) -> list[str]:
        """
        The rules as `parse` takes them.

        Example:
            >>> PositiveFeedback.parse(["rating >= 3.5", "like>1"]).rules
            ['rating>=3.5', 'like>1']
        """
        return [f"{each.column}{each.sign}{each.shown}" for each in self.conditions]

    def __str__(self) -> str:
        return " or ".join(map(str, self.conditions)) or "every interaction"

    def apply(self, interactions: pd.DataFrame) -> pd.DataFrame:
        """
        The positive rows, in order, renumbered from 0.

        Raises:
            DataError: a named column is missing or not numeric, or no row is positive.

        Example:
            >>> PositiveFeedback().apply(pd.DataFrame({"item_id": [1, 2]})).shape
            (2, 1)
        """
        return interactions.loc[self.holds(interactions)].reset_index(drop=True)

    def holds(self, interactions: pd.DataFrame) -> np.ndarray:
        """
        (N,) bool: the positive rows.

        Raises:
            DataError: as `apply`.

        Example:
            >>> PositiveFeedback({"like": 1}).holds(pd.DataFrame({"like": [1, 0]})).tolist()
            [True, False]
        """
        keep = np.full(len(interactions), not self.any_of)
        if not self.any_of:
            return keep
        require_columns(interactions, self.columns, "positive feedback")
        for condition in self.conditions:
            keep |= condition.holds(interactions)
        if not keep.any():
            seen = ", ".join(_seen(interactions, column) for column in self.columns)
            raise DataError(
                f"positive feedback: none of {len(interactions):,} rows has {self} (found: {seen}). Change the rule."
            )
        return keep


def _seen(table: pd.DataFrame, column: str) -> str:
    """What a column holds, for messages."""
    series = column_of(table, column).dropna()
    if pd.api.types.is_numeric_dtype(series.dtype):
        return f"{column} at most {series.max()}"
    return f"{column} e.g. {short(', '.join(map(str, series.unique()[:3])), 80)}"


# Columns of feedback by their usual names, without case and underscores.
_EVENTS = {
    "event",
    "eventtype",
    "eventname",
    "behavior",
    "behaviour",
    "behaviortype",
    "action",
    "actiontype",
    "interactiontype",
}
_RATINGS = {"rating", "ratings", "overall", "stars"}
_YES = {"click", "clicked", "isclick", "like", "liked", "islike"}


def about_every_row(interactions: pd.DataFrame) -> str:
    """
    A sentence about a column that tells positive interactions from others, for a rule that takes every row; empty without such a column.

    Example:
        >>> rows = pd.DataFrame({"item_id": [1, 2, 3], "event": ["view", "view", "buy"]})
        >>> about_every_row(rows)
        "Every row counts as positive, whatever its 'event' (view 67%, buy 33%): pass --positive 'event=...' to choose."
        >>> about_every_row(pd.DataFrame({"item_id": [1, 2], "rating": [1.0, 5.0]}))
        "Every row counts as positive, whatever its 'rating' (1 to 5): pass --positive 'rating>=...' to choose."
    """
    for column in interactions.columns:
        name = re.sub(r"[\W_]", "", str(column).lower())
        if name not in _EVENTS | _RATINGS | _YES:
            continue
        series = plain_column(column_of(interactions, column)).dropna()
        try:
            kinds = series.nunique()
        except TypeError:  # lists or dictionaries, of which no rule can choose
            continue
        if name in _EVENTS and 1 < kinds <= 20:
            shares: Any = series.value_counts(normalize=True)
            found = ", ".join(f"{short(value, 20)} {share:.0%}" for value, share in shares[:4].items())
            found, rule = found + (", ..." if len(shares) > 4 else ""), "=..."
        elif name in _RATINGS | _YES and pd.api.types.is_numeric_dtype(series.dtype) and kinds > 1:
            found = f"{float(series.min()):g} to {float(series.max()):g}"
            rule = ">=..." if name in _RATINGS else ">=1"
        else:
            continue
        return f"Every row counts as positive, whatever its {column!r} ({found}): pass --positive '{column}{rule}' to choose."
    return ""


def numeric_column(table: pd.DataFrame, column: str) -> np.ndarray:
    """
    (N,) float64 values of a feedback column, NaN where null.

    Raises:
        DataError: the column is not numeric.

    Example:
        >>> numeric_column(pd.DataFrame({"like": [True, False]}), "like").tolist()
        [1.0, 0.0]
    """
    series = plain_column(column_of(table, column))
    if series.dtype == object:  # numbers as text, or beside missing ones
        numbers = to_numbers(series)
        lost = series.notna().to_numpy() & numbers.isna().to_numpy()
        series = series if lost.any() else numbers
    if not pd.api.types.is_numeric_dtype(series.dtype):
        raise DataError(
            f"column {column!r}: expected numbers, got {series.dtype} (first: row 0, {series.iloc[0]!r}). Convert it, e.g. with "
            "pandas.to_numeric."
        )
    return series.to_numpy(dtype=np.float64, na_value=np.nan)
