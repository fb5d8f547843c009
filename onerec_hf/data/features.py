"""
Learns a [`~onerec_hf.modeling.features.FeatureSchema`] from training rows: the kind of each column, its values or the buckets of its numbers.

Pass training rows only: a value that occurs in held-out rows alone is unknown to the model, as it will be for a new one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError
from onerec_hf.data.lists import is_listed, list_lengths
from onerec_hf.data.types import plain_column
from onerec_hf.modeling.features import Feature, value_text

#: Values of a categorical feature that are listed, at most; with more of them all share as many codes by their hash.
MOST_VALUES = 10_000
#: Fewer rows make a value rare: it is unknown, so that the code of unknown values is trained.
FEWEST_ROWS = 2
#: Buckets of a number, at most, and the training values that each of them holds at least.
MOST_BUCKETS, ROWS_PER_BUCKET = 32, 20
#: Values of one row of a multi-valued feature, at most.
MOST_SLOTS = 8
# Whole numbers of so few values are categories, and so are those that fill a range from 0 or 1 without gaps, as codes do.
_FEW, _MOST_CODES, _FILLED = 20, 2_000, 0.9
# A guessed feature covers so many of its rows with values that are not rare.
_COVERED = 0.5
_SEPARATORS = ("|", ";", ",")
_ID = re.compile(r"(^|_)ids?$|[a-z]I[dD]s?$", re.ASCII)


@dataclass(frozen=True)
class Learned:
    """
    A feature, and how its column is read; or why it is left out.

    Args:
        feature: None where the column is left out.
        about: "8 buckets of a number", "constant", ...
    """

    feature: Feature | None
    about: str


def learn_feature(name: str, column: pd.Series, guess: bool = False, derive: str | None = None) -> Learned:
    """
    The feature of a column of training rows.

    Text and booleans are categories, times are numbers. Whole numbers are categories where they are few, codes without gaps or named like ids, and numbers otherwise.
    Lists, and text with one of the separators | ; , whose parts recur, have several values.

    Args:
        name: of the column.
        column: of a table's training rows, one row per user, item or interaction.
        guess: leave out a column whose values are nearly all different, which a named one keeps.
        derive: the numbers were derived of a time.

    Raises:
        DataError: vectors or objects, which are no features.

    Example:
        >>> learn_feature("like", pd.Series([True, False, None, True])).feature.values
        ('1',)
        >>> learn_feature("genres", pd.Series(["Action|War", "War", "Action", "War"])).feature.values
        ('War', 'Action')
        >>> learn_feature("price", pd.Series([0.5, 1.5, 0.5, 9.0])).feature.edges
        (1.5,)
        >>> learn_feature("country", pd.Series(["x", "x"]))
        Learned(feature=None, about='constant')
    """
    derived = derive is not None or pd.api.types.is_datetime64_any_dtype(plain_column(column).dtype)
    column = raw_values(name, column)
    if not column.notna().any():
        return Learned(None, "no value in training rows")
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        why = "" if derived else _whole_category(name, column)
        found = _categories(name, column, None, why, guess) if why else _numbers(name, column, derive)
    elif is_listed(column):
        found = _categories(name, column, None, "lists", guess, listed=True)
    else:
        separator = _separator(column)
        why = f"separated by {separator}" if separator else "flag" if pd.api.types.is_bool_dtype(column.dtype) else ""
        found = _categories(name, column, separator, why, guess)
    if found.feature is not None and len(np.unique(encode_column(found.feature, column), axis=0)) < 2:
        return Learned(None, "constant")
    return found


def raw_values(name: str, column: pd.Series) -> pd.Series:
    """
    A column as features read it: datetimes are seconds since 1970, other types as `plain_column` has them.

    Raises:
        DataError: vectors or objects.

    Example:
        >>> raw_values("since", pd.to_datetime(pd.Series(["1970-01-02"]))).tolist()
        [86400.0]
    """
    column = plain_column(column)
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        moments: Any = column.dt.tz_convert(None) if getattr(column.dtype, "tz", None) is not None else column
        return (moments - pd.Timestamp(0)) / pd.Timedelta(seconds=1)
    if column.dtype == object:
        lengths = list_lengths(column)
        if (lengths >= 0).any() and (lengths[column.notna().to_numpy()] < 0).any():
            raise DataError(f"column {name!r}: lists beside single values. Write a list in each row, or leave it out.")
        for value in column.dropna():
            parts = value if isinstance(value, list | tuple | np.ndarray) else [value]
            if isinstance(value, dict | set) or any(
                isinstance(part, dict | list | tuple | np.ndarray) for part in parts
            ):
                raise DataError(f"column {name!r}: nested values, e.g. {value!r:.80}, are no feature. Leave it out.")
            if any(isinstance(part, float | np.floating) and part % 1 != 0 for part in parts) and parts is value:
                raise DataError(
                    f"column {name!r}: vectors are no feature. Pass those of items as --embeddings, or leave the column out."
                )
    return column


def encode_column(feature: Feature, column: pd.Series) -> np.ndarray:
    """
    (N, slots) int32 codes of a column of `raw_values`; equal values are encoded once.

    Raises:
        DataError: text where training had numbers, or lists where it had single values.

    Example:
        >>> encode_column(Feature("city", values=("Rome",)), pd.Series(["Rome", None, "Oslo", "Rome"])).tolist()
        [[3], [1], [2], [3]]
    """
    try:
        if feature.edges is not None and pd.api.types.is_numeric_dtype(column.dtype):
            return feature.encode(column.to_numpy(dtype=np.float64, na_value=np.nan))
        if is_listed(column):
            return feature.encode(column)
        places, values = pd.factorize(column)
        return feature.encode([*values, None])[places]  # -1: the last one
    except ValueError as error:
        raise DataError(f"column {feature.name!r}: {error}, as in training. Convert the column.") from None


def bucket_edges(numbers: np.ndarray) -> tuple[float, ...]:
    """
    Inner borders of the buckets of numbers: quantiles, and a bucket of its own for a value that fills one. Few distinct numbers have a bucket each.

    Args:
        numbers: (N,) finite float64.

    Example:
        >>> bucket_edges(np.array([3.0, 1.0, 2.0, 2.0] * 50)), bucket_edges(np.array([7.0]))
        ((2.0, 3.0), ())
    """
    buckets = min(MOST_BUCKETS, max(2, len(numbers) // ROWS_PER_BUCKET))
    distinct, counts = np.unique(numbers, return_counts=True)
    if len(distinct) <= buckets:
        return tuple(distinct[1:].tolist())
    at = np.sort(numbers)[np.arange(1, buckets) * len(numbers) // buckets]
    heavy = np.flatnonzero(counts >= len(numbers) / buckets)
    edges = np.unique(np.concatenate([at, distinct[heavy], distinct[heavy[heavy + 1 < len(distinct)] + 1]]))
    return tuple(edges[edges > distinct[0]].tolist())


def _whole_category(name: str, column: pd.Series) -> str:
    """Why numbers are categories; empty where they are quantities."""
    numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
    distinct = np.unique(numbers[np.isfinite(numbers)])
    if not len(distinct) or (distinct % 1 != 0).any():
        return ""
    if len(distinct) <= 2 and set(distinct) <= {0.0, 1.0}:
        return "flag"
    if _ID.search(name):
        return "named like an id"
    if len(distinct) <= _FEW:
        return "few whole numbers"
    is_code = distinct[0] in (0, 1) and distinct[-1] <= _MOST_CODES
    return "codes without gaps" if is_code and len(distinct) >= _FILLED * (distinct[-1] + 1) else ""


def _numbers(name: str, column: pd.Series, derive: str | None) -> Learned:
    numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return Learned(None, "no finite number in training rows")
    edges = bucket_edges(numbers)
    return Learned(Feature(name, edges=edges, derive=derive), f"{len(edges) + 1} buckets of a number")


def _separator(column: pd.Series) -> str | None:
    """What separates several values in one text; None where the parts of texts do not recur in others."""
    texts = [text for text in column.dropna().unique() if isinstance(text, str)]
    for separator in _SEPARATORS:
        if not any(separator in text for text in texts):
            continue
        parts = {part.strip() for text in texts for part in text.split(separator)}
        if len(parts) < len(texts):
            return separator
    return None


def _categories(
    name: str, column: pd.Series, separator: str | None, why: str, guess: bool, listed: bool = False
) -> Learned:
    counts: Counter[str] = Counter()
    longest, cut = 1, 0
    rows = (
        Counter(tuple(value) for value in column if isinstance(value, list | tuple | np.ndarray)) if listed else None
    )
    for value, times in (column.value_counts() if rows is None else rows).items():
        texts = list(dict.fromkeys(_parts(value, separator)))
        longest, cut = max(longest, len(texts)), cut + times * (len(texts) > MOST_SLOTS)
        for text in texts:
            counts[text] += times
    known = sorted((text for text in counts if counts[text] >= FEWEST_ROWS), key=lambda text: (-counts[text], text))
    rare, covered = len(counts) - len(known), sum(counts[text] for text in known) / max(sum(counts.values()), 1)
    if not known:
        return Learned(None, f"each of {len(counts):,} values occurs once")
    if guess and covered < _COVERED:
        return Learned(None, f"most of {len(counts):,} values occur once")
    slots = min(max(longest, 2), MOST_SLOTS) if listed or separator else 1
    about = [f"{len(known):,} values"]
    if rare:
        about.append(f"{rare:,} more that occur once are unknown")
    if len(known) > MOST_VALUES:
        about = [f"{len(counts):,} values share {MOST_VALUES:,} codes by their hash"]
    about += [f"up to {slots} a row"] if slots > 1 else []
    about += [f"{cut:,} rows have more"] if cut else []
    about += [why] if why else []
    how: dict[str, Any] = {"hashes": MOST_VALUES} if len(known) > MOST_VALUES else {"values": tuple(known)}
    return Learned(Feature(name, slots=slots, separator=separator, **how), ", ".join(about))


def _parts(value: Any, separator: str | None) -> list[str]:
    parts = value if isinstance(value, tuple) else (value,)
    if separator is not None and isinstance(value, str):
        parts = tuple(part.strip() for part in value.split(separator))
    return [text for text in map(value_text, parts) if text is not None]


def learn_features(columns: Mapping[str, pd.Series], guess: Collection[str] = ()) -> dict[str, Learned]:
    """
    The features of a table's training rows by column.

    Args:
        columns: of the training rows.
        guess: columns that nobody named: those that are no features are left out, in place of an error.

    Raises:
        DataError: as [`learn_feature`].

    Example:
        >>> learned = learn_features({"age": pd.Series([20.5, 30, 40]), "title": pd.Series(["a", "b", "c"])}, guess={"title"})
        >>> learned["age"].feature.edges, learned["title"].about
        ((30.0,), 'each of 3 values occurs once')
    """
    found = {}
    for name, column in columns.items():
        try:
            found[name] = learn_feature(name, column, name in guess)
        except DataError as error:
            if name not in guess:
                raise
            found[name] = Learned(None, str(error).split(": ", 1)[-1].split(". ")[0])
    return found
