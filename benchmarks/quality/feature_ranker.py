"""
Do KuaiRand-Pure's features say which video is next? A gradient-boosted ranker (LightGBM, lambdarank) reorders the best candidates of a model, with and
without features, on the targets of `onerec-hf train --dataset kuairand-pure`.

    python benchmarks/quality/feature_ranker.py --model FOLDER --json benchmarks/results/feature_ranker.json

FOLDER is a saved OneRec with an item head; without it a SASRec is trained here. The ranker starts from the model's scores, learns on the validation targets of
two thirds of the users and is evaluated on the test targets of the others, three times. Rows `NOW/FEATURES/METRIC`: `model` (the candidates in their own
order), each group of features alone, `all`; `gain` over `model`, with `standard_error` paired over users. All features are counted from training rows; those
about time use rows before the request only. NOW, the request's time, is that of the user's last row before the target (`history`), or the target's own
time (`request`), which a service knows when it answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/feature_ranker.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, say

GROUPS = ("user", "video", "feedback", "time")
DAY = 86_400
FOLDS = 3
PRIOR = 5.0  # rows that a rate is drawn to its mean by


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.set_defaults(dataset="kuairand-pure", data_dir="../shared/data/kuairand_pure")
    options.add_argument("--model", help="folder of a OneRec that was trained on this data with the default split")
    options.add_argument("--candidates", type=int, default=100)
    options.add_argument("--now", choices=("history", "request"), nargs="+", default=["history", "request"])
    options.add_argument("--rounds", type=int, default=100)
    return options.parse_args()


def main() -> None:
    options = arguments()
    one_thread()
    from onerec_hf.evaluation.results import result_row
    from onerec_hf.workflows import load_in_memory

    data = load_in_memory(dataset=options.dataset, data_dir=options.data_dir)
    log = Log(data, Path(options.data_dir))
    users = np.arange(len(data.test))
    if options.quick:
        users = np.sort(np.random.default_rng(0).choice(len(users), 600, replace=False))
        options.candidates, options.rounds, options.now = 30, 10, ["history"]
    rows: list[dict[str, Any]] = []
    sides = {side: Requests.of(data, side, users) for side in ("validation", "test")}
    found = {side: candidates(data, requests, options) for side, requests in sides.items()}
    reached = float((found["test"][0] == sides["test"].target[:, None]).any(1).mean())
    rows.append(result_row("candidates/recall", reached, "share"))
    for now in options.now:
        tables = {side: log.features(sides[side], found[side][0], now) for side in sides}
        groups = GROUPS if now == "history" else ("time",)  # the others do not depend on it, but for the age of videos
        chosen = {group: (group,) for group in groups} | {"all": GROUPS}
        model = gains_of(-np.arange(found["test"][0].shape[1], dtype=float)[None], found["test"][0], sides["test"])
        values = {"model": model}
        for name, groups in chosen.items():
            started = time.process_time()
            scores, importance = ranked(tables, groups, sides, found, options.rounds)
            values[name] = gains_of(scores, found["test"][0], sides["test"])
            say(
                f"{now}/{name}: {values[name]['ndcg@10'].mean():.4f}, {time.process_time() - started:.0f} s; {importance}"
            )
        for name, metrics in values.items():
            rows.extend(result_row(f"{now}/{name}/{metric}", of.mean(), "share") for metric, of in metrics.items())
            gain = metrics["ndcg@10"] - values["model"]["ndcg@10"]
            if name == "model":
                continue
            rows.append(result_row(f"{now}/{name}/gain", gain.mean(), "ndcg@10", against=f"{now}/model"))
            error = gain.std(ddof=1) / len(gain) ** 0.5
            rows.append(result_row(f"{now}/{name}/standard_error", error, "ndcg@10"))
    finish(rows, options.json, protocol=data.protocol, users=len(users), candidates=options.candidates)


class Requests:
    """
    Held-out users: (users,) rows of the sequences, targets and times, and the histories as item indices.

    Args:
        place: (users,) place of each target in the sequences' rows.
    """

    def __init__(self, data, user: np.ndarray, place: np.ndarray):
        sequences, items = data.sequences, np.searchsorted(data.item_ids, data.sequences.item_ids)
        self.user_ids, self.target = sequences.user_ids[user], items[place]
        self.time = sequences.timestamps[place]
        starts = sequences.offsets[:-1][user]
        self.histories = [items[start:stop] for start, stop in zip(starts, place, strict=True)]

    @classmethod
    def of(cls, data, side: str, users: np.ndarray) -> Requests:
        sequences = data.sequences
        held_out = np.flatnonzero(sequences.lengths >= 3)[users]
        return cls(data, held_out, sequences.offsets[1:][held_out] - (1 if side == "test" else 2))


def candidates(data, requests: Requests, options) -> tuple[np.ndarray, np.ndarray]:
    """(users, candidates) item indices that the model ranks first, best first, none of the history, and their scores."""
    import torch

    width, found, values = options.candidates, [], []
    score = scorer(data, options)
    for start in range(0, len(requests.histories), 256):
        some = requests.histories[start : start + 256]
        with torch.no_grad():
            scores = score(some)
        for row, history in enumerate(some):
            scores[row, torch.from_numpy(history)] = -torch.inf
        best = scores.topk(width, dim=1)
        found.append(best.indices.numpy())
        values.append((best.values - scores.logsumexp(1, keepdim=True)).numpy())
    return np.concatenate(found), np.concatenate(values)


_SCORERS: dict[str | None, Any] = {}


def scorer(data, options):
    """Histories to (users, items) scores of a saved OneRec, or of a SASRec that is trained here."""
    if options.model not in _SCORERS:
        _SCORERS[options.model] = (
            _sasrec(data, options.quick) if options.model is None else _onerec(data, options.model)
        )
    return _SCORERS[options.model]


def _onerec(data, folder: str):
    from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
    from onerec_hf.modeling.item_head import history_states
    from onerec_hf.modeling.layers_onerec import at_places

    model: Any = OneRecForConditionalGeneration.from_pretrained(folder)
    model, processor = model.eval(), OneRecProcessor.from_pretrained(folder)
    encoder = model.get_encoder()
    head, catalogue = encoder.item_head, processor.catalogue
    assert catalogue is not None
    import torch

    rows = head.rows_of(torch.tensor(catalogue.codes[catalogue.indices(data.item_ids)], dtype=torch.long)) - 1

    def score(histories):
        inputs = processor([data.item_ids[history].tolist() for history in histories])
        states = encoder(**inputs).last_hidden_state
        states = history_states(states, at_places(inputs["attention_mask"], model.config.encoder_stride))
        scores = states @ head.output_vectors(encoder.embed_tokens).T
        if head.evidence is not None:
            scores = head.evidence.add(scores, head.history_rows(inputs["input_ids"]), head.content)
        return scores[:, rows]

    return score


def _sasrec(data, quick: bool):
    from onerec_hf.baselines.next_items import pad_left
    from onerec_hf.trainers import fit_sequential

    model = fit_sequential(
        data.train_sequences.lists(), data.validation, item_ids=data.item_ids.tolist(), hidden_size=64, learning_rate=1e-3,
        num_train_epochs=1 if quick else 30, use_cpu=True,
    )  # fmt: skip
    return lambda histories: model(pad_left(histories, model.config.max_history)).logits


class Log:
    """The rows of the log that features are counted from, and the tables of users and videos."""

    def __init__(self, data, folder: Path):
        self.items = len(data.item_ids)
        rows: Any = pd.read_parquet(folder / "log_standard_4_25_to_5_08_pure.parquet").drop_duplicates()
        rows = rows.rename(columns=lambda name: name.removeprefix("is_")).rename(columns={"video_id": "item_id"})
        rows["timestamp"] = rows["time_ms"] // 1000
        rows = rows.assign(item=np.searchsorted(data.item_ids, rows["item_id"]).clip(max=self.items - 1))
        rows = rows[data.item_ids[rows["item"]] == rows["item_id"]]
        rows["positive"] = (rows[["long_view", "like", "follow", "forward"]] >= 1).any(axis=1)
        rows["ratio"] = (rows["play_time_ms"] / rows["duration_ms"].clip(lower=1)).clip(upper=3)
        self.rows = rows.sort_values(["user_id", "timestamp"], kind="stable").reset_index(drop=True)
        self.users = pd.read_parquet(folder / "user_features_pure.parquet").set_index("user_id")
        videos = pd.read_parquet(folder / "video_features_basic_pure.parquet").set_index("video_id")
        self.videos = videos.loc[data.item_ids].reset_index()
        # Of users that are held out only what lies before their validation target is training data.
        cut = pd.Series(np.iinfo(np.int64).max, index=data.sequences.user_ids)
        held_out = np.flatnonzero(data.sequences.lengths >= 3)
        cut.iloc[held_out] = data.sequences.timestamps[data.sequences.offsets[1:][held_out] - 2]
        before = self.rows["timestamp"].to_numpy() < cut.reindex(self.rows["user_id"]).fillna(0).to_numpy()
        others = ~self.rows["user_id"].isin(data.sequences.user_ids).to_numpy()  # without a positive row
        self.train = self.rows[before | others]

    def features(self, requests: Requests, found: np.ndarray, now: str) -> dict[str, pd.DataFrame]:
        """By group the features of all candidates, (users * candidates) rows."""
        users, width = found.shape
        who, item = np.repeat(np.arange(users), width), found.ravel()
        past = self._past(requests)
        times = past["time"] if now == "history" else requests.time
        return {
            "user": self._user(requests, who, item),
            "video": self._video(requests, who, item, times),
            "feedback": self._feedback(past, who, item),
            "time": self._time(requests, past, times, now, who, item),
        }

    def _past(self, requests: Requests) -> dict[str, Any]:
        """Rows of any feedback before the target: their places per user, and the time of the last one."""
        rows = self.rows
        owners = rows["user_id"].to_numpy()
        first = np.searchsorted(owners, requests.user_ids)
        key = owners.astype(np.int64) * 10**10 + rows["timestamp"].to_numpy()
        stop = np.searchsorted(key, requests.user_ids.astype(np.int64) * 10**10 + requests.time)
        return {
            "first": first,
            "stop": stop,
            "time": np.where(stop > first, rows["timestamp"].to_numpy()[stop - 1], requests.time),
        }

    def _user(self, requests, who, item) -> pd.DataFrame:
        """The user's columns as codes, and how much more popular a video is among users with the same value."""
        values = self.users.reindex(requests.user_ids)
        positive = self.train[self.train["positive"]]
        popularity = np.bincount(positive["item"], minlength=self.items)
        share, columns = popularity / popularity.sum(), {}
        for name in values.columns:
            both: Any = pd.concat([self.users[name], values[name]])
            codes = _codes(both)
            if codes.max() > 60:  # numbers and large vocabularies as quantiles
                buckets: Any = pd.qcut(pd.Series(codes), 20, labels=False, duplicates="drop")
                codes = _codes(buckets)
            of_user = pd.Series(codes[: len(self.users)], index=self.users.index)
            code = codes[len(self.users) :]
            columns[name] = code[who]
            counts = np.zeros((codes.max() + 1, self.items))
            np.add.at(counts, (of_user.reindex(positive["user_id"]).fillna(0).astype(int), positive["item"]), 1)
            expected = counts.sum(1, keepdims=True) * share
            columns[f"{name}_lift"] = np.log((counts + PRIOR) / (expected + PRIOR))[code[who], item]
        return pd.DataFrame(columns)

    def _video(self, requests, who, item, times) -> pd.DataFrame:
        """The video's columns, and how often the history has the same author, tag or type."""
        videos, columns = self.videos, {}
        for name in ("author_id", "tag", "video_type", "upload_type", "music_type", "server_width"):
            codes = _codes(videos[name])
            if codes.max() < 200:
                columns[name] = codes[item]
            columns[f"{name}_same"] = _shares(requests, codes, who, item)
        duration = videos["video_duration"].fillna(0).to_numpy() / 1000
        mean = np.array([np.log1p(duration[history]).mean() for history in requests.histories])
        columns["duration"] = duration[item]
        columns["duration_distance"] = np.log1p(duration)[item] - mean[who]
        uploaded = pd.to_datetime(videos["upload_dt"]).to_numpy().astype("datetime64[s]").astype(np.int64)
        columns["age"] = (times[who] - uploaded[item]) / DAY
        return pd.DataFrame(columns)

    def _feedback(self, past, who, item) -> pd.DataFrame:
        """Rates of videos, authors and tags over all that was shown in training, and what the user did with them before the target."""
        train, rows, columns = self.train, self.rows, {}
        mean = train["positive"].mean()
        of_tag = _codes(self.videos["tag"])
        of_author = _codes(self.videos["author_id"])
        for name, codes in (("item", np.arange(self.items)), ("author", of_author), ("tag", of_tag)):
            group = codes[train["item"]]
            shown = np.bincount(group, minlength=codes.max() + 1)
            for what in ("positive", "like", "follow", "forward", "comment", "click", "ratio"):
                total = np.bincount(group, weights=train[what], minlength=len(shown))
                rate = (total + PRIOR * train[what].mean()) / (shown + PRIOR)
                columns[f"{name}_{what}"] = rate[codes[item]]
            columns[f"{name}_shown"] = shown[codes[item]]
        users, seen = len(past["first"]), np.zeros(len(item))
        shown_tag, liked_tag = (np.zeros((users, of_tag.max() + 1)) for _ in range(2))
        summary = np.zeros((users, 6))
        width = len(item) // users
        items, positive, tab, ratio = (rows[name].to_numpy() for name in ("item", "positive", "tab", "ratio"))
        for user, (first, stop) in enumerate(zip(past["first"], past["stop"], strict=True)):
            if stop == first:  # all rows have the target's time
                continue
            some, good = items[first:stop], positive[first:stop]
            np.add.at(shown_tag[user], of_tag[some], 1)
            np.add.at(liked_tag[user], of_tag[some], good)
            summary[user] = len(some), good.mean(), ratio[first:stop].mean(), tab[stop - 1], good[-1], ratio[stop - 1]
            seen[user * width : (user + 1) * width] = np.isin(item[user * width : (user + 1) * width], some[~good])
        columns |= dict(
            zip(("rows", "rate", "watched", "last_tab", "last_positive", "last_watched"), summary[who].T, strict=True)
        )
        columns["skipped"] = seen
        columns["tag_shown_to_user"] = shown_tag[who, of_tag[item]]
        columns["tag_rate_of_user"] = (liked_tag[who, of_tag[item]] + PRIOR * mean) / (
            shown_tag[who, of_tag[item]] + PRIOR
        )
        return pd.DataFrame(columns)

    def _time(self, requests, past, times, now, who, item) -> pd.DataFrame:
        """How often a video was shown and watched in the last days before the request, hour, weekday, and the time since the last row."""
        columns = {"hour": (times // 3600 % 24)[who], "weekday": ((times // DAY + 3) % 7)[who]}
        if now == "request":
            columns["gap"] = (times - past["time"])[who]
        train: Any = self.train
        for what, some in (("positive", train[train["positive"]]), ("shown", train)):
            stamps = some["timestamp"].to_numpy()
            key = np.sort(some["item"].to_numpy().astype(np.int64) * 10**10 + stamps)
            total = np.sort(stamps)
            at = np.searchsorted(key, item.astype(np.int64) * 10**10 + times[who])
            for days in (0.25, 1, 3, 7):
                span = int(days * DAY)
                start = np.searchsorted(key, item.astype(np.int64) * 10**10 + times[who] - span)
                of_all = np.searchsorted(total, times) - np.searchsorted(total, times - span)
                columns[f"{what}_{days:g}d"] = at - start
                columns[f"{what}_{days:g}d_share"] = (at - start + 0.1) / (of_all[who] + 0.1 * self.items)
            latest = key[np.maximum(at - 1, 0)]
            columns[f"since_{what}"] = np.where(
                latest // 10**10 == item, times[who] - latest % 10**10, 30 * DAY
            )  # fmt: skip
        hours = train[train["positive"]]
        by_hour = np.zeros((4, self.items))
        np.add.at(by_hour, ((hours["timestamp"] // 3600 % 24 // 6).to_numpy(), hours["item"].to_numpy()), 1)
        expected = by_hour.sum(1, keepdims=True) * by_hour.sum(0) / by_hour.sum()
        columns["hour_lift"] = np.log((by_hour + PRIOR) / (expected + PRIOR))[(times // 3600 % 24 // 6)[who], item]
        return pd.DataFrame(columns)


def _codes(column: pd.Series) -> np.ndarray:
    """Codes of a column's values, ascending, with one for missing values."""
    return pd.factorize(column, sort=True, use_na_sentinel=False)[0]


def _shares(requests: Requests, codes: np.ndarray, who: np.ndarray, item: np.ndarray) -> np.ndarray:
    """How many items of the history have the candidate's value."""
    counts = np.zeros((len(requests.histories), codes.max() + 1), np.float32)
    for user, history in enumerate(requests.histories):
        np.add.at(counts[user], codes[history], 1)
    return counts[who, codes[item]]


def ranked(tables, groups, sides, found, rounds) -> tuple[np.ndarray, str]:
    """(users, candidates) scores of rankers that were trained on the validation targets of other users, and the features with the largest gain."""
    import lightgbm

    matrices = {side: pd.concat([tables[side][group] for group in groups], axis=1) for side in tables}
    values = {side: matrix.to_numpy(np.float32) for side, matrix in matrices.items()}
    users, width = found["test"][0].shape
    fold = np.random.default_rng(0).permutation(users) % FOLDS
    scores, gains = np.zeros((users, width)), 0.0
    hits = found["validation"][0] == sides["validation"].target[:, None]
    settings = {
        "objective": "lambdarank", "learning_rate": 0.05, "num_leaves": 8, "min_data_in_leaf": 500, "feature_fraction": 0.5,
        "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 10.0, "num_threads": 1, "verbosity": -1, "seed": 0,
    }  # fmt: skip
    for number in range(FOLDS):
        learned = (fold != number) & hits.any(1)
        pick = np.repeat(learned, width)
        train = lightgbm.Dataset(
            values["validation"][pick], hits[learned].ravel().astype(int), group=[width] * int(learned.sum()),
            init_score=found["validation"][1][learned].ravel(),
        )  # fmt: skip
        booster = lightgbm.train(settings, train, rounds)
        of = fold == number
        more = np.asarray(booster.predict(values["test"][np.repeat(of, width)])).reshape(-1, width)
        scores[of] = found["test"][1][of] + more
        gains = gains + booster.feature_importance("gain")
    order = np.argsort(-np.asarray(gains))[:8]
    return scores, ", ".join(matrices["test"].columns[order])


def gains_of(scores: np.ndarray, found: np.ndarray, requests: Requests) -> dict[str, np.ndarray]:
    """(users,) NDCG@10 and recall@10 of the candidates by these scores."""
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    order = np.argsort(-np.broadcast_to(scores, found.shape), axis=1, kind="stable")
    best, relevant = np.take_along_axis(found, order, axis=1)[:, :10], requests.target[:, None]
    return {
        "ndcg@10": np.asarray(ndcg_at_k(best, relevant, 10, per_row=True)),
        "recall@10": np.asarray(recall_at_k(best, relevant, 10, per_row=True)),
    }


if __name__ == "__main__":
    main()
