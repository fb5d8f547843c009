"""
Which items may be generated: the catalogue's trie, what each request allows or excludes, and no item twice in a session.

Everything here is in the trie's own terms (nodes and their children), for all users and beams at once, in shapes that depend on the catalogue
and the request alone.
"""

from __future__ import annotations

import copy

import torch

from .trie_onerec import SemanticIDTrie


class CatalogueConstraint:
    """
    The children of a beam's node that lead to an item it may still generate.

    Args:
        trie: the catalogue's semantic IDs, on the device of the scores.
        excluded: (users, e) int64 leaves that a user must not get, padded with -1.
        allowed: (users, a) int64 leaves, the only ones that a user may get, padded with -1; all where not given.
        distinct: whether an item may stand only once in a session.

    `users` is their number, None where the request names no items.

    Raises:
        ValueError: a user who is left no item.

    Example:
        >>> trie = SemanticIDTrie([[0, 0], [0, 1], [1, 1]], codebook_sizes=[2, 2])
        >>> constraint = CatalogueConstraint(trie, excluded=torch.tensor([[2]]))
        >>> root, nothing_yet = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 0, dtype=torch.long)
        >>> constraint.legal_children(0, root, nothing_yet).tolist()  # the only item below code 1 is excluded
        [[[True, False]]]
    """

    def __init__(
        self,
        trie: SemanticIDTrie,
        excluded: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
        distinct: bool = True,
    ):
        self.trie, self.distinct = trie, distinct
        # One of the two lists at most is kept, sorted: what is allowed (less what is excluded), or else what is excluded.
        self.allowed, self.excluded, self.users = None, None, None
        has_excluded = excluded is not None and excluded.shape[1] > 0
        excluded = _sorted_distinct(excluded, trie.num_leaves) if has_excluded else None
        if allowed is not None:
            allowed = _sorted_distinct(allowed, trie.num_leaves)
            if excluded is not None:
                allowed = _sorted_distinct(torch.where(_contains(excluded, allowed), -1, allowed), trie.num_leaves)
            self.allowed = allowed
            left = (allowed < trie.num_leaves).sum(1)
            # A node is alive where one of the leaves below it is allowed.
            self._alive = [
                torch.where(allowed < trie.num_leaves, trie.ancestors(level, allowed), len(trie.codes[level]))
                for level in range(trie.num_levels)
            ]
        elif excluded is not None:
            self.excluded = excluded
            left = trie.num_leaves - (excluded < trie.num_leaves).sum(1)
            self._dead = [self._dead_nodes(level) for level in range(trie.num_levels)]
        else:
            return
        self.users = len(left)
        if (left == 0).any():
            user = int((left == 0).nonzero()[0])
            what = "exclusions" if allowed is None else "allowed items less the exclusions"
            raise ValueError(f"the {what} of user {user} leave none of the {trie.num_leaves} items; exclude fewer")

    def of(self, users: slice) -> CatalogueConstraint:
        """The constraint of some of the users."""
        if self.users is None:
            return self
        part = copy.copy(self)
        if self.allowed is not None:
            part.allowed, part._alive = self.allowed[users], [nodes[users] for nodes in self._alive]
        else:
            part.excluded, part._dead = self.excluded[users], [nodes[users] for nodes in self._dead]
        part.users = len(part.allowed if part.allowed is not None else part.excluded)
        return part

    def legal_leaves(self) -> torch.Tensor | None:
        """(users, leaves) bool, the items that each user may get; None where the request names no items."""
        named = self.allowed if self.allowed is not None else self.excluded
        if named is None:
            return None
        # What pads the rows goes into a column of its own.
        legal = torch.full((len(named), self.trie.num_leaves + 1), self.allowed is None, device=named.device)
        return legal.scatter_(1, named, self.allowed is not None)[:, :-1]

    def legal_children(self, level: int, nodes: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """
        Args:
            level: the level of the children.
            nodes: (users, beams) nodes of `level - 1`; 0, the root, on level 0.
            own: (users, beams, items) leaves that each beam has generated in this session.

        Returns:
            (users, beams, children) bool, or (1, 1, children) where the first code of a session is free: child `c` of a node is the node `children[level][node] + c` of `level`. There are
            `max_children[level]` columns; those beyond a node's own children are False.
        """
        trie, width = self.trie, self.trie.max_children[level]
        if level == 0 and self.users is None and not (self.distinct and own.shape[2]):
            return torch.ones(1, 1, width, dtype=torch.bool, device=nodes.device)
        first = trie.children[level][nodes]
        child = torch.arange(width, device=nodes.device)
        legal = child < (trie.children[level][nodes + 1] - first)[..., None]
        if self.allowed is not None:
            wanted = (first[..., None] + child).view(len(nodes), -1)
            legal &= _contains(self._alive[level], wanted).view_as(legal)
        dead = []
        if self.excluded is not None:
            dead.append(self._dead[level][:, None, :].expand(-1, nodes.shape[1], -1))
        if self.distinct and own.shape[2]:
            dead.append(self._used_up(level, own))
        if dead:
            dead = torch.cat(dead, dim=2)
            column = dead - first[..., None]
            # Dead nodes below other nodes go into a column of their own.
            column = torch.where((dead >= 0) & (column >= 0) & (column < width), column, width)
            blocked = torch.zeros(*nodes.shape, width + 1, dtype=torch.bool, device=nodes.device)
            legal &= ~blocked.scatter_(2, column, True)[..., :width]
        return legal

    def _dead_nodes(self, level: int) -> torch.Tensor:
        """(users, e) nodes of `level` whose leaves are all excluded, padded with -1."""
        trie, leaves = self.trie, self.excluded
        nodes = trie.ancestors(level, leaves)
        begin = nodes.clamp(max=len(trie.codes[level]) - 1)
        first, last = trie.leaves[level][begin], trie.leaves[level][begin + 1] - 1
        # The leaves are sorted and distinct, so a node's excluded leaves are a run; it is full when the run that starts at its first
        # leaf reaches its last one.
        end = torch.arange(leaves.shape[1], device=leaves.device) + last - first
        reaches = leaves.gather(1, end.clamp(max=leaves.shape[1] - 1)) == last
        return torch.where((leaves < trie.num_leaves) & reaches & (end < leaves.shape[1]), nodes, -1)

    def _used_up(self, level: int, own: torch.Tensor) -> torch.Tensor:
        """(users, beams, items) nodes of `level` with no leaf left beside the beam's own items, else -1."""
        trie = self.trie
        nodes = trie.ancestors(level, own.clamp(min=0))
        first, end = trie.leaves[level][nodes], trie.leaves[level][nodes + 1]
        left = end - first
        taken = (nodes[..., :, None] == nodes[..., None, :]).sum(-1)
        if self.allowed is not None:
            left = _count_between(self.allowed, first, end)
        elif self.excluded is not None:
            left = left - _count_between(self.excluded, first, end)
        return torch.where((own >= 0) & (taken >= left), nodes, -1)


def _sorted_distinct(leaves: torch.Tensor, sentinel: int) -> torch.Tensor:
    """Rows sorted, -1 and repetitions replaced by `sentinel` at the end."""
    leaves = torch.where(leaves < 0, sentinel, leaves).sort(dim=1).values
    repeated = torch.zeros_like(leaves, dtype=torch.bool)
    repeated[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
    return leaves.masked_fill(repeated, sentinel).sort(dim=1).values.contiguous()


def _contains(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Whether each `wanted` (users, w) stands in its user's sorted row (users, n)."""
    if not rows.shape[1]:
        return torch.zeros_like(wanted, dtype=torch.bool)
    position = torch.searchsorted(rows, wanted.contiguous()).clamp_(max=rows.shape[1] - 1)
    return rows.gather(1, position) == wanted


def _count_between(rows: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """How many entries of the user's sorted row (users, n) lie in [first, end), both (users, ...)."""
    bounds = torch.stack([first, end]).transpose(0, 1).reshape(len(rows), -1)
    below_first, below_end = torch.searchsorted(rows, bounds.contiguous()).chunk(2, dim=1)
    return (below_end - below_first).view_as(first)


__all__ = ["CatalogueConstraint"]
