"""One short round of preference alignment from ratings, for `onerec-hf quickstart`, with a held-out reward model."""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.alignment import session_reward
from onerec_hf.workflows.artefact import find_origin, save_trained, write_origin
from onerec_hf.workflows.dataset import InMemoryDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.semantic_ids import embed_items
from onerec_hf.workflows.settings import SemanticIDSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

EXAMPLES, USERS = 1280, 400


def align_once(trainer, data: InMemoryDataset, folder: Path, seed: int, command: str) -> list[dict[str, Any]]:
    """
    Trains two reward models on the ratings of two halves of the users, aligns a copy of the trained generator with the first one for one
    iteration, and scores sessions for test users with both. The aligned model goes into `folder / "aligned"`, with a card that names `command`.

    Returns:
        Result rows: mean reward of a session before and after, by the reward model that picked the pairs and by the held-out one; none
        without ratings.
    """
    halves = rated_windows(data)
    if halves is None:
        say(
            "no column 'rating' to learn a reward from: the round of preference alignment is left out (onerec-hf align --help)"
        )
        return []
    from onerec_hf.hub_cards import Alignment, Training, write_generator_card
    from onerec_hf.trainers import OneRecDPOConfig, OneRecDPOTrainer

    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    features = embed_items(data, SemanticIDSettings()).vectors
    processor, rows = trainer.processing_class, data.train
    rng = np.random.default_rng(seed)
    prompts = rows.select(np.sort(rng.choice(len(rows), size=min(EXAMPLES, len(rows)), replace=False)))
    say(f"alignment: two reward models of ratings, then DPO with {len(prompts):,} training examples")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        picker, judge = (
            small_reward_model(windows, data, features, seed + place, {**quiet, "output_dir": scratch})
            for place, windows in enumerate(halves)
        )
        args = OneRecDPOConfig(
            scratch,
            num_train_epochs=1,
            dpo_ratio=0.2,
            num_candidates=16,
            candidates="sample",
            per_device_train_batch_size=64,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            draw_batch_size=64,
            activation_checkpointing=False,
            bf16=False,
            seed=seed,
            **quiet,
        )
        aligned = OneRecDPOTrainer(
            copy.deepcopy(trainer.model),
            picker.reward,
            args=args,
            train_dataset=prompts,
            processing_class=processor,
        )
        aligned.train()
        save_trained(aligned, folder / "aligned")
    write_origin(folder / "aligned", find_origin(folder))
    examples = data.test.select(range(min(USERS, len(data.test)))).to_list()
    found = []
    models = {"before": trainer.model, "after": aligned.model}
    for when, model in models.items():
        for name, reward in (("reward", picker), ("heldout_reward", judge)):
            mean = session_reward(model, processor, examples, [reward])
            found.append(result_row(f"{name}/{when}", mean, "rating"))
    write_generator_card(
        folder / "aligned",
        processor,
        cast("OneRecForConditionalGeneration", aligned.model),
        data,
        data.protocol,
        found,
        counts=data.counts(),
        training=Training.of(aligned),
        alignment=Alignment.of(aligned),
        command=command,
    )
    values = {row["name"]: row["value"] for row in found}
    say(
        f"one round of preference alignment ({len(aligned.pairs)} pairs): mean predicted rating of a generated session "
        f"{values['reward/before']:.3f} -> {values['reward/after']:.3f} by the reward model that picked the pairs, "
        f"{values['heldout_reward/before']:.3f} -> {values['heldout_reward/after']:.3f} by one trained on other users (0 to 1, {len(examples)} "
        f"test users); saved to {folder / 'aligned'}"
    )
    return found


def rated_windows(data: InMemoryDataset) -> tuple[Dataset, Dataset] | None:
    """
    Windows of 5 to 10 rated items with their mean rating between 0 and 1, of every second user and of the others. A user's history is the first half of
    what was rated before the validation item, windows are cut from the second.
    """
    from onerec_hf.data import DataError, feedback_windows

    table: Any = data.source.interactions
    if "rating" not in table or table["rating"].isna().any() or table["rating"].nunique() < 2:
        return None
    rows = data.validation[:]
    held_out = {user: session[0] for user, session in zip(rows["user_id"], rows["session"], strict=True)}
    known = table[table["item_id"].isin(data.item_ids.tolist())]
    lowest, highest = known["rating"].min(), known["rating"].max()
    known = known.assign(rating=(known["rating"] - lowest) / (highest - lowest))
    histories, later = {}, []
    for user, rows in known.groupby("user_id", sort=True):
        items = rows["item_id"].tolist()
        before = items.index(held_out[user]) if held_out.get(user) in items else len(items)
        half = before // 2
        histories[user] = items[:half]
        later.append(rows.iloc[half:before])
    try:
        windows = feedback_windows(pd.concat(later), {"rating": "rating"}, histories)
    except DataError:
        return None
    second = np.unique(np.array(windows["user_id"][:]), return_inverse=True)[1] % 2 == 1
    if second.all() or not second.any():
        return None
    return windows.select(np.flatnonzero(~second)), windows.select(np.flatnonzero(second))


def small_reward_model(
    windows: Dataset, data: InMemoryDataset, features: np.ndarray, seed: int, settings: dict[str, Any]
) -> OneRecForSessionReward:
    """A small reward model of the mean rating, two epochs."""
    import torch

    from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
    from onerec_hf.data import label_matrix
    from onerec_hf.trainers import RewardTrainer, RewardTrainingArguments

    torch.manual_seed(seed)
    config = OneRecRewardConfig(
        num_items=len(data.item_ids),
        item_feature_dim=features.shape[1],
        objectives=["rating"],
        base_rates=label_matrix(windows).mean(0).clip(1e-3, 1 - 1e-3).tolist(),
        score_fusion="probability",
        max_history=20,
        hidden_size=32,
        intermediate_size=64,
    )
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(data.item_ids), features)
    args = RewardTrainingArguments(num_train_epochs=2, seed=seed, **settings)
    RewardTrainer(model, args, windows).train()
    return model.eval()
