"""
Item scores as a guide of beam search (`config.item_score_weight`): the probabilities of the items below a node of the catalogue's trie, added up,
are the node's, so that the scores count from a session's first code on, and not only among the items that the decoder found by itself.
"""

from __future__ import annotations

import torch

from .trie_onerec import SemanticIDTrie


def node_scores(trie: SemanticIDTrie, leaf_scores: torch.Tensor, weight: float) -> list[torch.Tensor]:
    """
    `weight` times the log of the probability below each node, per level (users, nodes) float32. Along the codes of an item they telescope: what the
    codes add one after the other is `weight` times the item's own.

    Args:
        leaf_scores: (users, leaves) float32 log-probabilities of items, -inf of those that a user must not get.
        weight: positive.

    Example:
        >>> trie = SemanticIDTrie([[0, 0], [0, 1], [1, 1]], codebook_sizes=[2, 2])
        >>> levels = node_scores(trie, torch.tensor([[0.5, 0.3, 0.2]]).log(), weight=1.0)
        >>> [level.exp() for level in levels]
        [tensor([[0.8000, 0.2000]]), tensor([[0.5000, 0.3000, 0.2000]])]
    """
    largest = leaf_scores.amax(1, keepdim=True)
    shares, leaves = (leaf_scores - largest).exp(), torch.arange(trie.num_leaves, device=leaf_scores.device)
    tiny = torch.finfo(shares.dtype).tiny  # what is too improbable for a float stays possible
    levels = []
    for level in range(trie.num_levels - 1):
        below = shares.new_zeros(len(shares), len(trie.codes[level]))
        below.index_add_(1, trie.ancestors(level, leaves), shares)
        levels.append((below.clamp_(min=tiny).log_() + largest) * weight)
    return [*levels, leaf_scores * weight]


__all__ = ["node_scores"]
