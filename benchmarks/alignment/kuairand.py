"""
Data of the alignment benchmark: KuaiRand-Pure, split by days into training data of the generator, of the picking reward model and of the judge, and
the test users.

    8 to 24 April   histories, and the generator's sliding windows over them
    25 to 30 April  windows of the picking reward model; what was watched in them is the generator's session after the history
    1 to 5 May      windows of the judge, a reward model of another seed that never picks
    6 to 8 May      test users: settings are chosen on 800, the table is of 1,000 others
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

SESSION_LENGTH, MAX_HISTORY = 5, 30
# Follows are too rare to learn (21 test sessions with one), and likes, as a multiple of their base rate, would outweigh all else.
WEIGHTS = {"swt": 1.0, "vtr": 1.0, "ltr": 0.2}


@dataclass
class World:
    """Everything but the generators, for one seed."""

    seed: int
    processor: Any
    windows: Any  # history, session: sliding windows and what followed the histories
    prompts: Any  # the rows that alignment trains on
    picker: Any
    judge: Any
    items: Any  # RewardItems: item ids to rows
    features: np.ndarray
    test_windows: Any  # labelled windows of the test days, of all users
    users: dict[str, Any]  # "validation", "test": history and session (what was watched)
    observed: Any  # DataFrame: per item, mean feedback on the test days
    sequences: list[Any]  # long views in time order, of all users, before May
    description: str


def load_world(folder: str, seed: int, quick: bool = False) -> World:
    """Data, semantic IDs and both reward models of one seed."""
    from datasets import concatenate_datasets

    from onerec_hf import OneRecProcessor
    from onerec_hf.data import load_kuairand_feedback
    from onerec_hf.semantic_ids import fit_semantic_ids
    from onerec_hf.workflows.reward_training import RewardModelSettings, new_reward_model

    feedback = load_kuairand_feedback(folder, validation_start=20220501, test_start=20220506)
    torch.manual_seed(seed)
    picker, items, features = new_reward_model(feedback, RewardModelSettings(), WEIGHTS)
    torch.manual_seed(1000 + seed)
    judge, _, _ = new_reward_model(feedback, RewardModelSettings(), WEIGHTS)
    fitted = fit_semantic_ids(items.item_ids, features, [128, 128, 128], seed=seed)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=MAX_HISTORY)

    log = pd.read_parquet(Path(folder) / "log_standard_4_25_to_5_08_pure.parquet").drop_duplicates(ignore_index=True)
    log = log.sort_values(["user_id", "time_ms"], kind="stable")
    watched = log[log["long_view"] == 1]
    past = pd.read_parquet(Path(folder) / "history_4_08_to_4_24_pure.parquet")
    histories = dict(zip(past["user_id"].tolist(), past["long_watch_seq"].map(list), strict=True))
    after = _watched_after(watched[watched["date"] < 20220501], histories)
    windows = _sliding(histories)
    test = _watched_after(watched[watched["date"] >= 20220506], histories)
    drawn = np.random.default_rng(7).permutation(len(test))  # the same users for every seed
    validation, test = test.select(np.sort(drawn[:800])), test.select(np.sort(drawn[800:1800]))
    if quick:
        windows, after, validation, test = (part.select(range(60)) for part in (windows, after, validation, test))
    return World(
        seed,
        processor,
        concatenate_datasets([windows, after]).shuffle(seed=seed),
        after.shuffle(seed=seed),
        _train_reward(picker, feedback.train, seed, quick),
        _train_reward(judge, feedback.validation, 1000 + seed, quick),
        items,
        features,
        feedback.test.select(range(200)) if quick else feedback.test,
        {"validation": validation, "test": test},
        _observed(log[log["date"] >= 20220506]),
        [np.asarray(h) for h in histories.values() if len(h) > 1],
        feedback.description,
    )


def _watched_after(rows: Any, histories: dict[Any, list]) -> Any:
    """Users with a history and at least two long views: the history and the first views of the period."""
    from datasets import Dataset

    groups: dict[Any, list] = {user: part.tolist() for user, part in rows.groupby("user_id")["video_id"]}
    kept = [user for user, viewed in groups.items() if len(viewed) >= 2 and len(histories.get(user, [])) >= 5]
    made = [
        {"history": [int(i) for i in histories[u]], "session": list(dict.fromkeys(groups[u]))[:SESSION_LENGTH]}
        for u in kept
    ]
    return Dataset.from_list(made)


def _sliding(histories: dict[int, list]) -> Any:
    """Windows of SESSION_LENGTH over the histories, five apart."""
    from onerec_hf.data.sequences import UserSequences
    from onerec_hf.data.windows import window_examples

    rows = pd.DataFrame(
        [(user, item, place) for user, items in histories.items() for place, item in enumerate(items)],
        columns=["user_id", "item_id", "timestamp"],
    )
    sequences = UserSequences.from_interactions(rows)
    return window_examples(sequences, SESSION_LENGTH, MAX_HISTORY, stride=SESSION_LENGTH).remove_columns("user_id")


def _observed(log: Any) -> pd.DataFrame:
    """Per item: impressions, share of long views and of likes on the test days, drawn towards the mean of all by ten impressions' worth."""
    sums = log.groupby("video_id").agg(
        shown=("long_view", "size"), vtr=("long_view", "sum"), ltr=("is_like", "sum"), wtr=("is_follow", "sum")
    )
    for name in ("vtr", "ltr", "wtr"):
        mean = sums[name].sum() / sums["shown"].sum()
        sums[name] = (sums[name] + 10 * mean) / (sums["shown"] + 10)
    return sums


def _train_reward(model, windows, seed: int, quick: bool):
    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        settings = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args = RewardTrainingArguments(scratch, num_train_epochs=2, seed=seed, use_cpu=True, **settings)
        if quick:
            args.max_steps = 5
        RewardTrainer(model, args, windows).train()
    return model.eval()
