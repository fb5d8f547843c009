"""What `onerec-hf recommend` reads beside histories: lists of items, candidates by user, and the users of a table of interactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.distributed import say

if TYPE_CHECKING:
    import pandas as pd

    from onerec_hf.modeling.features import FeatureSchema


def typed_ids(values: Sequence, id_type: str, option: str) -> list:
    """
    Ids of the command line or of a file as a catalogue holds them.

    Args:
        id_type: "int" or "str".
        option: where they come from, for the message.

    Raises:
        ValueError: a text that is no integer, where ids are integers.

    Example:
        >>> typed_ids(["7", "8"], "int", "--allow"), typed_ids([7, "m4"], "str", "--allow")
        ([7, 8], ['7', 'm4'])
    """
    if id_type == "str":
        return [str(value) for value in values]
    try:
        return [int(str(value)) for value in values]
    except ValueError:
        bad = next(value for value in values if not str(value).lstrip("-").isdecimal())
        raise ValueError(f"{option}: the model's item ids are integers, and {bad!r:.60} is none") from None


def read_ids(given: Sequence[str], id_type: str, option: str, item_column: str = "item_id") -> list:
    """
    The items of an option: ids, or one file of them (a table with an item column, or a text file with an id per line).

    Raises:
        ValueError: as [`typed_ids`], or a file without ids.

    Example:
        >>> read_ids(["m4", "m17"], "str", "--allow")
        ['m4', 'm17']
    """
    if len(given) == 1 and Path(given[0]).is_file():
        return typed_ids(_column(given[0], item_column)[0], id_type, f"{option} {given[0]}")
    return typed_ids(given, id_type, option)


def _column(path: str, item_column: str, user_column: str | None = None) -> tuple[list, list | None]:
    """The item ids of a file as text or integers, and the user ids where it has such a column."""
    from onerec_hf.data.tables import SUFFIXES, load_table

    if Path(path).suffix.lower() not in set(SUFFIXES) - {".txt"}:  # a list has no columns to tell it from a table
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()], None
    table = load_table(path, (item_column, user_column))
    if item_column not in table:
        raise ValueError(
            f"{path}: column {item_column!r} is missing (found: {', '.join(map(str, table.columns[:10]))}). Rename it or pass --item_column"
        )
    if bool(table[item_column].isna().any()):
        raise ValueError(f"{path}: column {item_column!r} holds missing values. Drop these rows")
    users = table[user_column].tolist() if user_column in table else None
    return table[item_column].tolist(), users


@dataclass(frozen=True, eq=False)
class Candidates:
    """
    Items to rank, the same for all histories or by user.

    Args:
        shared: for all.
        by_user: by the text of the user id; None where they are shared.
    """

    shared: list | None
    by_user: dict[str, list] | None = None

    @classmethod
    def read(cls, path: str, id_type: str, item_column: str, user_column: str) -> Candidates:
        """
        Of a file: a table with an item column and, for candidates by user, a user column; or a text file with an id per line.

        Raises:
            ValueError: no such file, or as [`read_ids`].
        """
        option = f"--candidates {path}"
        if not Path(path).is_file():
            raise ValueError(
                f"{option}: no such file; name one with an item id per line, or a table with {item_column!r}"
            )
        values, users = _column(path, item_column, user_column)
        ids = typed_ids(values, id_type, option)
        if users is None:
            return cls(ids)
        by_user: dict[str, list] = {}
        for user, item in zip(users, ids, strict=True):
            by_user.setdefault(str(user), []).append(item)
        return cls(None, by_user)

    def of(self, request: dict[str, Any], number: int) -> list | None:
        """
        The candidates of a request that has none itself.

        Raises:
            ValueError: a user without candidates.
        """
        if self.by_user is None or request.get("candidates") is not None:
            return None
        if (user := str(request.get("user_id"))) not in self.by_user:
            raise ValueError(f"line {number}: --candidates has no row of user {request.get('user_id')!r:.60}")
        return self.by_user[user]


def table_requests(
    interactions: str,
    users: Sequence[str] | None,
    columns: dict[str, Any],
    positive: Sequence[str],
    exclude_seen: bool,
    schema: FeatureSchema | None = None,
    whole: bool = False,
    users_file: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Requests of the users of a table: a number, and a dictionary with `user_id`, `history` (the positive rows in the order of time) and, with
    `exclude_seen`, `exclude`: the items of the user's other rows.

    Args:
        users: only these, in this order; all in the order of their ids by default.
        columns: how the table is read, options of [`~onerec_hf.data.read_interactions`].
        positive: rules of positive feedback.
        schema: the features that the model reads; entries of the history are then objects with the table's values.
        whole: histories hold all rows, also those that are not positive.
        users_file: table of users with the columns of their features: requests then have `user_features`, codes of them.

    Raises:
        ValueError: a user that the table does not hold, or `users_file` for a model that reads nothing of it; DataError: what is wrong with the table.
    """
    from onerec_hf.data import PositiveFeedback, UserSequences, read_interactions

    rows = read_interactions(interactions, **columns)
    of_user = _places(rows)
    chosen = list(of_user) if users is None else [_find_user(user, of_user, interactions) for user in users]
    liked: dict[Any, np.ndarray] = {}
    holds = PositiveFeedback.parse(positive).holds(rows) if positive else np.ones(len(rows), dtype=bool)
    read = rows if whole else rows.loc[holds].reset_index(drop=True)
    if len(read):
        sequences = UserSequences.from_interactions(read)
        liked = dict(zip(sequences.user_ids.tolist(), sequences.lists(), strict=True))
    values = {} if schema is None else _values(read, holds if whole else np.ones(len(read), dtype=bool), schema)
    of_users = (
        {} if users_file is None else _user_codes(users_file, chosen, list(of_user), columns["user_column"], schema)
    )
    if users_file is None and schema is not None and schema.user:
        named = ", ".join(feature.name for feature in schema.user)
        say(f"missing values: features of users ({named}); pass --users_file, a table with these columns")
    items = rows["item_id"].to_numpy()
    for number, user in enumerate(chosen, start=1):
        history = liked.get(user, items[:0]).tolist()
        request: dict[str, Any] = {"user_id": user, "history": history}
        if user in values:
            entries = [{"item": item, **entry} for item, entry in zip(history, values[user], strict=True)]
            request["history"] = entries
        if user in of_users:
            request["user_features"] = of_users[user]
        if exclude_seen and len(history) < len(of_user[user]):
            request["exclude"] = sorted(set(items[of_user[user]].tolist()) - set(history))
        yield number, request


def _values(rows: pd.DataFrame, positive: np.ndarray, schema: FeatureSchema) -> dict[Any, list[dict[str, Any]]]:
    """Values of each user's interactions, in the order of `UserSequences`."""
    from onerec_hf.data.columns import column_of
    from onerec_hf.data.features import raw_values
    from onerec_hf.modeling.features import in_seconds

    named = dict.fromkeys(feature.name for feature in schema.interaction if feature.derive is None)
    raw = {name: raw_values(name, column_of(rows, name)) for name in named if name in rows}  # as training has them
    columns: dict[str, Any] = {name: of.astype(object).where(of.notna(), None) for name, of in raw.items()}
    if "positive" in named:
        columns["positive"] = positive
    columns[schema.time] = in_seconds(rows["timestamp"].to_numpy())
    if lacking := [name for name in named if name not in columns]:
        say(f"missing values, which the table does not hold: features of interactions ({', '.join(lacking)})")
    entries = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    order = rows.assign(_row=np.arange(len(rows))).sort_values("timestamp", kind="stable")
    return {user: [entries[row] for row in places] for user, places in order.groupby("user_id", sort=False)["_row"]}


def _user_codes(
    path: str, users: list, everyone: list, user_column: str, schema: FeatureSchema | None
) -> dict[Any, list[int]]:
    """Codes of the users' features by user; those without a row are counted. A table that holds none of `everyone` is another one."""
    from onerec_hf.data import read_users
    from onerec_hf.data.columns import about, column_of
    from onerec_hf.data.feature_tables import told_lacking
    from onerec_hf.data.features import encode_column, raw_values

    option = f"--users_file {path}"
    if schema is None or not schema.user:
        raise ValueError(f"{option}: the model reads no features of users; leave the option out")
    with about(path):
        table = read_users(path, user_column=user_column).with_ids_like(np.asarray(users))
        lacking = [feature.name for feature in schema.user if feature.name not in table.frame]
        if len(lacking) == len(schema.user):
            raise ValueError(f"{option} has none of the columns that the model reads of users: {', '.join(lacking)}")
        codes = [
            encode_column(feature, raw_values(feature.name, column_of(table.frame, feature.name)))
            if feature.name not in lacking
            else feature.encode([None] * len(table))
            for feature in schema.user
        ]
    if lacking:
        say(f"missing values, which {path} does not hold: features of users ({', '.join(lacking)})")
    rows = table.rows_of(np.asarray(users))
    told_lacking(int((table.rows_of(np.asarray(everyone)) < 0).sum()), len(everyone), option)
    if missing := int((rows < 0).sum()):
        say(f"{missing:,} of {len(users):,} users have no row in {option}: their features are missing.")
    of_rows = np.concatenate(codes, axis=1).tolist()
    return {user: of_rows[row] for user, row in zip(users, rows.tolist(), strict=True) if row >= 0}


def _places(rows: pd.DataFrame) -> dict[Any, np.ndarray]:
    """The rows of each user, by ids as Python has them, sorted."""
    import pandas as pd

    codes, users = pd.factorize(rows["user_id"].to_numpy(), sort=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(users)))
    return dict(zip(users.tolist(), np.split(order, ends[:-1]), strict=True))


def _find_user(user: str, of_user: dict[Any, np.ndarray], interactions: str) -> Any:
    for known in (user, int(user) if user.lstrip("-").isdecimal() else user):
        if known in of_user:
            return known
    raise ValueError(
        f"--users {user}: no such user among {len(of_user):,} of {interactions}, e.g. {next(iter(of_user))!r:.60}"
    )


def write_answers(path: str, answers: list[dict[str, Any]]) -> None:
    """
    Writes answers as a table with a row per item: `user_id` (or `history`, the number of the line), `rank`, for longer sessions `place`, `item_id`,
    `score` and the items' fields. The suffix says the format: .csv, .tsv or .parquet; .jsonl has a line per answer.

    Args:
        answers: as the command prints them, in order.

    Raises:
        ValueError: another suffix.
    """
    import json

    from onerec_hf.modeling.files import replacing

    check_output(path)
    if Path(path).suffix.lower() == ".jsonl":
        with replacing(path) as temporary:
            text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            Path(temporary).write_text(text, encoding="utf-8")
        return
    import pandas as pd

    table = pd.DataFrame(list(_rows(answers)))
    with replacing(path) as temporary:
        if Path(path).suffix.lower() == ".parquet":
            table.to_parquet(temporary, index=False)
        else:
            table.to_csv(temporary, index=False, sep="\t" if Path(path).suffix.lower() == ".tsv" else ",")


def check_output(path: str) -> None:
    """
    Raises:
        ValueError: a file of an unknown format, or in a folder that is absent.
    """
    if Path(path).suffix.lower() not in (".csv", ".tsv", ".parquet", ".jsonl"):
        raise ValueError(f"--output_file {path}: name a .csv, .tsv, .parquet or .jsonl file")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--output_file {path}: there is no folder {Path(path).absolute().parent}; create it first")


def _rows(answers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, answer in enumerate(answers, start=1):
        about = {"user_id": answer["user_id"]} if "user_id" in answer else {"history": number}
        about |= {"similar_to": answer["similar_to"]} if "similar_to" in answer else {}
        sessions = answer["sessions"] if "sessions" in answer else [[item] for item in answer["items"]]
        fields = answer.get("fields") or [{}] * len(sessions)
        for rank, (session, score) in enumerate(zip(sessions, answer["scores"], strict=True), start=1):
            for place, item in enumerate(session, start=1):
                of_item = fields[rank - 1]
                yield {
                    **about,
                    "rank": rank,
                    **({"place": place} if "sessions" in answer else {}),
                    "item_id": item,
                    "score": score,
                    **(of_item[place - 1] if isinstance(of_item, list) else of_item),
                }
