"""Packing: every example in exactly one row, no row beyond its budget, full rows on real data; and what the collator makes of them."""

import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import OneRecProcessor
from onerec_hf.data import OneRecDataCollator, PackedDataCollator, PackedDataset, prefix_examples
from onerec_hf.data.packing import pack_rows
from onerec_hf.workflows import load_in_memory
from onerec_hf.workflows.settings import DataSettings
from tests.conftest import make_catalogue

PROCESSOR = OneRecProcessor.from_catalogue(make_catalogue(), max_history=5)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=60),
    st.integers(12, 40),
    st.integers(6, 30),
    st.integers(0, 3),
)
def test_each_example_once_and_no_row_beyond_its_budget(sizes, capacity, slots, seed):
    items, sessions = np.array(sizes).T
    rows = pack_rows(items, sessions, capacity, slots, seed)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(items)))
    assert all(len(row) and items[row].sum() <= capacity and sessions[row].sum() <= slots for row in rows)


def test_the_seed_mixes_users_and_repeats():
    items, ones = np.full(100, 2), np.ones(100, dtype=int)
    first, again, other = (pack_rows(items, ones, 10, 5, seed) for seed in (0, 0, 1))
    assert [row.tolist() for row in first] == [row.tolist() for row in again] != [row.tolist() for row in other]
    assert np.mean([np.abs(np.diff(row)).mean() for row in first]) > 10


def test_a_million_examples_take_seconds():
    rng = np.random.default_rng(0)
    started = time.process_time()
    rows = pack_rows(rng.integers(1, 51, 1_000_000), np.ones(1_000_000, dtype=int), 256, 16)
    assert time.process_time() - started < 10
    assert sum(map(len, rows)) == 1_000_000


def test_beauty_fills_its_rows(data_folder):
    data = load_in_memory(
        DataSettings(
            dataset="amazon-beauty", data_dir=str(data_folder / "amazon_beauty"), max_history=20, session_length=1
        )
    )
    windows = PackedDataset(data.split.train, 64, max_history=20)
    prefixes = PackedDataset(prefix_examples(data.split.train_sequences, 1, 20), 64, max_history=20)
    assert windows.fill > 0.99
    assert prefixes.fill > 0.98
    assert len(prefixes) < len(windows) / 5  # the same targets
    for packed in (windows, prefixes):
        assert sum(len(row) for row in packed.rows) == len(packed.dataset)


def test_windows_are_cut_to_max_history_and_prefixes_refused():
    long = {"history": [f"m{i}" for i in range(9)], "session": ["m20"]}
    packed = PackedDataset(Dataset.from_list([long, {"history": ["m1"], "session": ["m2"]}]), 6, max_history=5)
    assert len(packed) == 1
    batch = PackedDataCollator(PROCESSOR, encoder_is_causal=False)([packed[0]])
    assert (batch["segment_ids"].flatten().bincount() // 4).tolist() == [0, 5, 1]
    codes = PROCESSOR([["m4", "m5", "m6", "m7", "m8"]])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, :20], codes)
    prefixes = Dataset.from_list([{"history": long["history"], "sessions": [["m1"]], "history_lengths": [9]}])
    with pytest.raises(ValueError, match=r"up to 9 items exceed the processor's max_history of 5.*prefix_examples"):
        PackedDataset(prefixes, 16, max_history=5)
    uneven = {"history": long["history"], "sessions": [["m1"], ["m2"]], "history_lengths": [3, 9]}
    with pytest.raises(ValueError, match="history of 9 items exceed the processor's max_history of 5"):
        PackedDataCollator(PROCESSOR, encoder_is_causal=True)([uneven])


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="to pack has no examples"):
        PackedDataset(Dataset.from_list([{"history": ["m1"], "session": ["m2"]}]).select([]), 4)
    with pytest.raises(
        ValueError, match="2 rows of up to 1 history items and 1 sessions do not fit into a batch of 1 rows"
    ):
        PackedDataCollator(PROCESSOR, True, rows=1)([{"history": ["m1"], "session": ["m2"]}] * 2)


def test_collated_rows_hold_every_pair_in_its_place():
    """Read back from the tensors: history tokens by range, session tokens by slot."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(20):
        history = [f"m{i}" for i in rng.integers(0, 40, rng.integers(1, 6))]
        lengths = sorted(rng.choice(len(history), rng.integers(1, len(history) + 1), replace=False) + 1)
        sessions = [[f"m{i}" for i in rng.integers(0, 40, rng.integers(1, 4))] for _ in lengths]
        examples.append({"history": history, "sessions": sessions, "history_lengths": [int(n) for n in lengths]})
    packed = PackedDataset(Dataset.from_list(examples), 11)
    collator = PackedDataCollator(PROCESSOR, True, packed.items, packed.slots, packed.session_items, rows=len(packed))
    batch = collator(packed.__getitems__(range(len(packed))))
    found = []
    for slot, labels in enumerate(batch["labels"]):
        if labels[0] == -100:
            assert not batch["decoder_attention_mask"][slot].any()
            continue
        row, (start, stop) = slot // packed.slots, batch["history_ranges"].view(-1, 2)[slot].tolist()
        assert len(batch["segment_ids"][row, start:stop].unique()) == 1
        assert start == 0 or batch["segment_ids"][row, start - 1] != batch["segment_ids"][row, start]
        history = PROCESSOR.decode(torch.cat([torch.tensor([1]), batch["input_ids"][row, start + 1 : stop]]))
        found.append((history, PROCESSOR.decode(labels)))
    wanted = [
        (example["history"][:length], session)
        for example in examples
        for length, session in zip(example["history_lengths"], example["sessions"], strict=True)
    ]
    assert sorted(found) == sorted(wanted)


def test_buckets_pad_without_changing_what_is_real():
    examples = [{"history": ["m1", "m2", "m3"], "session": ["m4"]}]
    plain = OneRecDataCollator(PROCESSOR)(examples)
    wide = OneRecDataCollator(PROCESSOR, pad_to_multiple_of=4, session_items=2)(examples)
    assert wide["input_ids"].shape == (1, 16)
    assert wide["labels"].shape == (1, 7)
    for name, value in plain.items():
        assert torch.equal(wide[name][:, : value.shape[1]], value)
    assert wide["attention_mask"].sum() == 12
    assert wide["decoder_attention_mask"].sum() == 3
    assert (wide["labels"] != -100).sum() == 3
    packed = PackedDataCollator(PROCESSOR, True, pad_to_multiple_of=4)(examples)
    assert packed["input_ids"].shape == (1, 16)
    assert packed["history_ranges"].shape == (1, 4, 2)
