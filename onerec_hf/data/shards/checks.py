"""What the rows of a log are found to be while they are read: counts, types of texts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onerec_hf.data.shards.features import TextKinds
from onerec_hf.data.shards.numbering import DistinctValues


@dataclass
class Checks:
    """
    Statistics and errors of the rows read so far.

    Args:
        rows: number of rows.
        left_out: number of rows without any value, or without items; they are not among `rows`.
        positive: number of positive rows.
        integers: for "user" and "item", whether all values that are text are integers.
        floats: whether all of them are integers written as floats ("7.0").
        dates: number of times that are dates.
        latest: the largest absolute time.
        highest: the largest value of each feedback column.
        bad: (column, problem) -> number of rows, first row.
        kinds: what the texts of each feature are.
        numbering: whether columns differ in every row, of those that do in the first ones.
    """

    rows: int = 0
    left_out: int = 0
    positive: int = 0
    integers: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(("user", "item"), True))
    floats: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(("user", "item"), True))
    dates: int = 0
    latest: int = 0
    highest: dict[str, float] = field(default_factory=dict)
    bad: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    kinds: dict[str, TextKinds] = field(default_factory=dict)
    numbering: dict[str, DistinctValues] = field(default_factory=dict)

    @property
    def distinct(self) -> dict[str, bool]:
        """The columns that differ in every row, and those that did in the first ones."""
        return {name: values.distinct for name, values in self.numbering.items()}

    @property
    def as_integers(self) -> dict[str, bool]:
        """For "user" and "item", whether values that are text become integers."""
        return {name: self.integers[name] or self.floats[name] for name in self.integers}

    def count_bad(self, column: str, what: str, count: int, first: int) -> None:
        """Records `count` invalid rows, the first of them `first`."""
        before, earliest = self.bad.get((column, what), (0, first))
        self.bad[column, what] = before + count, min(earliest, first)

    def merge(self, other: Checks) -> None:
        """
        Adds what was found in another part of the log.

        Example:
            >>> first, second = Checks(rows=2), Checks(rows=3, latest=7)
            >>> second.integers["item"] = False
            >>> first.merge(second)
            >>> first.rows, first.latest, first.integers
            (5, 7, {'user': True, 'item': False})
        """
        for name in ("rows", "left_out", "positive", "dates"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latest = max(self.latest, other.latest)
        for name in ("user", "item"):
            self.integers[name] &= other.integers[name]
            self.floats[name] &= other.floats[name]
        for column, value in other.highest.items():
            self.highest[column] = max(value, self.highest.get(column, value))
        for (column, what), (count, first) in other.bad.items():
            self.count_bad(column, what, count, first)
        for name, kind in other.kinds.items():
            self.kinds.setdefault(name, TextKinds()).merge(kind)
        for name, values in other.numbering.items():
            self.numbering.setdefault(name, DistinctValues()).merge(values)

    def save(self, folder: Path) -> dict[str, Any]:
        """What JSON can hold of it; the values that `numbering` follows go into files of the folder."""
        numbering = [values.save(folder / f"{place}.values") for place, values in enumerate(self.numbering.values())]
        found = {name: getattr(self, name) for name in _PLAIN}
        found["bad"] = [[*problem, *where] for problem, where in self.bad.items()]
        found["kinds"] = {name: asdict(kind) for name, kind in self.kinds.items()}
        return found | {"numbering": dict(zip(self.numbering, numbering, strict=True))}

    @classmethod
    def load(cls, folder: Path, found: Mapping[str, Any]) -> Checks:
        """
        The opposite of `save`.

        Example:
            >>> checks = Checks(rows=3)
            >>> checks.count_bad("user_id", "ids are null", 1, 2)
            >>> Checks.load(Path(), checks.save(Path())) == checks
            True
        """
        return cls(
            **{name: found[name] for name in _PLAIN},
            bad={(column, what): (count, first) for column, what, count, first in found["bad"]},
            kinds={name: TextKinds(**kind) for name, kind in found["kinds"].items()},
            numbering={
                name: DistinctValues.load(folder / f"{place}.values", values)
                for place, (name, values) in enumerate(found["numbering"].items())
            },
        )


_PLAIN = ("rows", "left_out", "positive", "integers", "floats", "dates", "latest", "highest")
