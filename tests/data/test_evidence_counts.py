"""Sequences counted into neighbour lists at once, or some of them later; what is asked for lately, and whether it counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data.evidence_counts import add_to_evidence, count_evidence, fit_evidence_weights, recent_counts
from onerec_hf.data.item_pairs import follow_counts, near_counts, top_neighbours
from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS, LISTS, ItemEvidence, fit_weights
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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 9)), min_size=1, max_size=40))
def test_interactions_fade_by_how_many_are_later(rows):
    """In any order of the rows, with ties, and in any unit of time."""
    items, times = map(np.array, zip(*rows, strict=True))
    wanted = np.zeros(5)
    for item, time in rows:
        if item >= 0:
            wanted[item] += np.exp(-sum(other > time for _, other in rows) / (len(rows) / 10))
    assert_close(recent_counts(items, times, 5), wanted, terms=64)
    assert np.array_equal(recent_counts(items, times * 86_400 + 7, 5), recent_counts(items, times, 5))


def test_new_interactions_are_the_latest():
    """Old counts fade as they would have in one log, but for their horizon; the new ones share what their places would have had."""
    old, new = np.arange(1000) % 7, np.array([7, 7, 8, 7, 8, 8])
    evidence = ItemEvidence(NUM_ITEMS, NUM_ITEMS)
    count_evidence(evidence, [old])
    evidence.set_recent(torch.from_numpy(recent_counts(old, np.arange(1000), NUM_ITEMS)))
    before = evidence.recent_counts.clone()
    add_to_evidence(evidence, [new])
    assert_close(evidence.recent_counts[1:8], before[1:8] * np.exp(-6 / 100.6), terms=8)
    both = evidence.recent_counts[[8, 9]]
    assert float(both[0]) == float(both[1])
    # The sum over places stands for an integral: off by half a step of 1/100.
    assert float(both.sum()) == pytest.approx(np.exp(-np.arange(6) / 100).sum(), rel=0.01)
    many = ItemEvidence(NUM_ITEMS, NUM_ITEMS)
    count_evidence(many, [old])
    many.set_recent(torch.from_numpy(recent_counts(old, np.arange(1000), NUM_ITEMS)))
    add_to_evidence(many, [np.full(1000, 9)])  # as many again: what was counted at once
    at_once = recent_counts(np.append(old, np.full(1000, 9)), np.arange(2000), NUM_ITEMS)
    assert float(many.recent_counts[10]) == pytest.approx(at_once[9], rel=0.01)
    add_to_evidence(evidence, [np.array([-1])])
    assert torch.equal(evidence.recent_counts[[8, 9]], both)


def users(count, seed, lately):
    """Features of candidates, their rows, and targets that the head explains, and where `lately` items 9 to 12 as well."""
    draw = torch.Generator().manual_seed(seed)
    features, rows = torch.randn(count, 12, 7, generator=draw), torch.arange(1, 13).expand(count, 12)
    logits = features[..., 0] + lately * (rows > 8)
    return features, rows, torch.distributions.Categorical(logits=logits).sample() + 1


@pytest.mark.parametrize(("count", "lately", "enters"), [(600, 2.0, True), (600, 0.0, False), (4, 2.0, False)])
def test_what_is_asked_for_lately_enters_where_it_predicts_other_users(count, lately, enters):
    """A planted trend is found; without one, or from four users, the evidence is what it is without times, bit for bit."""
    torch.manual_seed(1)
    found = users(count, 0, lately)
    recent = np.repeat([0.0, 20.0, 0.0], [8, 4, NUM_ITEMS - 12])
    evidence = ItemEvidence(NUM_ITEMS)
    fit_evidence_weights(evidence, *found, recent=recent)
    assert (evidence.recent_counts is not None) == enters
    if enters:
        assert evidence.recent_counts.tolist() == [0, *recent]
        # On log(1 + 20) the planted 2.
        assert float(evidence.weights[-1]) == pytest.approx(2 / np.log(21), rel=0.3)
    else:
        assert torch.equal(evidence.weights, fit_weights(*found))
    fit_evidence_weights(evidence, *found)  # without times
    assert evidence.recent_counts is None
    assert torch.equal(evidence.weights, fit_weights(*found))


def test_without_users_the_default_weights_stay():
    evidence, nobody = ItemEvidence(NUM_ITEMS), users(1, 0, 0.0)
    fit_evidence_weights(evidence, *(part[:0] for part in nobody), recent=np.ones(NUM_ITEMS))
    assert evidence.weights.tolist() == pytest.approx(DEFAULT_WEIGHTS)
