"""Sequences counted into neighbour lists at once, or some of them later."""

import numpy as np
import pytest
import torch

from onerec_hf.data.evidence_counts import add_to_evidence, count_evidence
from onerec_hf.data.item_pairs import follow_counts, near_counts, top_neighbours
from onerec_hf.modeling.item_evidence import LISTS, ItemEvidence
from tests.rounding import assert_close

NUM_ITEMS = 15


def dense(evidence: ItemEvidence, name: str) -> torch.Tensor:
    """(num_items, num_items) the counts of the lists."""
    items, counts = evidence.list_of(name)
    table = torch.zeros(NUM_ITEMS + 1, NUM_ITEMS + 1)
    return table.scatter_(1, items.long(), counts)[1:, 1:]


@pytest.fixture
def sequences():
    draw = np.random.default_rng(3)
    return [draw.integers(NUM_ITEMS - 1, size=length) for length in (2, 0, 5, 9, 1, 12, 3, 7)]


def test_lists_hold_the_counts(sequences):
    evidence = ItemEvidence(NUM_ITEMS, neighbours=NUM_ITEMS)
    count_evidence(evidence, [np.arange(NUM_ITEMS)])  # is replaced
    count_evidence(evidence, sequences)
    follow = torch.from_numpy(follow_counts(sequences, NUM_ITEMS).toarray())
    assert torch.equal(dense(evidence, "near"), torch.from_numpy(near_counts(sequences, NUM_ITEMS).toarray()))
    assert torch.equal(dense(evidence, "next"), follow)
    assert torch.equal(dense(evidence, "before"), follow.T)
    counts = np.bincount(np.concatenate(sequences), minlength=NUM_ITEMS)
    assert evidence.interactions.tolist() == [0, *counts]
    assert not evidence.near_items[NUM_ITEMS].any()  # no user has the last item


def test_items_without_a_row_count_nothing():
    evidence = ItemEvidence(NUM_ITEMS, NUM_ITEMS)
    count_evidence(evidence, [np.array([3, -1])])
    add_to_evidence(evidence, [np.array([-1, 3])])
    assert evidence.interactions.nonzero().flatten().tolist() == [4]
    assert not evidence.near_items.any()


def test_short_lists_keep_the_largest(sequences):
    evidence = ItemEvidence(NUM_ITEMS, neighbours=3)
    count_evidence(evidence, sequences)
    scale = (np.bincount(np.concatenate(sequences), minlength=NUM_ITEMS) + 1.0) ** -0.5
    wanted, _ = top_neighbours(near_counts(sequences, NUM_ITEMS), 3, scale, scale)
    assert (evidence.near_items[1:].numpy() == wanted + 1).all()
    wanted, _ = top_neighbours(follow_counts(sequences, NUM_ITEMS), 3)
    assert (evidence.next_items[1:].numpy() == wanted + 1).all()


def test_added_sequences_count_as_if_all_had_been_there(sequences):
    """Old users with new items, new users, and users without any new item."""
    cut = [1, 0, 3, 9, 0, 6, 3, 0]
    old = [sequence[:length] for sequence, length in zip(sequences, cut, strict=True)]
    new = np.concatenate([np.arange(len(s)) >= length for s, length in zip(sequences, cut, strict=True)])
    at_once, later = ItemEvidence(NUM_ITEMS, NUM_ITEMS), ItemEvidence(NUM_ITEMS, NUM_ITEMS)
    count_evidence(at_once, sequences)
    count_evidence(later, old)
    weights = later.weights.clone()
    told = add_to_evidence(later, sequences, new)
    assert told == {"interactions": int(new.sum()), "pairs": 32 - 17, "cut": 0}
    assert later.interactions.tolist() == at_once.interactions.tolist()
    for name in LISTS:
        assert_close(dense(later, name), dense(at_once, name), terms=20)
    assert torch.equal(later.weights, weights)
    add_to_evidence(later, sequences, np.zeros_like(new))  # nothing is new
    assert later.interactions.tolist() == at_once.interactions.tolist()


def test_what_no_list_has_room_for_is_told():
    evidence = ItemEvidence(NUM_ITEMS, neighbours=1)
    count_evidence(evidence, [np.array([0, 1]), np.array([0, 1])])
    told = add_to_evidence(evidence, [np.array([0, 2])])  # 1 followed 0 twice, 2 once: no place in `next`
    assert evidence.next_items[1].tolist() == [2]
    assert evidence.before_items[3].tolist() == [1]
    assert told["pairs"] == 1
    assert told["cut"] >= 1
    add_to_evidence(evidence, [np.array([0, 2])] * 3)
    assert (evidence.next_items[1].tolist(), evidence.next_counts[1].tolist()) == (
        [3],
        [3.0],
    )  # its first count was cut
