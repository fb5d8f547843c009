"""Reward model data from KuaiRand-Pure: labelled windows split by day, earlier histories, and item attributes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onerec_hf.data.columns import DataError, require_columns
from onerec_hf.data.feedback.item_statistics import ItemStatistics
from onerec_hf.data.feedback.watch_time import WatchTimeScale
from onerec_hf.data.feedback.windows import feedback_windows
from onerec_hf.data.interactions import ItemTable, read_items

if TYPE_CHECKING:
    import datasets

_HISTORIES = ("long_watch_seq", "watch_seq", "like_seq")


@dataclass(frozen=True, eq=False)
class SessionFeedback:
    """
    Training and evaluation data of a reward model.

    Args:
        train, validation, test: columns `user_id`, `history`, `session`, `labels` (see `feedback_windows`).
        objectives: names of the labels, in order.
        items: `item_id` and the attributes `tags`, `author`, `type`, `duration_ms`.
        train_sequences: item ids per user in time order, before the validation days, for co-occurrence embeddings without leakage.
        description: protocol and licence, for model cards.
        statistics: counts of the items before the training windows, in the order of the item table and of the objectives.
        later_statistics: likewise before the validation windows.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    objectives: list[str]
    items: ItemTable
    train_sequences: list[np.ndarray]
    description: str
    statistics: ItemStatistics | None = None
    later_statistics: ItemStatistics | None = None

    @property
    def base_rates(self) -> list[float]:
        """Mean training label of each objective."""
        return np.nanmean(label_matrix(self.train), axis=0).tolist()


def label_matrix(windows: datasets.Dataset) -> np.ndarray:
    """
    (windows, objectives) float64 labels, NaN for null.

    Example:
        >>> from datasets import Dataset
        >>> label_matrix(Dataset.from_dict({"labels": [[0.5, None]]})).tolist()
        [[0.5, nan]]
    """
    return np.array(windows["labels"][:], dtype=np.float64)


def load_kuairand_feedback(
    folder: str | Path,
    validation_start: int = 20220503,
    test_start: int = 20220506,
    history: str = "long_watch_seq",
    min_items: int = 5,
    max_items: int = 10,
) -> SessionFeedback:
    """
    The standard log of 2022-04-25 to 05-08 as windows of impressions with the paper's four objectives, each a rate in [0, 1] over the window:
    `swt` (mean rank of the play time among training impressions of similar duration, see `WatchTimeScale`), `vtr` (long_view), `wtr` (follow)
    and `ltr` (like). Exact duplicate rows are dropped. Each window lies inside one of the three periods. The history holds videos from before
    2022-04-25; item statistics before the training windows are counted in it and have views and likes only.

    Args:
        folder: folder with log_standard_4_25_to_5_08_pure.parquet, history_4_08_to_4_24_pure.parquet and video_features_basic_pure.parquet.
        validation_start, test_start: first day of each period, as in the log's `date` (20220503).
        history: "long_watch_seq" (videos watched to the end or for 18 seconds, like the generator's histories), "watch_seq"
            (all shown videos) or "like_seq"; at most the latest 50 items.
        min_items, max_items: impressions per window.

    Raises:
        DataError: missing files, columns or videos, invalid values, or a period without windows.

    Example:
        >>> feedback = load_kuairand_feedback("kuairand_pure")  # doctest: +SKIP
        >>> len(feedback.train), feedback.objectives  # doctest: +SKIP
        (14489, ['swt', 'vtr', 'wtr', 'ltr'])
    """
    if history not in _HISTORIES:
        raise ValueError(f"history must be one of {', '.join(_HISTORIES)}; got {history!r}")
    log, past, videos = (
        _read(Path(folder), name)
        for name in (
            "log_standard_4_25_to_5_08_pure.parquet",
            "history_4_08_to_4_24_pure.parquet",
            "video_features_basic_pure.parquet",
        )
    )
    columns = [
        "user_id",
        "video_id",
        "date",
        "time_ms",
        "long_view",
        "is_follow",
        "is_like",
        "play_time_ms",
        "duration_ms",
    ]
    require_columns(log, columns, "log")
    require_columns(past, ["user_id", *_HISTORIES], "history")
    total = len(log)
    log = log.drop_duplicates(ignore_index=True)
    log = log.rename(columns={"video_id": "item_id", "time_ms": "timestamp"})
    dates = log["date"].to_numpy()
    periods = {
        "training": dates < validation_start,
        "validation": (dates >= validation_start) & (dates < test_start),
        "test": dates >= test_start,
    }
    for name, within in periods.items():
        if not within.any():
            raise DataError(
                f"column 'date': no {name} day among {dates.min()} to {dates.max()} with validation_start={validation_start} and "
                f"test_start={test_start}. Change these dates."
            )
    training: Any = log[periods["training"]]
    scale = WatchTimeScale.fit(training["play_time_ms"], training["duration_ms"])
    log["watch_rank"] = scale(log["play_time_ms"], log["duration_ms"])
    training = log[periods["training"]]
    objectives = {"swt": "watch_rank", "vtr": "long_view", "wtr": "is_follow", "ltr": "is_like"}
    histories = dict(zip(past["user_id"].tolist(), past[history].map(list), strict=True))
    parts: list[Any] = [log[within] for within in periods.values()]
    train, validation, test = (feedback_windows(part, objectives, histories, min_items, max_items) for part in parts)
    items = read_items(_attributes(videos), text_columns=["tags", "author", "type", "duration_ms"])
    items.select(pd.unique(log["item_id"].to_numpy()))  # raises if a video has no row
    before = _counted_before(past, items.item_ids, list(objectives))
    shown = ItemStatistics.count(
        pd.Index(items.item_ids).get_indexer(training["item_id"]),
        training[list(objectives.values())].to_numpy(dtype=np.float64),
        len(items.item_ids),
    )
    description = (
        f"KuaiRand-Pure, standard log 2022-04-25 to 05-08 ({len(log):,} impressions; {total - len(log):,} exact duplicate rows dropped). "
        f"Per-user windows of {min_items} to {max_items} impressions inside each period, not logged sessions: {len(train):,} of training (before "
        f"{validation_start}), {len(validation):,} of validation, {len(test):,} of test (from {test_start}). Histories: {history} of 2022-04-08 "
        "to 04-24, at most 50 items. CC BY-SA 4.0; cite Gao et al., CIKM 2022 (doi:10.1145/3511808.3557624)."
    )
    sequences = _sequences(past, training)
    return SessionFeedback(
        train, validation, test, list(objectives), items, sequences, description, before, before + shown
    )


def _counted_before(past: pd.DataFrame, item_ids: Any, objectives: list[str]) -> ItemStatistics:
    """
    Impressions, views and likes of the earlier histories; they have no watch times and no follows. Each of the three lists ends with its latest 50 videos:
    views and likes older than a user's oldest impression are not counted.
    """
    index = pd.Index(item_ids)
    lists = {
        name: [_among(some, shown) for some, shown in zip(past[name], past["watch_seq"], strict=True)]
        for name in _HISTORIES
    }
    rows = {name: index.get_indexer(np.concatenate(some)) for name, some in lists.items()}
    counts = {name: np.bincount(found[found >= 0], minlength=len(index)) for name, found in rows.items()}
    shown = counts["watch_seq"].astype(np.float64)
    observed = np.zeros((len(index), len(objectives)))
    for objective, name in (("vtr", "long_watch_seq"), ("ltr", "like_seq")):
        observed[:, objectives.index(objective)] = counts[name]
    return ItemStatistics(shown, observed, shown[:, None] * observed.sum(0) / shown.sum())


def _among(videos: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Those of a user's videos that were among the shown ones, each as often as it was shown."""
    left = Counter(np.asarray(shown).tolist())
    kept = []
    for video in np.asarray(videos).tolist():
        if left[video] > 0:
            left[video] -= 1
            kept.append(video)
    return np.array(kept, dtype=np.int64)


def _read(folder: Path, name: str) -> pd.DataFrame:
    if not (folder / name).is_file():
        raise DataError(
            f"KuaiRand feedback: {folder} lacks {name}. Pass the folder with KuaiRand-Pure's Parquet files."
        )
    return pd.read_parquet(folder / name)


def _attributes(videos: pd.DataFrame) -> pd.DataFrame:
    require_columns(videos, ["video_id", "tag", "author_id", "video_type", "upload_type", "video_duration"], "videos")
    return pd.DataFrame(
        {
            "item_id": videos["video_id"],
            "tags": videos["tag"].fillna(""),
            "author": videos["author_id"].astype(str),
            "type": videos["video_type"] + " " + videos["upload_type"],
            "duration_ms": videos["video_duration"].fillna(0.0),
        }
    )


def _sequences(past: pd.DataFrame, training: pd.DataFrame) -> list[np.ndarray]:
    """Videos shown to each user before the validation days, oldest first."""
    ordered = training.sort_values(["user_id", "timestamp"], kind="stable")
    groups: Any = ordered.groupby("user_id")["item_id"]
    shown: dict[int, np.ndarray] = {user: rows.to_numpy() for user, rows in groups}
    before = dict(zip(past["user_id"].tolist(), past["watch_seq"], strict=True))
    nothing = np.zeros(0, dtype=np.int64)
    return [
        np.concatenate([before.get(user, nothing), shown.get(user, nothing)]).astype(np.int64)
        for user in sorted(before.keys() | shown.keys())
    ]
