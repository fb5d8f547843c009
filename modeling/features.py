"""
Features of users, items and interactions (technical report, arXiv 2506.13695, section 2.2): what a column's values become in a model.

A schema turns raw values into codes, small integers per feature: 0 where there is nothing, 1 for a missing value, 2 for a value that training has not
seen, and from 3 on the values, or the quantile buckets, of the training rows. It is saved beside the model, with the codes of the catalogue's items.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

NOTHING, MISSING, UNKNOWN, FIRST = 0, 1, 2, 3
#: The feature of interactions that says whether one was positive.
POSITIVE = "positive"
#: What a time says: seconds since the user's interaction before it, hour and weekday (UTC).
DERIVED = ("gap", "hour", "weekday")
#: The report's pathways of a history's latest interactions: of any feedback, and positive ones. Their places have the codes 1 and 2.
PATHWAYS = ("short_term", "positive")
#: Numbers beyond are times in milliseconds, or finer.
LATEST_SECONDS = 1e11


@dataclass(frozen=True)
class Feature:
    """
    One feature and its values.

    Args:
        name: column of the table, key of a request. With `derive` the feature is named `name_derive`.
        values: of a categorical feature, as text (see [`value_text`]), in order of their codes.
        edges: of a number: ascending inner borders of its buckets; bucket i holds `edges[i - 1] <= value < edges[i]`.
        hashes: of a categorical feature with too many values to list: they share this many codes by their hash.
        slots: most values of one row; more than 1 for lists ("Action|Comedy" with `separator` "|"). Further values are left out.
        separator: splits text into several values.
        derive: the feature is computed of a time: "gap", "hour" or "weekday".

    Example:
        >>> Feature("genres", values=("Action", "Drama"), slots=2, separator="|").encode(["Drama|Action", "Horror", None]).tolist()
        [[4, 3], [2, 0], [1, 0]]
        >>> Feature("age", edges=(18.0, 40.0)).encode([17, 18, float("nan")]).tolist()
        [[3], [4], [1]]
    """

    name: str
    values: tuple[str, ...] | None = None
    edges: tuple[float, ...] | None = None
    hashes: int | None = None
    slots: int = 1
    separator: str | None = None
    derive: str | None = None

    def __post_init__(self):
        if sum(each is not None for each in (self.values, self.edges, self.hashes)) != 1:
            raise ValueError(f"feature {self.name!r}: give exactly one of values, edges and hashes")
        if self.derive not in (None, *DERIVED):
            raise ValueError(f"feature {self.name!r}: derive={self.derive!r}; choose one of {', '.join(DERIVED)}")
        if not (isinstance(self.name, str) and isinstance(self.separator, str | None) and self.separator != ""):
            raise ValueError(f"feature {self.name!r:.80}: name and separator are text")
        if not 1 <= self.slots < 2**15 or (self.hashes is not None and not 1 <= self.hashes < 2**31 - FIRST):
            raise ValueError(f"feature {self.name!r}: slots={self.slots} and hashes={self.hashes} must be at least 1")
        if self.edges is not None and not np.all(np.diff(np.asarray(self.edges, np.float64), prepend=-math.inf) > 0):
            raise ValueError(f"feature {self.name!r}: edges must ascend; got {self.edges!s:.80}")
        if self.values is not None and not all(isinstance(value, str) for value in self.values):
            raise ValueError(f"feature {self.name!r}: values are text; got {self.values!s:.80}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise ValueError(f"feature {self.name!r}: values must be unique; got {self.values!s:.80}")
        object.__setattr__(self, "_codes", {text: code for code, text in enumerate(self.values or (), FIRST)})

    @property
    def key(self) -> str:
        """The feature's own name, unlike that of every other one of its schema."""
        return self.name if self.derive is None else f"{self.name}_{self.derive}"

    @property
    def size(self) -> int:
        """Number of codes."""
        if self.edges is not None:
            return FIRST + len(self.edges) + 1
        return FIRST + (len(self.values) if self.values is not None else self.hashes)  # pyright: ignore[reportOperatorIssue]

    def encode(self, column: Iterable) -> np.ndarray:
        """
        (n, slots) int32 codes of n raw values: text, numbers, booleans, lists of them, or None or NaN where a value is missing.

        Raises:
            ValueError: text where numbers are expected, or a list where one value is.
        """
        # A column of numbers needs no pass in Python.
        plain = isinstance(column, np.ndarray) and column.dtype.kind in "biuf"
        rows = column if plain else list(column)
        codes = np.zeros((len(rows), self.slots), np.int32)
        if self.edges is not None:
            numbers = (
                rows.astype(np.float64) if plain else np.array([self._number(value) for value in rows], np.float64)
            )
            buckets = FIRST + np.searchsorted(np.asarray(self.edges), numbers, side="right")
            codes[:, 0] = np.where(np.isnan(numbers), MISSING, buckets)
            return codes
        known: dict[Any, list[int]] = {}
        for row, value in enumerate(rows):
            hashable = tuple(value) if isinstance(value, list | np.ndarray) else value
            try:
                hash(hashable)
            except TypeError:
                raise ValueError(
                    f"feature {self.key!r}: a value is text, a number or a list of them; got {value!r:.80}"
                ) from None
            found = known.get(hashable) if not isinstance(hashable, float) or hashable == hashable else [MISSING]
            if found is None:
                found = known[hashable] = self._category(hashable)
            codes[row, : len(found)] = found
        return codes

    def _number(self, value) -> float:
        if value is None or value == "":
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"feature {self.key!r} is a number; got {value!r:.80}") from None

    def _category(self, value) -> list[int]:
        parts = value
        if self.separator is not None and isinstance(value, str):
            parts = tuple(part.strip() for part in value.split(self.separator))
        if not isinstance(parts, tuple):
            parts = (parts,)
        elif self.slots == 1 and len(parts) > 1:
            raise ValueError(f"feature {self.key!r} has one value per row; got {list(parts)!r:.80}")
        texts = [text for text in map(value_text, parts) if text is not None]
        return [self._code(text) for text in dict.fromkeys(texts)][: self.slots] or [MISSING]

    def _code(self, text: str) -> int:
        if self.hashes is not None:
            return FIRST + zlib.crc32(text.encode("utf-8", "surrogatepass")) % self.hashes
        return self._codes.get(text, UNKNOWN)  # pyright: ignore[reportAttributeAccessIssue]


def value_text(value) -> str | None:
    """
    A category as text, the same for `1`, `1.0`, `True` and `"1"`; None where it is missing.

    Example:
        >>> [value_text(value) for value in (1, 1.0, True, "1", "blue", float("nan"), None, "")]
        ['1', '1', '1', '1', 'blue', None, None, None]
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    return str(value)


@dataclass(frozen=True)
class FeatureSchema:
    """
    The features that a model reads, in the order of their slots: of users, of interactions, of items.

    A place of the encoder's input is an item of the history, with the codes of its interaction and of the item, or, where users have features, the
    place before the first item, with the codes of the user. `feature_ids` are (users, places, slots) codes: of the user's slots, then of the others;
    a place holds 0 in the slots that are not its own.

    Example:
        >>> schema = FeatureSchema(user=(Feature("age", edges=(30.0,)),), interaction=(Feature("like", values=("0", "1")),))
        >>> schema.slots, schema.encode_users([{"age": 40}, {}]).tolist()
        (2, [[4], [1]])
        >>> schema.encode_interactions([{"like": True}, {"like": None}, {}]).tolist()
        [[4], [1], [1]]
    """

    user: tuple[Feature, ...] = ()
    interaction: tuple[Feature, ...] = ()
    item: tuple[Feature, ...] = ()
    #: Column of interactions that the time features are derived of, in requests as in tables.
    time: str = field(default="time")

    def __post_init__(self):
        keys = [feature.key for feature in self.all]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"a schema has at least one feature, and names of their own; got {keys!s:.200}")

    @property
    def all(self) -> tuple[Feature, ...]:
        """The features of all sides, in the order of their slots."""
        return (*self.user, *self.interaction, *self.item)

    @property
    def user_slots(self) -> int:
        return sum(feature.slots for feature in self.user)

    @property
    def interaction_slots(self) -> int:
        return sum(feature.slots for feature in self.interaction)

    @property
    def item_slots(self) -> int:
        return sum(feature.slots for feature in self.item)

    @property
    def slots(self) -> int:
        return sum(feature.slots for feature in self.all)

    @property
    def static_places(self) -> int:
        """Places before the first item of a history: one where users have features (the report's static pathway), otherwise none."""
        return int(bool(self.user))

    @property
    def not_positive(self) -> list[int] | None:
        """Place among the features of interactions, and code, of `positive`, where histories hold other interactions too; None where they hold none."""
        for place, feature in enumerate(self.interaction):
            if feature.name == POSITIVE and feature.values is not None and "0" in feature.values:
                return [place, FIRST + feature.values.index("0")]
        return None

    def are_positive(self, codes: np.ndarray) -> np.ndarray:
        """
        (n,) bool: which interactions with these codes (n, slots) were positive.

        Example:
            >>> FeatureSchema(interaction=(Feature("positive", values=("1", "0")),)).are_positive(np.array([[3], [4], [1]])).tolist()
            [True, False, True]
        """
        if self.not_positive is None:
            return np.ones(len(codes), bool)
        place, code = self.not_positive
        return codes[:, sum(feature.slots for feature in self.interaction[:place])] != code

    def config(self) -> dict[str, list]:
        """What [`FeaturesConfig`] takes: `[name, codes, slots]` of each feature."""
        return {
            side: [[feature.key, feature.size, feature.slots] for feature in getattr(self, side)]
            for side in ("user", "interaction", "item")
        }

    def encode_users(self, users: Sequence[Mapping[str, Any] | None]) -> np.ndarray:
        """(users, user slots) int32 codes of raw values by column; a feature that a user lacks is missing."""
        return _encoded(self.user, [user or {} for user in users])

    def encode_items(self, items: Sequence[Mapping[str, Any] | None]) -> np.ndarray:
        """(items, item slots) int32 codes of raw values by column."""
        return _encoded(self.item, [item or {} for item in items])

    def encode_interactions(self, history: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """
        (interactions, slots) int32 codes of one user's history, oldest first. Times are seconds since 1970 or ISO 8601 text. Where histories hold
        other interactions too, one that does not say whether it was `positive` was.

        Raises:
            ValueError: a time that is neither.
        """
        if self.not_positive is not None:
            history = [
                event if value_text(event.get(POSITIVE)) is not None else {**event, POSITIVE: True}
                for event in history
            ]
        if not any(feature.derive for feature in self.interaction):
            return _encoded(self.interaction, history)
        times = np.array([seconds_of(event.get(self.time)) for event in history], np.float64)
        derived = time_values(times, np.arange(len(times)) == 0)
        rows = [
            {**event, **{(self.time, name): float(derived[name][place]) for name in DERIVED}}
            for place, event in enumerate(history)
        ]
        return _encoded(self.interaction, rows)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FeatureSchema:
        """
        Raises:
            ValueError: no schema.
        """
        try:
            read = json.loads(text)
            sides = {
                side: tuple(Feature(**{**each, **_tuples(each)}) for each in read[side])
                for side in ("user", "interaction", "item")
            }
            return cls(**sides, time=str(read["time"]))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"no feature schema: {error!r:.200}") from error


def check_pathways(pathways: Mapping[str, Any], not_positive: Sequence[int] | None) -> None:
    """
    Raises:
        ValueError: other pathways than [`PATHWAYS`], a size below 1, or no feature that tells positive interactions from others.

    Example:
        >>> check_pathways({"short_term": 20}, [0, 4])
        Traceback (most recent call last):
        ...
        ValueError: pathways {'short_term': 20}: give the latest interactions of each of short_term, positive, at least 1
    """
    whole = isinstance(pathways, Mapping) and set(pathways) == set(PATHWAYS)
    if not whole or not all(type(size) is int and 1 <= size < 2**31 for size in pathways.values()):
        raise ValueError(
            f"pathways {pathways!s:.80}: give the latest interactions of each of {', '.join(PATHWAYS)}, at least 1"
        )
    if not_positive is None:
        raise ValueError('pathways need histories of all feedback: load the data with history_feedback="all"')


def check_codes(codes: np.ndarray, features: Sequence[Feature], what: str) -> None:
    """
    Raises:
        ValueError: codes (n, slots) that a feature does not have: they are of another schema.

    Example:
        >>> check_codes(np.array([[9]]), [Feature("like", values=("0", "1"))], "history_features")
        Traceback (most recent call last):
        ...
        ValueError: history_features hold codes of 'like' up to 9, the schema has 0 to 4: they are of another one; prepare the data again
    """
    if not codes.size:
        return
    least, most = codes.min(0), codes.max(0)
    slot = 0
    for feature in features:
        low, high = int(least[slot : slot + feature.slots].min()), int(most[slot : slot + feature.slots].max())
        if low < 0 or high >= feature.size:
            raise ValueError(
                f"{what} hold codes of {feature.key!r} {f'down to {low}' if low < 0 else f'up to {high}'}, the schema has 0 to {feature.size - 1}: they are "
                "of another one; prepare the data again"
            )
        slot += feature.slots


def time_values(seconds: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """
    What the times of interactions say, (n,) float64 each, NaN where a time is missing.

    Args:
        seconds: (n,) seconds since 1970, a user's interactions in order, one user after another.
        first: (n,) whether an interaction is its user's first: it has no gap.

    Example:
        >>> values = time_values(np.array([0.0, 3600.0, 90000.0]), np.array([True, False, False]))
        >>> {name: column.tolist() for name, column in values.items()}  # 1970-01-01 was a Thursday
        {'gap': [nan, 3600.0, 86400.0], 'hour': [0.0, 1.0, 1.0], 'weekday': [3.0, 3.0, 4.0]}
    """
    gap = np.diff(seconds, prepend=np.nan)
    gap[first] = np.nan
    # A clock that was set back is no negative time.
    return {
        "gap": np.maximum(gap, 0.0),
        "hour": np.floor(seconds / 3600) % 24,
        "weekday": (np.floor(seconds / 86400) + 3) % 7,
    }


def in_seconds(times: np.ndarray) -> np.ndarray:
    """
    (n,) float64 seconds of times in one unit, which is seconds, milliseconds or finer.

    Example:
        >>> in_seconds(np.array([0, 1_700_000_000_000])).tolist()
        [0.0, 1700000000.0]
    """
    seconds = times.astype(np.float64)
    while len(seconds) and seconds.max() > LATEST_SECONDS:
        seconds = seconds / 1000
    return seconds


def seconds_of(time) -> float:
    """
    Seconds since 1970 of a number of seconds (milliseconds or finer beyond 10^11, as in tables), an ISO 8601 text (UTC where it names no zone) or a datetime; NaN for None, NaN and infinity.

    Raises:
        ValueError: something else.

    Example:
        >>> [seconds_of(time) for time in (5, "1970-01-01T00:01", None)]
        [5.0, 60.0, nan]
    """
    if time is None:
        return math.nan
    try:
        if isinstance(time, str):
            time = datetime.fromisoformat(time)
        if isinstance(time, datetime):
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        seconds = float(time)
        return float(in_seconds(np.array([seconds]))[0]) if math.isfinite(seconds) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a time is seconds since 1970 or ISO 8601 text; got {time!r:.80}") from None


def _encoded(features: Sequence[Feature], rows: Sequence[Mapping[Any, Any]]) -> np.ndarray:
    columns = [
        feature.encode(
            row.get(feature.name if feature.derive is None else (feature.name, feature.derive)) for row in rows
        )
        for feature in features
    ]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0), np.int32)


def _tuples(read: dict) -> dict:
    return {name: tuple(read[name]) for name in ("values", "edges") if read.get(name) is not None}
