"""
Iterative preference alignment as a row of the contest (OneRec paper, section 3.3). The data says what was bought next and not how much it was
liked, so the reward is a ranking model's: SASRec's score of the item after the history, trained on the same sequences as the generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.alignment.preferences import align_on

SHARED: dict[str, Any] = {
    "examples": 20_000,  # windows that the training goes on with
    "num_train_epochs": 3,  # IPA draws anew in each
    "reward_epochs": 15,
    "dpo_weight": 1.0,
    "dpo_ratio": 0.1,
    "num_candidates": 16,
    "candidates": "beam",
    "beta": 0.1,
    "learning_rate": 3e-4,
}


def align(model, processor, contest, windows, settings: dict[str, Any]) -> None:
    """
    Goes on training `model`, in place.

    Args:
        windows: examples with a session of one item.
        settings: over SHARED, and of [`OneRecDPOConfig`]; `dpo_weight` 0 is the same training without preferences.
    """
    merged = {**SHARED, **settings}
    drawn = np.random.default_rng(contest.seed).permutation(len(windows))[: merged.pop("examples")]
    reward = ranking_reward(contest, processor, merged.pop("reward_epochs"))
    align_on(model, reward, windows.select(np.sort(drawn)), processor, contest.seed, merged)


def ranking_reward(contest, processor, epochs: int):
    """A reward function: the mean score of a session's items by a SASRec that saw the training sequences so many times."""
    import torch

    from onerec_hf.baselines.next_items import pad_left
    from onerec_hf.trainers import fit_sequential

    catalogue = processor.catalogue
    judge = fit_sequential(
        contest.data.split.train_sequences,
        item_ids=catalogue.item_ids,
        hidden_size=64,
        num_hidden_layers=1,
        dropout_rate=0.5,
        max_history=processor.max_history,
        num_train_epochs=epochs,
        seed=contest.seed,
    )

    @torch.no_grad()
    def reward(histories: list[list], sessions: list[list]) -> list[float]:
        inputs = pad_left([catalogue.rows(history) for history in histories], processor.max_history)
        scores = judge(inputs.to(judge.device)).logits
        return [
            float(scores[place, torch.as_tensor(catalogue.rows(session))].mean())
            for place, session in enumerate(sessions)
        ]

    return reward
