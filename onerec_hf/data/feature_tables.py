"""The columns that features are made of, in tables of users, interactions and items, and their codes in sequences."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, column_of, require_columns
from onerec_hf.data.duplicates import ROW_NUMBERS
from onerec_hf.data.events import Events
from onerec_hf.data.features import Learned, encode_column, learn_feature, learn_features, raw_values
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.times import FRACTION
from onerec_hf.modeling.features import DERIVED, MISSING, POSITIVE, UNKNOWN, Feature, FeatureSchema

if TYPE_CHECKING:
    from onerec_hf.data.interactions import ItemTable
    from onerec_hf.data.users import UserTable

#: In place of column names: guess them from the data.
AUTO = "auto"
#: The feature of interactions that stands for their times.
TIME = "time"
#: Training rows that a schema is learned from; of more, those of a share of the users.
MOST_ROWS = 2_000_000
_SIDES = ("user", "interaction", "item")
_IDS = {
    "user": ("user_id", "item_id"),
    "interaction": ("user_id", "item_id", "session_id", "timestamp"),
    "item": ("user_id", "item_id"),
}


@dataclass(frozen=True, eq=False)
class DatasetFeatures:
    """
    The features of a dataset.

    Args:
        schema: what values became which codes, learned from training rows.
        items: (items, item slots) int32 codes, in the order of the dataset's `item_ids`.

    Example:
        >>> DatasetFeatures(FeatureSchema(item=(Feature("year", edges=(2000.0,)),)), np.array([[3], [4]], np.int32)).schema.slots
        1
    """

    schema: FeatureSchema
    items: np.ndarray


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """
    Training rows of some users.

    Args:
        user_ids, item_ids: that occur in them, each once.
        columns: of the rows, by name; those that are derived of times by ("time", "gap") and so on.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    columns: Mapping[Any, pd.Series]


@dataclass(frozen=True, eq=False)
class FeatureTables:
    """
    Tables with the columns that features are made of.

    Args:
        interactions: tables of all interactions, sorted by user and time: of training, and those of given targets.
        positive: (rows,) bool of each table.
        users, items: None where there is no such table.
        names: by side ("user", "interaction", "item") the columns that are features; ["auto"] guesses them. "time" of interactions is their time.
        everything: histories hold the interactions that are not positive too.
        schema: of a saved model; None to learn one.

    Raises:
        ValueError: features of a table that is not there, or of ids.
        DataError: a column that a table lacks.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "timestamp": [0, 10, 20, 30], "like": [1, 0, 1, 1]})
        >>> tables = FeatureTables([rows], [np.ones(4, bool)], names={"interaction": ["like"]})
        >>> sequences, _ = tables.coded(tables.sequences()[0], np.array([True, True, True, False]))
        >>> sequences.events.codes.tolist()  # the one 0 is rare, and so unknown
        [[3], [2], [3], [3]]
    """

    interactions: Sequence[pd.DataFrame]
    positive: Sequence[np.ndarray]
    users: UserTable | None = None
    items: ItemTable | None = None
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    everything: bool = False
    schema: FeatureSchema | None = None

    def __post_init__(self):
        if self.schema is not None:
            of_schema = {side: columns_of(self.schema, side) for side in _SIDES}
            object.__setattr__(self, "names", of_schema)
        for side in _SIDES:
            names, table = list(self.names.get(side) or ()), self._table(side)
            if names and table is None:
                raise ValueError(f"--{side}_features {' '.join(names)}: pass --{side}s, the table with these columns")
            wanted = [] if names == [AUTO] else [name for name in names if side != "interaction" or name != TIME]
            for name in wanted:
                if name in _IDS[side]:
                    raise ValueError(
                        f"--{side}_features {name}: "
                        + ("write time for the times" if name == "timestamp" else "an id is no feature; leave it out")
                    )
                if side == "interaction" and name == POSITIVE:
                    raise ValueError(f"--interaction_features {name}: this name is taken; rename the column")
            if len(set(names)) < len(names):
                raise ValueError(f"--{side}_features {' '.join(names)}: name each column once")
            if table is not None:
                require_columns(table, wanted, f"--{side}_features")

    def _table(self, side: str) -> pd.DataFrame | None:
        if side == "interaction":
            return self.interactions[0]
        table = self.users if side == "user" else self.items
        return None if table is None else table.frame

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(table) for table in self.interactions]

    def _joined(self, name: str) -> pd.Series:
        """A column of all interactions."""
        if name == POSITIVE and (self.everything or self.schema is not None):
            return pd.Series(np.concatenate(self.positive))
        for table in self.interactions[1:]:
            require_columns(table, [name], "--interaction_features")
        return pd.concat([column_of(table, name) for table in self.interactions], ignore_index=True)

    @cached_property
    def events(self) -> Events:
        """All interactions, without codes."""
        ids = {
            name: pd.concat([table[name] for table in self.interactions]).to_numpy() for name in ("user_id", "item_id")
        }
        times = np.concatenate([table["timestamp"].to_numpy(np.int64) for table in self.interactions])
        read = ~np.concatenate(self.positive) if self.everything else None
        ties = np.cumsum(~np.concatenate([_tied(table) for table in self.interactions]))
        return Events(ids["user_id"], ids["item_id"], times, np.arange(len(times)), read, ties=ties)

    def sequences(self) -> list[UserSequences]:
        """The positive interactions of each table."""
        starts = np.cumsum([0, *self._lengths])
        return [
            UserSequences.from_interactions(table.loc[kept], start + np.flatnonzero(kept), self.events)
            for table, kept, start in zip(self.interactions, self.positive, starts, strict=False)
        ]

    def of_table(self, number: int) -> np.ndarray:
        """(N,) bool, the interactions of one of the tables."""
        return np.repeat(np.arange(len(self._lengths)), self._lengths) == number

    def coded(self, sequences: UserSequences, training: np.ndarray) -> tuple[UserSequences, str]:
        """
        The sequences with codes of users and interactions, and what is said of them.

        Args:
            sequences: what is kept, without codes.
            training: (N,) bool: the interactions that a schema is learned from, of those that the sequences' histories hold.

        Raises:
            ValueError: two features of one name, or no feature of a kind that columns are of.
        """
        schema, said = self.schema, []
        if self.users is not None and self.names.get("user"):
            said = told_lacking(int((self.users.rows_of(sequences.user_ids) < 0).sum()), len(sequences))
        if schema is None:
            learned = self.learn([self.training_rows(sequences, training, len(sequences.item_ids))])
            said += told(learned)
            if (schema := schema_of(learned)) is None:
                return sequences, "\n".join(said)
        coded = self.encoded(sequences, schema, self.user_codes(schema))
        if self.schema is not None:
            said += _counted(schema, coded)
        return coded, "\n".join(said)

    def encoded(
        self, sequences: UserSequences, schema: FeatureSchema, users: tuple[np.ndarray, np.ndarray] | None
    ) -> UserSequences:
        """
        The sequences with the codes of a schema.

        Args:
            users: from `user_codes`.
        """
        assert sequences.events is not None
        codes, slot = np.zeros((len(sequences.events.order), schema.interaction_slots), np.int32), 0
        for feature in schema.interaction:
            if feature.derive is None:
                column = raw_values(feature.name, self._joined(feature.name))
                codes[:, slot : slot + feature.slots] = encode_column(feature, column)
            slot += feature.slots
        return replace(sequences, events=replace(sequences.events, schema=schema, codes=codes, users=users))

    def user_codes(self, schema: FeatureSchema) -> tuple[np.ndarray, np.ndarray] | None:
        """(U,) ids of the users table and (U, user slots) int32 codes; None without features of users."""
        if self.users is None or not schema.user:
            return None
        return self.users.user_ids, _table_codes(schema.user, self.users.frame)

    def training_rows(self, sequences: UserSequences, training: np.ndarray, kept: int) -> TrainingRows:
        """
        What a schema is learned from: the training rows that histories hold, beyond `MOST_ROWS` of them those of a share of the users.

        Args:
            sequences, training: as of `coded`.
            kept: number of all positive interactions that are kept.
        """
        read = sequences.histories
        assert read.rows is not None
        assert sequences.events is not None
        within = training[read.rows]
        if (parts := -(-kept // MOST_ROWS)) > 1:
            chosen = np.array(
                [zlib.crc32(str(user).encode()) % parts == 0 for user in sequences.user_ids.tolist()], bool
            )
            within &= np.repeat(chosen, np.diff(read.offsets))
        rows = read.rows[within]
        columns: dict[Any, pd.Series] = {
            name: self._joined(name).iloc[rows].reset_index(drop=True)
            for name in self._names("interaction")[0]
            if name != TIME
        }
        if TIME in self._names("interaction")[0]:
            times = read.time_columns(sequences.events.seconds).items()
            columns |= {(TIME, name): pd.Series(values[within]) for name, values in times}
        return TrainingRows(
            pd.unique(sequences.events.user_ids[rows]), pd.unique(sequences.events.item_ids[rows]), columns
        )

    def _names(self, side: str) -> tuple[list[str], bool]:
        """The columns of a side, and whether they are guessed; the time last."""
        names, table = list(self.names.get(side) or ()), self._table(side)
        guess = names == [AUTO]
        if guess and table is not None:
            others = {*_IDS[side], TIME, POSITIVE, FRACTION} if side == "interaction" else {*_IDS[side]}
            others |= {"text"} if side == "item" else set()
            others |= set(self._not_everywhere()) if side == "interaction" else set()
            named = [name for name in table.columns if isinstance(name, str)]  # an array's are numbers
            names = [name for name in named if name not in others and not ROW_NUMBERS.fullmatch(name)]
            names += [TIME] if side == "interaction" else []
        if side == "interaction" and self.everything:
            names.append(POSITIVE)
        return [
            *(name for name in names if side != "interaction" or name != TIME),
            *([TIME] if side == "interaction" and TIME in names else []),
        ], guess

    def _not_everywhere(self) -> list[str]:
        """Columns of the interactions that a table of given targets lacks."""
        first, *others = self.interactions
        names = [name for name in first.columns if any(name not in table.columns for table in others)]
        return [name for name in names if isinstance(name, str) and name not in (*_IDS["interaction"], FRACTION)]

    def learn(self, parts: Sequence[TrainingRows]) -> dict[str, dict[str, Learned]]:
        """What each column becomes, by side and name; the features of the time are named `time_gap`, `time_hour` and `time_weekday`."""
        found: dict[str, dict[str, Learned]] = {}
        users, items = (_unique_ids([getattr(part, name) for part in parts]) for name in ("user_ids", "item_ids"))
        for side in _SIDES:
            names, guess = self._names(side)
            columns: dict[str, pd.Series] = {}
            if side == "interaction":
                columns = {
                    name: pd.concat([part.columns[name] for part in parts], ignore_index=True)
                    for name in names
                    if name != TIME
                }
            elif names:
                table = self.users if side == "user" else self.items
                assert table is not None
                rows = table.rows_of(users if side == "user" else items)
                columns = {name: column_of(table.frame, name).iloc[rows[rows >= 0]] for name in names}
            found[side] = learn_features(columns, columns if guess else ())
            if side == "interaction" and guess:
                found[side] |= {name: Learned(None, "not in every table") for name in self._not_everywhere()}
            if side == "interaction" and TIME in names:
                for name in DERIVED:
                    values = pd.concat([part.columns[TIME, name] for part in parts], ignore_index=True)
                    found[side][f"{TIME}_{name}"] = learn_feature(TIME, values, derive=name)
            _unique(found, side, guess)
        return found

    def item_codes(self, schema: FeatureSchema, item_ids: np.ndarray) -> np.ndarray:
        """(items, item slots) int32 codes."""
        if self.items is None:
            return schema.encode_items([None] * len(item_ids))
        codes = _table_codes(schema.item, self.items.frame)
        return np.concatenate([codes, schema.encode_items([None])])[self.items.rows_of(item_ids)]


def _tied(table: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: whether a row of a sorted table has the user and the time of the one before it, fractions included."""
    names = [name for name in ("user_id", "timestamp", FRACTION) if name in table.columns]
    return np.logical_and.reduce([table[name].eq(table[name].shift()).to_numpy(dtype=bool) for name in names])


def columns_of(schema: FeatureSchema, side: str) -> list[str]:
    """
    The columns of one side's features, in order; "time" for those that are derived of it.

    Example:
        >>> columns_of(FeatureSchema(interaction=(Feature("time", edges=(1.0,), derive="gap"),)), "interaction")
        ['time']
    """
    names = [feature.name for feature in getattr(schema, side)]
    return [name for name in dict.fromkeys(names) if (side, name) != ("interaction", POSITIVE)]


def _unique_ids(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else pd.unique(np.concatenate(parts))


def _table_codes(features: Sequence[Feature], frame: pd.DataFrame) -> np.ndarray:
    columns = [
        encode_column(feature, raw_values(feature.name, column_of(frame, feature.name))) for feature in features
    ]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(frame), 0), np.int32)


def schema_of(learned: Mapping[str, Mapping[str, Learned]]) -> FeatureSchema | None:
    """The schema of what `FeatureTables.learn` found; None where every column is left out."""
    sides: dict[str, Any] = {
        side: tuple(each.feature for each in columns.values() if each.feature is not None)
        for side, columns in learned.items()
    }
    return FeatureSchema(**sides) if any(sides.values()) else None


def told(learned: Mapping[str, Mapping[str, Learned]]) -> list[str]:
    """A line for each side: how its columns are read, and which are left out, and why."""
    return [_told(side, columns) for side, columns in learned.items() if columns]


def about_features(schema: FeatureSchema | None, everything: bool) -> str:
    """
    What the protocol says about features; empty without any.

    Example:
        >>> about_features(FeatureSchema(user=(Feature("age", edges=(30.0,)),)), everything=False)
        ' Features, learned from training rows: of users age.'
    """
    if schema is None:
        return ""
    named = {side: columns_of(schema, side) for side in ("user", "item", "interaction")}
    parts = [f"of {side}s {', '.join(names)}" for side, names in named.items() if names]
    if everything:
        parts.append("histories hold all interactions, which a feature tells from the positive ones")
    return f" Features, learned from training rows: {'; '.join(parts)}."


def told_lacking(lacking: int, users: int, option: str = "--users") -> list[str]:
    """
    What is said of users without a row in the users table.

    Raises:
        DataError: none has one.
    """
    if lacking == users:
        raise DataError(
            f"{option}: none of {users:,} users of the interactions has a row. Pass the table of these users."
        )
    return [f"{lacking:,} of {users:,} users have no row in {option}: their features are missing."] if lacking else []


def _unique(found: dict[str, dict[str, Learned]], side: str, guess: bool) -> None:
    """Each feature has a name of its own; a guessed one yields."""
    before = {name: other for other in found if other != side for name, each in found[other].items() if each.feature}
    for name, each in found[side].items():
        if each.feature is not None and name in before:
            if not guess:
                raise ValueError(
                    f"--{side}_features {name}: a feature of {before[name]}s has this name; rename the column in one table"
                )
            found[side][name] = Learned(None, f"a feature of {before[name]}s has this name")


def _told(side: str, columns: Mapping[str, Learned]) -> str:
    kept = [f"{name} ({each.about})" for name, each in columns.items() if each.feature is not None]
    left_out = [f"{name} ({each.about})" for name, each in columns.items() if each.feature is None]
    parts = ([", ".join(kept)] if kept else []) + ([f"left out: {', '.join(left_out)}"] if left_out else [])
    return f"Features of {side}s: {'; '.join(parts)}."


def _counted(schema: FeatureSchema, sequences: UserSequences) -> list[str]:
    """Missing and unknown values of users and interactions, in the codes of a saved schema."""
    read, said = sequences.histories, []
    for side, codes in (("user", read.users), ("interaction", read.codes)):
        counts, slot = [], 0
        if codes is None:
            continue
        for feature in getattr(schema, side):
            mine, slot = codes[:, slot : slot + feature.slots], slot + feature.slots
            if feature.derive is not None:
                continue
            missing, unknown = int((mine == MISSING).any(1).sum()), int((mine == UNKNOWN).any(1).sum())
            numbers = [f"{count:,} {what}" for count, what in ((missing, "missing"), (unknown, "unknown")) if count]
            counts += [f"{feature.key} {' and '.join(numbers)}"] if numbers else []
        if counts:
            said.append(f"Features of {len(codes):,} {side}s: {', '.join(counts)}.")
    return said
