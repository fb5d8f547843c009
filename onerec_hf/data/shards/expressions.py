"""Polars expressions that read ids, times and feedback as `read_interactions` reads them."""

from __future__ import annotations

import math
from typing import Any

from onerec_hf.data.columns import MISSING_TEXT, DataError
from onerec_hf.data.positives import Condition
from onerec_hf.data.times import ISO

_NUMBER = r"^([+-]?)([0-9]+)(?:\.([0-9]*))?$"
_PARTS = r"^([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]+))?)?)?"
_OFFSET = r"[0-9] ?([+-])([0-9]{2}):?([0-9]{2})?$"
_PER_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}


def as_text(column: Any, kind: Any) -> Any:
    """A column of text, categories or bytes as text; None for other types."""
    import polars as pl

    if kind in (pl.String, pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    return column.cast(pl.String, strict=False) if kind == pl.Binary else None


def ids(name: str, kind: Any) -> Any:
    """
    Integers as int64, else text; invalid values become null.

    Raises:
        DataError: a type that holds no ids.
    """
    import polars as pl

    column = pl.col(name)
    if (text := as_text(column, kind)) is not None:
        return text
    if kind.is_integer() or kind == pl.Null:
        return column.cast(pl.Int64, strict=False)
    if kind.is_float():
        bits = 11 if kind == pl.Float16 else 24 if kind == pl.Float32 else 53
        number = column.cast(pl.Float64)
        return (
            pl.when((number.floor() == number) & (number.abs() < 2**bits)).then(number).otherwise(None).cast(pl.Int64)
        )
    if kind.is_decimal():
        whole = column.cast(pl.Int64, strict=False)
        return pl.when(whole == column).then(whole).otherwise(None)
    raise DataError(
        f"column {name!r}: ids must be integers or strings, not {kind}. Is this the right column, and are all ids of one type?"
    )


def times(name: str, kind: Any) -> tuple[Any, Any, Any]:
    """
    The times of a column: whole seconds (or units), the rest, and whether they are dates; null where they are neither finite numbers nor dates.

    Raises:
        DataError: a type that holds no times.
    """
    import polars as pl

    column, nothing, numbers = pl.col(name), pl.lit(0.0), pl.lit(False)
    if kind.is_decimal():
        column, kind = column.cast(pl.String), pl.String()
    if (text := as_text(column, kind)) is not None:
        return _of_text(text.str.strip_chars())
    if kind.is_integer() or kind == pl.Null:
        whole = column.cast(pl.Int64, strict=False)
        return whole, pl.when(whole.is_not_null()).then(nothing), numbers
    if kind.is_float():
        return *_of_number(column.cast(pl.Float64)), numbers
    if isinstance(kind, pl.Duration):
        return column.to_physical(), pl.when(column.is_not_null()).then(nothing), numbers
    if isinstance(kind, pl.Datetime):
        unit = _PER_SECOND[kind.time_unit]
        ticks = column.to_physical()
        return ticks.floordiv(unit), (ticks % unit).cast(pl.Float64) / unit, pl.lit(True)
    if kind == pl.Date:
        whole = column.to_physical().cast(pl.Int64) * 86_400
        return whole, pl.when(whole.is_not_null()).then(nothing), pl.lit(True)
    raise DataError(f"column {name!r}: timestamps must be numbers or datetimes, not {kind}. Is this the right column?")


def _of_number(number: Any) -> tuple[Any, Any]:
    import polars as pl

    number = pl.when(number.abs() < 2.0**63).then(number)
    return number.floor().cast(pl.Int64), number - number.floor()


def _of_text(text: Any) -> tuple[Any, Any, Any]:
    import polars as pl

    # Digit by digit: a float holds neither nanoseconds since 1970 nor fractions of them.
    number = text.cast(pl.Float64, strict=False)
    parts = text.str.extract_groups(_NUMBER)
    digits = (parts.struct[0] + parts.struct[1]).cast(pl.Int64, strict=False)
    rest = (parts.struct[0] + "0." + parts.struct[2].fill_null("") + "0").cast(pl.Float64, strict=False)
    below = rest < 0
    floor, cut = _of_number(number)
    plain = digits.is_not_null() & (number.abs() < 2.0**63)
    whole = pl.when(plain).then(digits - below.cast(pl.Int64)).otherwise(floor)
    rest = pl.when(plain).then(rest + below.cast(pl.Float64)).otherwise(cut)
    dated = text.str.contains(ISO)
    seconds, ticks = _of_date(text)
    return pl.when(dated).then(seconds).otherwise(whole), pl.when(dated).then(ticks).otherwise(rest), dated


def _of_date(text: Any) -> tuple[Any, Any]:
    """Seconds since 1970 of an ISO datetime, and the rest."""
    import polars as pl

    parts, offset = text.str.extract_groups(_PARTS), text.str.extract_groups(_OFFSET)
    hour, minute, second = (parts.struct[place].cast(pl.Int64, strict=False).fill_null(0) for place in (1, 2, 3))
    east = (
        offset.struct[1].cast(pl.Int64, strict=False) * 3600
        + offset.struct[2].cast(pl.Int64, strict=False).fill_null(0) * 60
    )
    # The day of a date alone ends like an offset.
    east = pl.when(parts.struct[1].is_null()).then(None).otherwise(east).fill_null(0)
    east = pl.when(offset.struct[0] == "-").then(-east).otherwise(east)
    day = parts.struct[0].str.to_date("%Y-%m-%d", strict=False).to_physical().cast(pl.Int64)
    valid = (hour < 24) & (minute < 60) & (second < 60)
    seconds = pl.when(valid).then(day * 86_400 + hour * 3600 + minute * 60 + second - east)
    ticks = parts.struct[4].str.slice(0, 9).str.pad_end(9, "0").cast(pl.Float64, strict=False).fill_null(0)
    return seconds, pl.when(seconds.is_not_null()).then(ticks / 10**9)


def without_missing(name: str, text: bool) -> Any:
    """A column with the missing-value markers of text files replaced by null."""
    import polars as pl

    column = pl.col(name)
    return pl.when(column.is_in(MISSING_TEXT)).then(None).otherwise(column) if text else column


def numbers(name: str, kind: Any, text: bool) -> Any:
    """
    (N,) float64; null if not a number.

    Raises:
        DataError: a type that holds no numbers.
    """
    import polars as pl

    strings = as_text(pl.col(name), kind)
    if not (strings is not None or kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
        raise DataError(
            f"column {name!r}: expected numbers, got {kind}. Convert it, or remove it from the positive rule."
        )
    column = without_missing(name, text)
    if strings is not None:
        column = as_text(column, kind).str.strip_chars()
        column = column.replace({"True": "1", "False": "0", "true": "1", "false": "0"}) if text else column
    return column.cast(pl.Float64, strict=False).fill_nan(None)  # polars orders NaN above all numbers


def holds(condition: Condition, kind: Any, text: bool) -> Any:
    """
    Where a comparison is true; null where the column is.

    Raises:
        DataError: a column of another kind than the value.
    """
    import polars as pl

    if condition.is_date:
        whole, rest, _ = times(condition.column, kind)
        value = float(condition.value)
        return condition.operator(2 * whole + (rest > 0).cast(pl.Int64), 2 * math.floor(value) + int(value % 1 != 0))
    if isinstance(condition.value, str):
        column = without_missing(condition.column, text)
        strings = as_text(column, kind)
        return condition.operator(column.cast(pl.String) if strings is None else strings, condition.value)
    return condition.operator(numbers(condition.column, kind, text), condition.value)


def compared(name: str, kind: Any) -> Any:
    """A column as duplicates are compared: categories by their text, since their codes differ between files."""
    import polars as pl

    return pl.col(name).cast(pl.String) if kind in (pl.Categorical, pl.Enum) else pl.col(name)


__all__ = ["as_text", "compared", "holds", "ids", "numbers", "times", "without_missing"]
