"""OneRecProcessor: item ids to tensors and back, and what it says about bad requests."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from onerec_hf import OneRecProcessor, OneRecTokenizer
from tests.conftest import make_catalogue

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE)
items = st.sampled_from(CATALOGUE.item_ids)


def _tokens(separator, names):
    """The definition, item by item."""
    written = []
    for row in CATALOGUE.indices(names):
        codes = CATALOGUE.codes[row] + np.array(PROCESSOR.tokenizer.level_offsets)
        written += [separator, *codes.tolist()]
    return written


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(items, min_size=1, max_size=6), st.lists(items, min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_tensors_equal_the_definition_and_decode_back(users, keep):
    histories, sessions = zip(*users, strict=True)
    batch = PROCESSOR(histories, sessions, max_history=keep)
    for i, (history, session) in enumerate(users):
        kept = history[-keep:] if keep else history
        length = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, :length].tolist() == _tokens(3, kept)
        assert not batch["input_ids"][i, length:].any()
        whole = _tokens(1, session)
        length = int(batch["decoder_attention_mask"][i].sum())
        assert batch["decoder_input_ids"][i, :length].tolist() == (whole + [0] * 99)[:length]
        wanted = [-100 if token == 1 else token for token in whole[1:]]
        labels = batch["labels"][i].tolist()
        assert labels[: len(wanted)] == wanted
        assert set(labels[len(wanted) :]) <= {-100}
    assert PROCESSOR.batch_decode(batch["labels"]) == [list(session) for session in sessions]


def test_generated_sequences_decode_by_position():
    first, second = _tokens(1, ["m1"]), _tokens(1, ["m2"])
    broken = [1, *first[2:], 0]
    sequences = torch.tensor([first + second, broken + second, [*first, 0, 0, 0, 0], [1] + [0] * 7])
    assert PROCESSOR.batch_decode(sequences) == [["m1", "m2"], [None, "m2"], ["m1"], []]
    assert PROCESSOR.item_indices(sequences).tolist() == [[1, 2], [-1, 2], [1, -1], [-1, -1]]
    assert PROCESSOR.decode(sequences[0]) == ["m1", "m2"]


def test_absent_semantic_id_is_none():
    taken = set(map(tuple, CATALOGUE.codes.tolist()))
    absent = next(code for code in np.ndindex(*CATALOGUE.codebook_sizes) if code not in taken)
    tokens = [1, *(np.array(absent) + PROCESSOR.tokenizer.level_offsets)]
    assert PROCESSOR.batch_decode([tokens]) == [[None]]


def test_unknown_items_skip_and_error():
    with pytest.raises(KeyError, match=r'not in the catalogue.*unknown="skip"'):
        PROCESSOR([["m1", "new"]])
    with pytest.warns(UserWarning, match="left out 1 of 3 history items"):
        batch = PROCESSOR([["m1", "new"], ["m2"]], unknown="skip")
    assert batch["input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PROCESSOR([["m1"], []]), "1 of 2 users have an empty history .first: number 1"),
        (lambda: PROCESSOR([["m1"]], sessions=[[]]), "empty session"),
        (lambda: PROCESSOR(["m1", "m2"]), "list of lists"),
        (lambda: PROCESSOR([["m1"]], sessions=[["m1"], ["m2"]]), "1 histories but 2 sessions"),
        (lambda: PROCESSOR([["m1"]], unknown="ignore"), "unknown must be"),
        (lambda: PROCESSOR([["m1"]], return_tensors="np"), "PyTorch"),
        (lambda: OneRecProcessor(OneRecTokenizer([9, 9]), CATALOGUE), "different models"),
        (lambda: OneRecProcessor(OneRecTokenizer([9, 9]))([["m1"]]), "no item catalogue"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.filterwarnings("ignore:left out")
def test_nothing_left_after_skipping_is_an_empty_history():
    with pytest.raises(ValueError, match="empty history"):
        PROCESSOR([["new"]], unknown="skip")


def test_round_trip(tmp_path, processor, model):
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is OneRecProcessor
    assert loaded.max_history == processor.max_history
    assert loaded.catalogue.hash == processor.catalogue.hash
    history = [[f"m{i}" for i in range(15)]]
    assert torch.equal(loaded(history)["input_ids"], processor(history)["input_ids"])
    assert loaded(history)["input_ids"].shape == (1, 40)  # max_history is 10


def test_a_loaded_processor_checks_its_catalogue(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    make_catalogue(10, (3, 3, 3)).save(tmp_path / "catalogue.safetensors")
    with pytest.raises(ValueError, match="they belong to different models"):
        OneRecProcessor.from_pretrained(tmp_path)
