"""Times of interactions: numbers, datetimes or text of either, as whole seconds (or units) and an exact rest to sort by."""

from __future__ import annotations

import datetime
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, first, to_numbers
from onerec_hf.data.types import plain_column

# An ISO 8601 date or datetime, as written by pandas, polars, SQL and JSON.
ISO = r"^\s*[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?)?\s*$"
NUMBER = r"^\s*([+-]?)([0-9]+)(?:\.([0-9]*))?\s*$"
#: The column of `read_interactions` with what was cut from its times.
FRACTION = "timestamp_fraction"
#: Attribute of a table: False where its timestamps are places, and not times.
TIMED = "timed"
FIX = "Use numbers (seconds since 1970), ISO dates (2024-01-31T12:00:00) or pandas.to_datetime(column)."
BAD = "timestamps are neither finite numbers nor datetimes"


class Instants(NamedTuple):
    """
    N times, exactly.

    Args:
        whole: (N,) int64, rounded down: seconds since 1970 UTC for datetimes, numbers as given.
        rest: (N,) float64 in [0, 1): what was cut. None where nothing was.
    """

    whole: np.ndarray
    rest: np.ndarray | None


def instants(series: pd.Series, column: str) -> Instants:
    """
    The times of a column of `plain_columns`. Datetimes without a zone are UTC.

    Raises:
        DataError: times that are null, not finite, neither numbers nor dates, or a mix of both.

    Warns:
        UserWarning: floats of 16 or 32 bits that are too narrow for these times (with the width of a step).

    Example:
        >>> instants(pd.Series(["2024-01-31", "2024-01-31T01:00:00+01:00"]), "timestamp").whole.tolist()
        [1706659200, 1706659200]
        >>> instants(pd.Series([7.5, 2.0]), "timestamp")
        Instants(whole=array([7, 2]), rest=array([0.5, 0. ]))
    """
    series = plain_column(series)
    if pd.api.types.is_bool_dtype(series.dtype):
        raise DataError(f"column {column!r}: timestamps are booleans. Is this the right column? {FIX}")
    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        bad = series.isna().to_numpy()
        found = None if bad.any() else _of_datetimes(series)
    elif series.dtype == object and pd.api.types.infer_dtype(series, skipna=True) not in ("integer", "floating"):
        found, bad = _of_texts(series, column)
    else:
        found, bad = _of_numbers(series)
    if bad.any():
        raise DataError(
            f"column {column!r}: {bad.sum():,} of {len(series):,} {BAD} (first: {first(series, bad)}). {FIX}"
        )
    assert found is not None
    if isinstance(series.dtype, np.dtype) and series.dtype in (np.float16, np.float32):
        warn_narrow(column, str(series.dtype), float(np.abs(found.whole).max()))
    return found


def warn_narrow(column: str, kind: str, highest: float) -> None:
    """
    Warns of times up to `highest` that are held in floats of 16 or 32 bits, whose steps are wider than 1 there.

    Example:
        >>> warn_narrow("timestamp", "float32", 1000.0)
    """
    step = float(np.spacing(np.dtype(kind).type(highest)))
    if not np.isfinite(step) or step > 1:
        held = f"only to {step:,.0f}" if np.isfinite(step) else "not at all"
        warnings.warn(
            f"column {column!r}: its type {kind} holds times of {highest:,.0f} {held}; nearer times are equal, in the order of the rows. "
            "Write the column as int64 or float64."
        )


def _of_datetimes(series: pd.Series) -> Instants:
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert(None)
    values = series.to_numpy()
    unit = np.datetime_data(values.dtype)[0]
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    whole, rest = np.divmod(values.astype(np.int64), per_second)
    return Instants(whole, rest / per_second if rest.any() else None)


def _of_numbers(series: pd.Series) -> tuple[Instants | None, np.ndarray]:
    parsed: Any = to_numbers(series)
    numbers = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~(np.abs(numbers) < 2.0**63)
    if bad.any():
        return None, bad
    if pd.api.types.is_integer_dtype(parsed.dtype):
        return Instants(parsed.to_numpy(dtype=np.int64), None), bad
    whole = np.floor(numbers)
    rest = numbers - whole
    return Instants(whole.astype(np.int64), rest if rest.any() else None), bad


def _of_texts(series: pd.Series, column: str) -> tuple[Instants | None, np.ndarray]:
    """Texts are read digit by digit: a float holds neither nanoseconds since 1970 nor fractions of them."""
    missing = series.isna().to_numpy()
    texts = series.map(str).astype(object).where(~missing, None)
    dates = texts.str.match(ISO, na=False).to_numpy(dtype=bool)
    if dates.any():
        numbers = ~dates & to_numbers(texts).notna().to_numpy()
        if numbers.any():
            raise DataError(
                f"column {column!r}: {numbers.sum():,} of {len(texts):,} timestamps are numbers and the others dates (first: "
                f"{first(series, numbers)}). Write all of them alike."
            )
        parsed = pd.to_datetime(_clean_iso(texts.where(dates)), format="ISO8601", utc=True, errors="coerce")
        bad = parsed.isna().to_numpy()
        return (None if bad.any() else _of_datetimes(parsed)), bad
    parsed = to_numbers(texts)
    if pd.api.types.is_integer_dtype(parsed.dtype):
        return _of_numbers(parsed)
    parts = texts.str.extract(NUMBER)
    numbers = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = missing | ~(np.abs(numbers) < 2.0**63)
    if bad.any():
        return None, bad
    whole, rest = np.floor(numbers), numbers - np.floor(numbers)
    whole = whole.astype(np.int64)
    plain = parts[1].notna().to_numpy()
    exact = [
        (int(sign + digits), float(f"{sign}0.{rest or 0}"))
        for sign, digits, rest in parts[plain].fillna("").to_numpy()
    ]
    if exact:
        wholes, rests = (np.array(part) for part in zip(*exact, strict=True))
        below = rests < 0
        whole[plain], rest[plain] = wholes - below, rests + below
    return Instants(whole, rest if rest.any() else None), bad


def _clean_iso(texts: pd.Series) -> pd.Series:
    """As pandas reads it: a point before fractions, an offset without a blank."""
    return (
        texts.str.strip()
        .str.replace(",", ".")
        .str.replace(r" ?UTC$", "Z", regex=True)
        .str.replace(r" (?=[Z+-])", "", regex=True)
    )


def seconds_of(text: str) -> float:
    """
    Seconds since 1970 of an ISO date or datetime, UTC where no zone is given; numbers are taken as they are.

    Raises:
        ValueError: neither of them.

    Example:
        >>> seconds_of("2024-01-31"), seconds_of("2024-01-31T01:00:00+01:00"), seconds_of("1706659200")
        (1706659200.0, 1706659200.0, 1706659200.0)
    """
    if not re.match(ISO, text):
        return float(text)
    moment = datetime.datetime.fromisoformat(_clean_iso(pd.Series([text])).iloc[0])
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
