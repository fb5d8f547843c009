"""The catalogue's semantic IDs as a trie of sorted arrays (CSR): every lookup is vectorised over rows, no Python loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class SemanticIDTrie:
    """
    A trie over M distinct code tuples. The codes are sorted lexicographically; leaf `i` is the i-th tuple in that order, and the nodes
    of a level are the distinct prefixes in that order, so that the leaves below a node, and its children, are contiguous ranges.
    `leaf_to_row` (M,) and `row_to_leaf` (N,) lead from leaves to rows of `codes` and back; a row that the trie leaves out has leaf -1.

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
        >>> trie.leaf_to_row.tolist()
        [1, 0, 2]
    """

    def __init__(self, codes, codebook_sizes: Sequence[int], order=None):
        codes = np.asarray(codes)
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        order = np.lexsort(codes.T[::-1]) if order is None else np.asarray(order, dtype=np.int64)
        self.leaf_to_row = torch.tensor(order)
        self.row_to_leaf = torch.full((len(codes),), -1)
        self.row_to_leaf[self.leaf_to_row] = torch.arange(len(order))
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
        """A copy on `device` (itself where it already is there). It is made once: every request asks for it."""
        device = torch.device(device)
        if self.leaf_to_row.device == device:
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


__all__ = ["SemanticIDTrie"]
