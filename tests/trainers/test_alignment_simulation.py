"""
Alignment in a world whose preferences are known: does the true expected reward of generated sessions rise over training on next tokens alone?

Two kinds of users like one half of the items each. What was logged followed popularity three times out of four, so a generator of the next session
learns to continue what was shown; the reward model sees likes, drawn at random, of logged sessions alone.
"""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import ttest_rel

from onerec_hf import ItemCatalogue, OneRecForSessionReward, OneRecProcessor, OneRecRewardConfig, RewardItems
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    RewardTrainer,
    RewardTrainingArguments,
)
from tests.conftest import make_model

ITEMS, SESSION, LIKED, OTHER = 40, 2, 0.9, 0.1
QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}


def log(rng: np.random.Generator, users: int = 1200) -> Dataset:
    """Histories betray the user's kind: four of five items are of the liked half."""
    popularity = 1 / np.arange(1, ITEMS + 1) ** 0.7
    popularity /= popularity.sum()
    rows = []
    for _ in range(users):
        kind = int(rng.integers(2))
        own = np.flatnonzero(np.arange(ITEMS) % 2 == kind)
        history = [int(rng.choice(own)) if rng.random() < 0.8 else int(rng.integers(ITEMS)) for _ in range(5)]
        taste = np.where(np.arange(ITEMS) % 2 == kind, popularity, 0)
        shown = 0.75 * popularity + 0.25 * taste / taste.sum()
        session = rng.choice(ITEMS, SESSION, replace=False, p=shown)
        likes = rng.random(SESSION) < np.where(session % 2 == kind, LIKED, OTHER)
        rows.append(
            {
                "kind": kind,
                "history": [f"m{i}" for i in history],
                "session": [f"m{i}" for i in session],
                "labels": [float(likes.mean())],
            }
        )
    return Dataset.from_list(rows)


def true_reward(model, processor: OneRecProcessor, users: Dataset) -> float:
    """Expected share of likes in the four most probable sessions."""
    histories = users["history"][:]
    out = model.eval().recommend(**processor(histories), num_beams=8, num_return_sequences=4, exclude=histories)
    rates = [
        np.mean([LIKED if int(item[1:]) % 2 == kind else OTHER for item in session])
        for session, kind in zip(processor.batch_decode(out), np.repeat(users["kind"][:], 4), strict=True)
    ]
    return float(np.mean(rates))


def aligned_and_control(seed: int, folder) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    train, users = log(rng), log(rng, 100)
    # As semantic IDs do, the first code tells what is alike: its parity is the kind.
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (4, 4, 4))[::-1], axis=1)
    catalogue = ItemCatalogue([f"m{i}" for i in range(ITEMS)], codes, (4, 4, 4))
    processor = OneRecProcessor.from_catalogue(catalogue)
    torch.manual_seed(seed)
    config = OneRecRewardConfig(
        num_items=ITEMS,
        objectives=["ltr"],
        base_rates=[0.5],
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        initializer_range=0.3,
        dropout_rate=0.0,
    )
    reward = OneRecForSessionReward(config)
    reward.set_items(RewardItems([f"m{i}" for i in range(ITEMS)]))
    args = RewardTrainingArguments(
        str(folder), num_train_epochs=10, learning_rate=1e-2, per_device_train_batch_size=100, seed=seed, **QUIET
    )
    RewardTrainer(reward, args, train).train()
    base = make_model(catalogue, seed=seed, initializer_range=0.1)
    args = OneRecTrainingArguments(
        str(folder), num_train_epochs=6, learning_rate=5e-3, per_device_train_batch_size=100, seed=seed, **QUIET
    )
    OneRecTrainer(base, args, train_dataset=train, processing_class=processor).train()
    rows, found = train.select(range(200)).select_columns(["history", "session"]), []
    # The control takes the same steps, on next tokens alone.
    for settings in ({"dpo_ratio": 0.5}, {"dpo_weight": 0.0, "dpo_ratio": 0.01}):
        args = OneRecDPOConfig(
            str(folder),
            num_train_epochs=5,
            learning_rate=2e-3,
            per_device_train_batch_size=25,
            beta=0.3,
            num_candidates=12,
            candidates="sample",
            draw_batch_size=100,
            bf16=False,
            seed=seed,
            **settings,
            **QUIET,
        )
        model = copy.deepcopy(base)
        OneRecDPOTrainer(model, reward, args=args, train_dataset=rows, processing_class=processor).train()
        found.append(true_reward(model, processor, users))
    return found[0], found[1]


@pytest.mark.slow
def test_true_reward_rises_over_next_tokens_alone(tmp_path):
    aligned, control = zip(*(aligned_and_control(seed, tmp_path) for seed in range(4)), strict=True)
    test = ttest_rel(aligned, control, alternative="greater")
    assert test.pvalue < 0.01, (aligned, control)
    assert np.mean(aligned) > np.mean(control) + 0.05, (aligned, control)
