"""SemanticIDTrie against plain Python over the sorted code tuples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import SemanticIDTrie


@st.composite
def tries(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    possible = int(np.prod(sizes))
    flat = draw(st.lists(st.integers(0, possible - 1), min_size=1, max_size=min(possible, 40), unique=True))
    return np.stack(np.unravel_index(flat, sizes), axis=1), sizes


@settings(max_examples=80, deadline=None)
@given(tries())
def test_nodes_children_and_leaves(case):
    codes, sizes = case
    trie = SemanticIDTrie(codes, sizes)
    ordered = sorted(map(tuple, codes.tolist()))
    assert [tuple(codes[row]) for row in trie.leaf_to_index.tolist()] == ordered
    assert trie.index_to_leaf[trie.leaf_to_index].tolist() == list(range(len(ordered)))
    for level in range(len(sizes)):
        prefixes = sorted({code[: level + 1] for code in ordered})
        above = sorted({code[:level] for code in ordered})
        assert trie.codes[level].tolist() == [prefix[-1] for prefix in prefixes]
        assert trie.parents[level].tolist() == [above.index(prefix[:-1]) for prefix in prefixes]
        assert trie.leaves[level].tolist() == [
            next(i for i, code in enumerate(ordered) if code[: level + 1] == prefix) for prefix in prefixes
        ] + [len(ordered)]
        children = [prefixes.index(min(p for p in prefixes if p[:-1] == parent)) for parent in above]
        assert trie.children[level].tolist() == [*children, len(prefixes)]
        leaves = torch.arange(len(ordered))
        assert trie.ancestors(level, leaves).tolist() == [prefixes.index(code[: level + 1]) for code in ordered]
        assert trie.find_nodes(torch.tensor(prefixes)).tolist() == list(range(len(prefixes)))


@settings(max_examples=40, deadline=None)
@given(tries())
def test_find_leaves_says_minus_one_for_every_absent_tuple(case):
    codes, sizes = case
    trie = SemanticIDTrie(codes, sizes)
    every = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in sizes)).view(-1, len(sizes))
    ordered = {tuple(code): i for i, code in enumerate(sorted(map(tuple, codes.tolist())))}
    assert trie.find_leaves(every).tolist() == [ordered.get(tuple(code), -1) for code in every.tolist()]


def test_refuses_collisions():
    with pytest.raises(ValueError, match="1 of 3 semantic IDs are not unique"):
        SemanticIDTrie([[0, 1], [0, 1], [1, 1]], [2, 2])


@settings(max_examples=40, deadline=None)
@given(tries(), st.data())
def test_rows_left_out_have_no_leaf(case, data):
    codes, sizes = case
    kept = np.array(data.draw(st.lists(st.sampled_from(range(len(codes))), min_size=1, unique=True)))
    order = kept[np.lexsort(codes[kept].T[::-1])]
    trie, alone = SemanticIDTrie(codes, sizes, order=order), SemanticIDTrie(codes[kept], sizes)
    for name in ("codes", "parents", "children", "leaves"):
        for mine, theirs in zip(getattr(trie, name), getattr(alone, name), strict=True):
            assert torch.equal(mine, theirs)
    assert trie.leaf_to_index.tolist() == order.tolist()
    places = {row: leaf for leaf, row in enumerate(order.tolist())}
    assert trie.index_to_leaf.tolist() == [places.get(row, -1) for row in range(len(codes))]


def test_a_device_gets_one_copy():
    trie = SemanticIDTrie([[0, 1], [1, 1]], [2, 2])
    assert trie.to("cpu") is trie
    assert trie.to("meta") is trie.to("meta")
    assert trie.to("meta").leaves[1].device.type == "meta"
    assert trie.leaves[1].device.type == "cpu"
