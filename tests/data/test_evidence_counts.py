"""Sequences counted into neighbour lists at once, or some of them later; what is asked for lately, and whether it counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import evidence_counts
from onerec_hf.data.evidence_counts import add_to_evidence, count_evidence, event_log, fit_evidence_weights
from onerec_hf.data.item_pairs import follow_counts, near_counts, top_neighbours
from onerec_hf.modeling import item_evidence
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


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 9)), min_size=1, max_size=400),
    st.lists(st.integers(-1, 11), min_size=1, max_size=3),
)
def test_what_was_asked_for_before_a_request(rows, requests):
    """In any order of the rows, with ties, and in any unit of time: the latest tenth and hundredth of the log that are before the request."""
    known = [(time, item) for item, time in rows if item >= 0]
    log = sorted(known, key=lambda row: row[0])
    for unit, zero in ((1, 0), (86_400, 7)):
        evidence = ItemEvidence(5)
        items, times = map(np.array, zip(*rows, strict=True))
        evidence.set_log(*event_log(items, times * unit + zero))
        if not known:
            assert evidence.recent == 0
            continue
        found = evidence.recent_counts(torch.tensor(requests) * unit + zero)
        for row, request in zip(found, requests, strict=True):
            before = [item for time, item in log if time < request]
            for counts, share in zip(row, (10, 100), strict=True):
                last = before[-math.ceil(len(log) / share) :]
                assert counts.tolist() == [0, *(last.count(item) for item in range(5))]
        now = evidence.recent_counts()
        assert torch.equal(now, evidence.recent_counts(torch.tensor([10**9])))


def test_many_requests_are_counted_in_parts(monkeypatch):
    evidence = ItemEvidence(5)
    evidence.set_log(*event_log(np.arange(400) % 5, np.arange(400)))
    times = torch.arange(0, 400, 7)
    at_once = evidence.recent_counts(times)
    monkeypatch.setattr(item_evidence, "_COUNTED_AT_ONCE", 100)
    assert torch.equal(evidence.recent_counts(times), at_once)


def test_new_interactions_join_the_log(monkeypatch):
    """At their times, or as the latest where there are none; the earliest leave a log that is full. Old and new at once are the same log."""
    old, new = np.arange(1000) % 7, np.array([7, 7, -1, 8, 7, 8])
    evidence = ItemEvidence(NUM_ITEMS, NUM_ITEMS)
    count_evidence(evidence, [old])
    evidence.set_log(*event_log(old, np.arange(1000)))
    add_to_evidence(evidence, [new], times=np.array([1005, 500, 501, 1006, 1007, 1008]))
    at_once = event_log(np.append(old, [7, 7, 8, 7, 8]), np.append(np.arange(1000), [1005, 500, 1006, 1007, 1008]))
    assert torch.equal(evidence.log_items, at_once[0])
    assert torch.equal(evidence.log_times, at_once[1])
    add_to_evidence(evidence, [np.array([0, 9])], new=np.array([False, True]))
    assert evidence.log_items[-1] == 10
    assert evidence.log_times[-1] == 1008
    monkeypatch.setattr(evidence_counts, "_LONGEST_LOG", 20)
    add_to_evidence(evidence, [np.array([3])], times=np.array([2000]))
    assert evidence.recent == 20
    assert evidence.log_items.tolist()[-6:] == [8, 9, 8, 9, 10, 4]


def users(count, seed, lately):
    """Features of candidates, their rows, targets that the head explains, and where `lately` the time as well; a log with a time for each item, and times."""
    draw = torch.Generator().manual_seed(seed)
    features, rows = torch.randn(count, 12, 7, generator=draw), torch.arange(1, 13).expand(count, 12)
    times = torch.randint(100, 1200, (count,), generator=draw)
    logits = features[..., 0] + lately * (rows - 1 == ((times - 1) // 100)[:, None])
    log = event_log(np.arange(1200) // 100, np.arange(1200))
    targets = torch.distributions.Categorical(logits=logits).sample() + 1
    return (features, rows, targets), log, times.numpy()


@pytest.mark.parametrize(("count", "lately", "enters"), [(600, 3.0, True), (600, 0.0, False), (4, 3.0, False)])
def test_what_is_asked_for_lately_enters_where_it_predicts_other_users(count, lately, enters):
    """A planted trend is found; without one, or from four users, the evidence is what it is without times, bit for bit."""
    torch.manual_seed(1)
    found, log, times = users(count, 0, lately)
    evidence = ItemEvidence(NUM_ITEMS)
    fit_evidence_weights(evidence, *found, log, times)
    assert (evidence.recent > 0) == enters
    if enters:
        assert torch.equal(evidence.log_items, log[0])
        # On log(1 + 12), of the last hundredth of the log, the planted 3.
        assert float(evidence.weights[-1]) == pytest.approx(3 / np.log(13), rel=0.3)
    else:
        assert torch.equal(evidence.weights, fit_weights(*found))
    for without in ((), (log, None), (None, times)):
        fit_evidence_weights(evidence, *found, *without)
        assert not evidence.recent
        assert torch.equal(evidence.weights, fit_weights(*found))


def test_without_users_the_default_weights_stay():
    evidence, (nobody, log, times) = ItemEvidence(NUM_ITEMS), users(1, 0, 0.0)
    fit_evidence_weights(evidence, *(part[:0] for part in nobody), log, times[:0])
    assert evidence.weights.tolist() == pytest.approx(DEFAULT_WEIGHTS)
