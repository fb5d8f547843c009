"""
The catalogue's semantic IDs as a trie, and the items that may be generated: those that a request allows, none twice in a session.

The trie is made of sorted arrays (CSR): every lookup is vectorised over users and beams, in shapes that depend on the catalogue and the request alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch


class SemanticIDTrie:
    """
    A trie over M distinct code tuples. The codes are sorted lexicographically; leaf `i` is the i-th tuple in that order, and the nodes
    of a level are the distinct prefixes in that order, so that the leaves below a node, and its children, are contiguous ranges.
    `leaf_to_index` (M,) and `index_to_leaf` (N,) map leaves to item indices (rows of `codes`) and back; an item that the trie leaves out has leaf -1.

    Per level `l` it keeps (all int64):
      - `codes[l]` (nodes,): the last code of each prefix,
      - `parents[l]` (nodes,): its node on the level above (0 = root on level 0),
      - `children[l]` (nodes above + 1,): where the children of each node above begin,
      - `leaves[l]` (nodes + 1,): where the leaves below each node begin.

    Args:
        codes: (N, L) integers, `0 <= codes[:, l] < codebook_sizes[l]`, rows distinct.
        codebook_sizes: size of each level.
        order: (M,) the rows that the trie holds, in lexicographic order of their codes; all of them when not given.

    Example:
        >>> trie = SemanticIDTrie([[1, 0], [0, 2], [1, 3]], codebook_sizes=[2, 4])
        >>> trie.find_leaves(torch.tensor([[1, 3], [0, 0]])).tolist()  # -1: no item has this semantic ID
        [2, -1]
        >>> trie.leaf_to_index.tolist()
        [1, 0, 2]
    """

    def __init__(self, codes, codebook_sizes: Sequence[int], order=None):
        codes = np.asarray(codes)
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        order = np.lexsort(codes.T[::-1]) if order is None else np.asarray(order, dtype=np.int64)
        self.leaf_to_index = torch.tensor(order)
        self.index_to_leaf = torch.full((len(codes),), -1)
        self.index_to_leaf[self.leaf_to_index] = torch.arange(len(order))
        codes = codes.take(order, axis=0)
        self.num_leaves, self.num_levels = codes.shape
        self.codes, self.parents, self.children, self.leaves = [], [], [], []
        starts_node = np.zeros(self.num_leaves, dtype=bool)
        starts_node[0] = True
        for level in range(self.num_levels):
            column, starts_above = np.ascontiguousarray(codes[:, level]), starts_node.copy()
            starts_node[1:] |= column[1:] != column[:-1]
            first = np.flatnonzero(starts_node)
            opens_parent = starts_above[first]
            self.codes.append(torch.from_numpy(column[first].astype(np.int64)))
            self.parents.append(torch.from_numpy(np.cumsum(opens_parent) - 1))
            self.children.append(torch.from_numpy(np.append(np.flatnonzero(opens_parent), len(first))))
            self.leaves.append(torch.from_numpy(np.append(first, self.num_leaves)))
        if len(first) != self.num_leaves:
            raise ValueError(f"{self.num_leaves - len(first)} of {self.num_leaves} semantic IDs are not unique")
        self._keys = [
            parents * size + codes
            for parents, size, codes in zip(self.parents, self.codebook_sizes, self.codes, strict=True)
        ]
        self.max_children = [int(begin.diff().max()) for begin in self.children]
        self._padded_codes = [
            torch.nn.functional.pad(codes, (0, most))
            for codes, most in zip(self.codes, self.max_children, strict=True)
        ]
        self._share_codes()
        self._copies: dict[torch.device, SemanticIDTrie] = {}

    def to(self, device: torch.device | str) -> SemanticIDTrie:
        """A copy on `device` (itself where it already is there). It is made once and used by every request."""
        device = torch.device(device)
        if self.leaf_to_index.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = self._copy_to(device)
        return self._copies[device]

    def _copy_to(self, device: torch.device) -> SemanticIDTrie:
        moved = object.__new__(SemanticIDTrie)
        for name, value in self.__dict__.items():
            if isinstance(value, torch.Tensor):
                value = value.to(device)
            elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
                value = [tensor.to(device) for tensor in value]
            setattr(moved, name, value)
        moved._copies = {}
        moved._share_codes()
        return moved

    def _share_codes(self) -> None:
        """The codes are the beginnings of the padded ones: they are as large as the catalogue, and stored once."""
        self.codes = [padded[: len(codes)] for padded, codes in zip(self._padded_codes, self.codes, strict=True)]

    def descend(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The child of each node (on `level - 1`) along a code of `level`; -1 where there is none or the node is -1."""
        keys = self._keys[level]
        wanted = nodes * self.codebook_sizes[level] + codes
        position = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        size = self.codebook_sizes[level]
        found = (keys[position] == wanted) & (nodes >= 0) & (codes >= 0) & (codes < size)
        return torch.where(found, position, -1)

    def find_nodes(self, codes: torch.Tensor) -> torch.Tensor:
        """Node of each prefix: (..., l) codes with 0 <= l <= L give (...,) nodes of level l - 1; -1 where no item has it."""
        nodes = codes.new_zeros(codes.shape[:-1])
        for level in range(codes.shape[-1]):
            nodes = self.descend(level, nodes, codes[..., level])
        return nodes

    def find_leaves(self, codes: torch.Tensor) -> torch.Tensor:
        """Leaf of each full code tuple: (..., L) codes give (...,) leaves; -1 where no item has it."""
        return self.find_nodes(codes)

    def child_codes(self, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """
        Codes of the children, on `level`, of nodes (rows,) of the level above: (rows, max_children[level]) int64. A node with fewer
        children has other nodes' codes, or zeros, in the columns beyond them.
        """
        # Overlapping windows, without a copy: then a row's codes are one stretch of memory.
        windows = self._padded_codes[level].unfold(0, self.max_children[level], 1)
        return windows.index_select(0, self.children[level][nodes])

    def ancestors(self, level: int, leaves: torch.Tensor) -> torch.Tensor:
        """The node of `level` above each leaf."""
        return torch.searchsorted(self.leaves[level], leaves, right=True) - 1

    def __deepcopy__(self, memo):  # immutable, and as large as the catalogue: copies of a model share it
        return self


class CatalogueConstraint:
    """
    The children of a beam's node that lead to an item it may still generate.

    Args:
        trie: the catalogue's semantic IDs, on the device of the scores.
        excluded: (users, e) int64 leaves that a user must not get, padded with -1.
        allowed: (users, a) int64 leaves, the only ones that a user may get, padded with -1; all where not given.
        distinct: whether an item may occur only once in a session.

    `users` is their number, None where the request names no items.

    Raises:
        ValueError: no item is left for a user.

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
        # At most one of the two lists is kept, sorted: the allowed items less the excluded ones, or the excluded ones.
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
        # Padding goes into an extra column.
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
            # Dead nodes below other nodes go into a separate column.
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
    """Whether each `wanted` (users, w) is in its user's sorted row (users, n)."""
    if not rows.shape[1]:
        return torch.zeros_like(wanted, dtype=torch.bool)
    position = torch.searchsorted(rows, wanted.contiguous()).clamp_(max=rows.shape[1] - 1)
    return rows.gather(1, position) == wanted


def _count_between(rows: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """How many entries of the user's sorted row (users, n) lie in [first, end), both (users, ...)."""
    bounds = torch.stack([first, end]).transpose(0, 1).reshape(len(rows), -1)
    below_first, below_end = torch.searchsorted(rows, bounds.contiguous()).chunk(2, dim=1)
    return (below_end - below_first).view_as(first)


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


__all__ = ["CatalogueConstraint", "SemanticIDTrie", "SharedItemPenalty"]
