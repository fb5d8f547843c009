"""A penalty of beam search on the items of earlier sessions."""

from __future__ import annotations

import torch

from .constraint import SemanticIDTrie


class SharedItemPenalty:
    """
    What items that are in earlier sessions take from the beams that generate them again. A prefix of codes has an item's penalty by that item's
    share of the items below it, the complete item has all of it: beams turn to other prefixes before the last code.

    Args:
        trie: the catalogue's semantic IDs, on the device of the leaves.
        leaves: (users, n) leaves of the earlier sessions' items, -1 where there is none; an item of two sessions counts twice.
        weights: (items,) nats of an item at each place of the new session.

    Example:
        >>> trie = SemanticIDTrie([[0, 0], [0, 1], [1, 1]], codebook_sizes=[2, 2])
        >>> penalty = SharedItemPenalty(trie, leaves=torch.tensor([[1]]), weights=torch.tensor([4.0]))
        >>> root = torch.zeros(1, 1, dtype=torch.long)
        >>> penalty.of_children(0, 0, root, width=2).tolist()  # one of the two items below code 0
        [[[2.0, 0.0]]]
        >>> penalty.of_children(0, 1, root, width=2).tolist()
        [[[0.0, 4.0]]]
    """

    def __init__(self, trie: SemanticIDTrie, leaves: torch.Tensor, weights: torch.Tensor):
        self.weights, self._nodes, self._shares = weights, [], []
        for level in range(trie.num_levels):
            nodes = trie.ancestors(level, leaves.clamp(min=0))
            self._shares.append(1.0 / (trie.leaves[level][nodes + 1] - trie.leaves[level][nodes]))
            self._nodes.append(torch.where(leaves < 0, -1, nodes))

    def of_children(self, item: int, level: int, first: torch.Tensor, width: int) -> torch.Tensor:
        """(users, beams, width) nats of the `width` nodes of a level from `first` (users, beams) on, for a session's item number `item`."""
        nodes, shares = self._nodes[level][:, None], self._shares[level][:, None]
        column = nodes - first[..., None]
        # Nodes below other parents go into an extra column.
        column = torch.where((nodes >= 0) & (column >= 0) & (column < width), column, width)
        found = shares.new_zeros(*first.shape, width + 1).scatter_add_(2, column, shares.expand_as(column))
        return found[..., :width] * self.weights[item]


__all__ = ["SharedItemPenalty"]
