"""Which of a user's candidate sessions become a preference pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# From the rewards of one user's candidates, best-scored by the generator first, to (chosen, rejected) places in them; for S-DPO several
# rejected ones.
Selection = Callable[[np.ndarray, np.random.Generator], list[tuple[int, int]] | list[tuple[int, list[int]]]]


def best_worst(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """
    The candidate of the largest reward and that of the smallest (OneRec paper, equations 8 and 9); of equal ones the first.

    Example:
        >>> best_worst(np.array([0.2, 0.9, 0.1]), np.random.default_rng(0))
        [(1, 2)]
    """
    return [(int(rewards.argmax()), int(rewards.argmin()))]


def random_pair(rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """
    Two candidates at random, the one with the larger reward chosen: the paper's "DPO" row beside its own best and worst.

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
    The best with the worst, the second best with the second worst, ... up to k pairs.

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
    S-DPO's rows: of `several + 1` candidates at random the one with the largest reward is chosen, the rest is rejected.

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
