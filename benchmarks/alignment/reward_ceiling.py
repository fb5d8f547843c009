"""
How well can one user's sessions be ordered on KuaiRand-Pure? Gradient boosting (LightGBM) on what was known before the session, evaluated by
AUC and by the share of a user's pairs of windows with different outcomes that are ordered correctly.

    python benchmarks/alignment/reward_ceiling.py --json benchmarks/results/reward_ceiling.json

One model per objective predicts single impressions of the training days; a window's prediction is the mean over its impressions, as its label is. The
windows are those of the reward model. Rows `PERIOD/FEATURES/OBJECTIVE/METRIC`, for the features

- `items`: what a reward model can read of a candidate: statistics of the item, its author and its tag before the day (for held-out days: before
  the first of them), duration, age and other columns of the video, and its match with the user's history;
- `items_users`: the user's own statistics, also by tag, in addition (what separates users);
- `items_users_request`: the page, hour and weekday of the impression in addition, which no reward model knows of a session that was never shown;
- `item_view_rate`: no model, the mean view rate of the window's items before the training days.

`within_user_clear` counts only pairs whose rates differ by more than 0.1. `spread` is the central 95 % over draws of users. `expected` is the accuracy within users that
the model itself predicts for views: of outcomes drawn from its own probabilities.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/alignment/reward_ceiling.py`

from benchmarks.alignment.reward import pairs_bootstrap
from benchmarks.harness import DATA, cpu_seconds, finish, one_thread, parser, say

OBJECTIVES = ("swt", "vtr", "ltr")  # 21 test windows have a follow
VALIDATION, TEST = 20220503, 20220506
PRIOR = 10.0  # impressions that a rate is drawn to its mean by
CLEAR = 0.1
GROUPS = {
    "items": ("item", "author", "tag", "video", "history"),
    "items_users": ("item", "author", "tag", "video", "history", "user", "user_tag"),
    "items_users_request": ("item", "author", "tag", "video", "history", "user", "user_tag", "request"),
}
SETTINGS = {
    "objective": "cross_entropy", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 100, "feature_fraction": 0.5,
    "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 10.0, "num_threads": 1, "verbosity": -1, "seed": 0,
}  # fmt: skip


def arguments():
    options = parser(__doc__)
    options.add_argument("--data_dir", default=f"{DATA}/kuairand_pure", help="folder of KuaiRand-Pure's Parquet files")
    options.add_argument("--rounds", type=int, default=150)
    return options.parse_args()


def main() -> None:
    options = arguments()
    one_thread()
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.evaluation.reward_metrics import within_group_pairs

    started = cpu_seconds()
    log = Log(Path(options.data_dir))
    if options.quick:
        options.rounds = 10
    features = log.features()
    say(f"features of {len(log.rows):,} impressions in {cpu_seconds() - started:.0f} CPU s")
    predictions = {"item_view_rate": np.repeat(log.view_rate[log.item][:, None], len(OBJECTIVES), axis=1)}
    for name, groups in GROUPS.items():
        predictions[name] = log.boosted(pd.concat([features[group] for group in groups], axis=1), options.rounds)
    rows: list[dict[str, Any]] = []
    for period in ("validation", "test"):
        windows = log.windows[period]
        labels = windows.mean(log.labels)
        for name, predicted in predictions.items():
            p = windows.mean(predicted)
            for k, objective in enumerate(OBJECTIVES):
                metrics = measured(labels[:, k], p[:, k], windows.owners)
                rows.extend(
                    result_row(f"{period}/{name}/{objective}/{metric}", value, "share", None, spread)
                    for metric, (value, spread) in metrics.items()
                )
            if name in GROUPS:
                rows.append(result_row(f"{period}/{name}/vtr/expected", log.expected(predicted, windows), "share"))
        for k, objective in enumerate(OBJECTIVES):
            for metric, least in (("within_user_pairs", 0.0), ("within_user_clear_pairs", CLEAR)):
                count = within_group_pairs(labels[:, k], labels[:, k], windows.owners, least)[1].sum()
                rows.append(result_row(f"{period}/{objective}/{metric}", float(count), "pairs"))
    rows.append(result_row("cpu", cpu_seconds() - started, "CPU s"))
    finish(rows, options.json, rounds=options.rounds)


def measured(labels, scores, owners) -> dict[str, tuple[float, list[float] | None]]:
    """AUC, accuracy within users, and the same of clear pairs; the last two with a bootstrap over users."""
    from onerec_hf.evaluation.reward_metrics import concordance

    return {
        "auc": (concordance(labels, scores), None),
        "within_user_accuracy": pairs_bootstrap(labels, scores, owners),
        "within_user_clear": pairs_bootstrap(labels, scores, owners, CLEAR),
    }


class Windows:
    """The reward model's windows of a period: rows of the log, from `starts` to `stops` of `rows`."""

    def __init__(self, users: np.ndarray, rows: np.ndarray):
        from onerec_hf.data.feedback.windows import window_slices

        self.rows = rows
        self.owners, self.starts, self.stops = window_slices(np.bincount(users[rows]), 5, 10)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(windows, d) means of (log, d) values."""
        sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[self.rows], axis=0, dtype=np.float64)])
        return (sums[self.stops] - sums[self.starts]) / (self.stops - self.starts)[:, None]


class Log:
    """The standard log by user and time, the histories before it, and the videos, with users and videos as indices."""

    def __init__(self, folder: Path):
        from onerec_hf.data import WatchTimeScale

        log: Any = pd.read_parquet(folder / "log_standard_4_25_to_5_08_pure.parquet").drop_duplicates(
            ignore_index=True
        )
        log = log.sort_values(["user_id", "time_ms"], kind="stable", ignore_index=True)
        self.rows, self.date = log, log["date"].to_numpy()
        self.train = self.date < VALIDATION
        scale = WatchTimeScale.fit(log["play_time_ms"][self.train], log["duration_ms"][self.train])
        watched = scale(log["play_time_ms"], log["duration_ms"])
        self.labels = np.stack([watched, log["long_view"].to_numpy(float), log["is_like"].to_numpy(float)], axis=1)
        past: Any = pd.read_parquet(folder / "history_4_08_to_4_24_pure.parquet").set_index("user_id").sort_index()
        videos: Any = pd.read_parquet(folder / "video_features_basic_pure.parquet").set_index("video_id").sort_index()
        self.videos = videos
        self.users = np.union1d(log["user_id"].to_numpy(), past.index.to_numpy())
        self.user = np.searchsorted(self.users, log["user_id"].to_numpy())
        self.item = np.searchsorted(videos.index.to_numpy(), log["video_id"].to_numpy())
        owners = np.searchsorted(self.users, past.index.to_numpy())
        # (user, item) pairs of what was shown, viewed and liked before the log
        self.past = {
            name: (
                np.repeat(owners, past[name].map(len).to_numpy()),
                np.searchsorted(videos.index.to_numpy(), np.concatenate(past[name].to_numpy())),
            )
            for name in ("watch_seq", "long_watch_seq", "like_seq")
        }
        shown, viewed = (
            np.bincount(self.past[name][1], minlength=len(videos)) for name in ("watch_seq", "long_watch_seq")
        )
        self.view_rate = (viewed + PRIOR * viewed.sum() / shown.sum()) / (shown + PRIOR)
        held_out = (self.date >= VALIDATION, self.date >= TEST)
        periods = {"validation": held_out[0] & ~held_out[1], "test": held_out[1]}
        self.windows = {name: Windows(self.user, np.flatnonzero(inside)) for name, inside in periods.items()}

    def features(self) -> dict[str, pd.DataFrame]:
        """By group the features of all impressions."""
        tag, author = (_codes(self.videos[name].fillna("")) for name in ("tag", "author_id"))
        tags = tag.max() + 1
        groups = {
            "item": lambda user, item: item,
            "author": lambda user, item: author[item],
            "tag": lambda user, item: tag[item],
        }
        groups |= {"user": lambda user, item: user, "user_tag": lambda user, item: user * tags + tag[item]}
        found = {name: self._statistics(name, code) for name, code in groups.items()}
        days = pd.to_datetime(self.rows["date"].astype(str))
        uploaded = pd.to_datetime(self.videos["upload_dt"]).to_numpy()[self.item]
        duration = np.log1p(self.videos["video_duration"].fillna(0).to_numpy() / 1000)
        columns = {
            "duration": duration[self.item],
            "age": (days.to_numpy() - uploaded) / np.timedelta64(1, "D"),
            "tag": tag[self.item],
        }
        for name in ("video_type", "upload_type", "music_type", "server_width"):
            columns[name] = _codes(self.videos[name])[self.item]
        found["video"] = pd.DataFrame(columns)
        found["history"] = self._match(tag, author, duration)
        request = {"page": self.rows["tab"], "hour": self.rows["hourmin"] // 100, "weekday": days.dt.weekday}
        found["request"] = pd.DataFrame(request)
        return found

    def _statistics(self, name: str, code) -> pd.DataFrame:
        """Impressions and smoothed rates of a group (of items, users or both) before the day, for held-out days before the first of them."""
        groups = code(self.user, self.item)
        earlier = [code(*self.past[of]) for of in ("watch_seq", "long_watch_seq", "like_seq")]
        size = 1 + max(int(part.max()) for part in (groups, *earlier))
        past = [np.bincount(part, minlength=size) for part in earlier]
        values = np.zeros((len(groups), 6))
        for day in (*np.unique(self.date[self.train]), VALIDATION):
            rows, before = (self.date == day if day < VALIDATION else ~self.train), self.date < min(day, VALIDATION)
            shown = np.bincount(groups[before], minlength=size)
            watched, viewed, liked = (
                np.bincount(groups[before], weights=y, minlength=size) for y in self.labels[before].T
            )
            table = [
                _rate(past[1], past[0]),
                _rate(past[1] + viewed, past[0] + shown),
                _rate(past[2] + liked, past[0] + shown),
                _rate(watched, shown, 0.5),
                np.log1p(past[0] + shown),
                np.log1p(shown),
            ]
            values[rows] = np.stack(table, axis=1)[groups[rows]]
        kinds = ("early_view_rate", "view_rate", "like_rate", "watch_rank", "shown", "shown_in_log")
        return pd.DataFrame(values, columns=[f"{name}_{kind}" for kind in kinds])

    def _match(self, tag: np.ndarray, author: np.ndarray, duration: np.ndarray) -> pd.DataFrame:
        """How the video fits what the user viewed before the log: tag, author, duration; and whether it was shown then."""
        user, item = self.past["long_watch_seq"]
        viewed = np.bincount(user, minlength=len(self.users))
        share = np.zeros((len(self.users), tag.max() + 1))
        np.add.at(share, (user, tag[item]), 1.0)
        mean = np.bincount(user, weights=duration[item], minlength=len(self.users)) / np.maximum(viewed, 1)
        authors = np.unique(user * (author.max() + 1) + author[item])
        before = np.unique(self.past["watch_seq"][0] * len(self.videos) + self.past["watch_seq"][1])
        columns = {
            "tag_share": share[self.user, tag[self.item]] / (viewed[self.user] + 1),
            "viewed": viewed[self.user],
            "author_viewed": np.isin(self.user * (author.max() + 1) + author[self.item], authors),
            "shown_before": np.isin(self.user * len(self.videos) + self.item, before),
            "duration_distance": duration[self.item] - mean[self.user],
        }
        return pd.DataFrame(columns)

    def boosted(self, features: pd.DataFrame, rounds: int) -> np.ndarray:
        """(log, objectives) probabilities of models of the training days."""
        import lightgbm

        x, columns = features.to_numpy(np.float32), []
        for y in self.labels.T:
            booster = lightgbm.train(SETTINGS, lightgbm.Dataset(x[self.train], y[self.train]), rounds)
            held_out = np.zeros(len(x))
            held_out[~self.train] = np.asarray(booster.predict(x[~self.train]))
            columns.append(held_out)
        return np.stack(columns, axis=1)

    def expected(self, predicted: np.ndarray, windows: Windows) -> float:
        """Accuracy within users of the predictions, for views drawn from them (mean of 20 draws)."""
        from onerec_hf.evaluation.reward_metrics import within_group_concordance

        rng, p = np.random.default_rng(0), windows.mean(predicted)
        drawn = (windows.mean((rng.random(predicted.shape) < predicted).astype(float)) for _ in range(20))
        return float(np.mean([within_group_concordance(v[:, 1], p[:, 1], windows.owners)[0] for v in drawn]))


def _rate(feedback: np.ndarray, shown: np.ndarray, mean: float | None = None) -> np.ndarray:
    prior = PRIOR * (feedback.sum() / max(shown.sum(), 1) if mean is None else mean)
    return (feedback + prior) / (shown + PRIOR)


def _codes(column: pd.Series) -> np.ndarray:
    return pd.factorize(column, sort=True, use_na_sentinel=False)[0]


if __name__ == "__main__":
    main()
