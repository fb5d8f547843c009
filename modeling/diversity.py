"""
Sessions that share few items (`diversity` of `recommend()`): one after another, each the best by its log-probability less a penalty for every item
that it shares with an earlier one. It is diverse beam search (Vijayakumar et al. 2018, arXiv 1610.02424) with a group of beams per session, where the
penalty is on items of complete sessions, wherever they stand, in place of tokens at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .beam_search import Beams
from .constraint import SemanticIDTrie, SharedItemPenalty


class SessionDiversity:
    """
    The search for `count` sessions per user that share few items. The first is the best one of a search without a penalty. Each other one is the
    best by log-probability less penalty among all beams that were found: those of its own search, with `num_beams / (count - 1)` beams, and those
    of the searches before it. The searches for two or more other sessions together have the beams of the first one.

    Args:
        strength: 1 takes the score of an item drawn at random, `log(items)`, for each item that two sessions share.
        count: sessions.
        weights: (items,) what the log-probabilities of an item at each place of a session are multiplied by; the penalty is as well.
        trie: the catalogue's semantic IDs.
    """

    def __init__(self, strength: float, count: int, weights: torch.Tensor, trie: SemanticIDTrie):
        self.count, self.trie, self.weights = count, trie, weights * (strength * math.log(trie.num_leaves))

    def search(self, run: Callable[..., Beams], num_beams: int) -> Beams:
        """
        (users, count) sessions in the order of their choice, with their scores without the penalty; -inf where no other session was left.

        Args:
            run: [`beam_search`] for the users, which takes `num_beams` and `penalty`.
        """
        found = run(num_beams)
        chosen = Beams(found.leaves[:, :1], found.scores[:, :1])
        for _ in range(1, self.count):
            used = torch.where(chosen.scores.isfinite()[..., None], chosen.leaves, -1).flatten(1)
            penalty = SharedItemPenalty(self.trie, used, self.weights)
            found = _beside(found, run(max(1, num_beams // (self.count - 1)), penalty=penalty))
            shared = (found.leaves[..., None] == used[:, None, None]).sum(-1)
            again = (found.leaves[:, :, None] == chosen.leaves[:, None]).all(-1).any(-1)
            scores = found.scores.masked_fill(again, float("-inf"))
            best = (scores - shared.to(scores.dtype) @ self.weights).argmax(1, keepdim=True)
            leaves = found.leaves.gather(1, best[..., None].expand(-1, -1, found.leaves.shape[2]))
            chosen = _beside(chosen, Beams(leaves, scores.gather(1, best)))
        return chosen


def _beside(first: Beams, second: Beams) -> Beams:
    """The beams of both, for the same users."""
    return Beams(torch.cat([first.leaves, second.leaves], 1), torch.cat([first.scores, second.scores], 1))


__all__ = ["SessionDiversity"]
