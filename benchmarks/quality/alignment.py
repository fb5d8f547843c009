"""
Iterative preference alignment as an experiment (OneRec paper, section 3.3). The data says what was bought next and not how much it was liked, so the
reward is the score of a ranking model: a SASRec that was trained on the same sequences as the generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.alignment.preferences import align_on

DEFAULTS: dict[str, Any] = {
    "examples": 20_000,  # training windows
    "num_train_epochs": 3,  # pairs are drawn anew in each
    "reward_epochs": 15,
    "dpo_weight": 1.0,
    "dpo_ratio": 0.1,
    "num_candidates": 16,
    "candidates": "beam",
    "beta": 0.1,
    "learning_rate": 3e-4,
}
QUICK: dict[str, Any] = {"examples": 200, "num_train_epochs": 1, "reward_epochs": 1}


def align(model, processor, benchmark, windows, settings: dict[str, Any]) -> None:
    """
    Trains `model` on, in place.

    Args:
        windows: examples with a session of one item.
        settings: over DEFAULTS, of [`OneRecDPOConfig`]; `dpo_weight` 0 is the same training without preferences.
    """
    merged = {**DEFAULTS, **settings, **(QUICK if benchmark.quick else {})}
    drawn = np.random.default_rng(benchmark.seed).permutation(len(windows))[: merged.pop("examples")]
    reward = ranking_reward(benchmark, processor, merged.pop("reward_epochs"))
    align_on(model, reward, windows.select(np.sort(drawn)), processor, benchmark.seed, merged)


def ranking_reward(benchmark, processor, epochs: int):
    """A reward function: the mean score of a session's items by a SASRec after so many epochs on the training sequences."""
    import torch

    from onerec_hf.baselines.next_items import pad_left
    from onerec_hf.trainers import fit_sequential

    catalogue = processor.catalogue
    ranker = fit_sequential(
        benchmark.sequences(),
        item_ids=catalogue.item_ids,
        hidden_size=64,
        num_hidden_layers=1,
        dropout_rate=0.5,
        max_history=processor.max_history,
        num_train_epochs=epochs,
        seed=benchmark.seed,
    )

    @torch.no_grad()
    def reward(histories: list[list], sessions: list[list]) -> list[float]:
        inputs = pad_left([catalogue.indices(history) for history in histories], processor.max_history)
        scores = ranker(inputs.to(ranker.device)).logits
        return [
            float(scores[place, torch.as_tensor(catalogue.indices(session))].mean())
            for place, session in enumerate(sessions)
        ]

    return reward
