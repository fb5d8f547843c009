"""Selects preference pairs from a user's candidate sessions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Maps the rewards of one user's candidates (in the order of the generator's scores) to (chosen, rejected) positions; for S-DPO with
# several rejected ones.
Selection = Callable[[np.ndarray, np.random.Generator], list[tuple[int, int]] | list[tuple[int, list[int]]]]


def best_worst(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """
    The candidates with the largest and the smallest reward (OneRec paper, equations 8 and 9); the first one in ties.

    Example:
        >>> best_worst(np.array([0.2, 0.9, 0.1]), np.random.default_rng(0))
        [(1, 2)]
    """
    return [(int(rewards.argmax()), int(rewards.argmin()))]


def random_pair(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """
    Two random candidates, of which the one with the larger reward is chosen: the paper's "DPO" row.

    Example:
        >>> chosen, rejected = random_pair(np.array([0.2, 0.9]), np.random.default_rng(0))[0]
        >>> (chosen, rejected)
        (1, 0)
    """
    if len(rewards) < 2:
        return []
    a, b = rng.choice(len(rewards), size=2, replace=False)
    return [(int(a), int(b)) if rewards[a] >= rewards[b] else (int(b), int(a))]


def top_k_pairs(k: int) -> Selection:
    """
    Pairs the best with the worst candidate, the second best with the second worst, ... up to k pairs.

    Example:
        >>> top_k_pairs(2)(np.array([0.3, 0.1, 0.4, 0.2, 0.9]), np.random.default_rng(0))
        [(4, 1), (2, 3)]
    """

    def select(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
        order = np.argsort(-rewards, kind="stable")
        return [(int(order[i]), int(order[-1 - i])) for i in range(min(k, len(order) // 2))]

    return select


def one_against(several: int) -> Selection:
    """
    Rows for S-DPO: of `several + 1` random candidates, the one with the largest reward is chosen and the others are rejected.

    Example:
        >>> chosen, rejected = one_against(2)(np.array([0.3, 0.1, 0.4]), np.random.default_rng(0))[0]
        >>> chosen, sorted(rejected)
        (2, [0, 1])
    """

    def select(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, list[int]]]:
        if len(rewards) <= several:
            return []
        drawn = rng.choice(len(rewards), size=several + 1, replace=False)
        chosen = int(drawn[rewards[drawn].argmax()])
        return [(chosen, [int(place) for place in drawn if place != chosen])]

    return select


SELECTIONS: dict[str, Selection] = {"best_worst": best_worst, "random": random_pair}
