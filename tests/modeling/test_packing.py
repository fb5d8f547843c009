"""Packed rows against single, unpadded windows: loss, every gradient, expert counts, backends, compilation."""

import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import OneRecProcessor
from onerec_hf.data import PackedDataCollator, PackedDataset
from tests.conftest import make_catalogue, make_model
from tests.modeling.reference import Reference
from tests.rounding import BACKWARD, assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
VARIANTS = {
    "experts": {},
    "dense": {"num_experts": 1},
    "no cross rope": {"cross_attention_rope": False},
    "dense, no cross rope": {"num_experts": 1, "cross_attention_rope": False},
    "grouped queries": {"num_key_value_heads": 2},
}
PREFIXES = [
    {"history": ["m1", "m2", "m3"], "sessions": [["m2", "m3"], ["m3", "m9"], ["m9"]], "history_lengths": [1, 2, 3]},
    {"history": ["m5"], "sessions": [["m7", "m8"]], "history_lengths": [1]},
    {"history": ["m4", "m6", "m5", "m0"], "sessions": [["m5"], ["m11", "m12"]], "history_lengths": [2, 4]},
    {"history": ["m20", "m21"], "sessions": [["m22"]], "history_lengths": [2]},
]


def windows_of(prefixes):
    """Each (history, session) pair by itself."""
    return [
        {"history": example["history"][:length], "session": session}
        for example in prefixes
        for length, session in zip(example["history_lengths"], example["sessions"], strict=True)
    ]


def pack(examples, causal, packing_length=8, **collator):
    packed = PackedDataset(Dataset.from_list(examples), packing_length)
    sizes = {"items": packed.items, "slots": packed.slots, "session_items": packed.session_items}
    return PackedDataCollator(PROCESSOR, causal, **{**sizes, **collator})([packed[i] for i in range(len(packed))])


def loss_and_gradients(model, batches):
    """Sums over the batches of the summed token losses, so that how they are grouped does not matter."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(1.0)).loss
        loss.backward()
        total += loss.detach()
    return total, {name: gradient.clone() for name, gradient in gradients_of(model).items()}


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_windows(model, batch, windows):
    scale = 1 / len(windows)
    wanted, wanted_gradients = loss_and_gradients(
        model, [PROCESSOR([w["history"]], sessions=[w["session"]]) for w in windows]
    )
    loss, gradients = loss_and_gradients(model, [batch])
    assert_close(loss * scale, wanted * scale)
    assert gradients.keys() == wanted_gradients.keys()
    assert_close(gradients, wanted_gradients, terms=BACKWARD)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_prefixes_equal_their_windows(config, attention):
    model = make_model(CATALOGUE, encoder_is_causal=True, **config)
    model.set_attn_implementation(attention)
    batch = pack(PREFIXES, causal=True)
    assert batch["input_ids"].shape[0] > 1  # several rows, at least one of several segments
    assert batch["segment_ids"].max() > 1
    assert_equal_to_windows(model, batch, windows_of(PREFIXES))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_windows_equal_the_windows(attention, causal):
    model = make_model(CATALOGUE, encoder_is_causal=causal)
    model.set_attn_implementation(attention)
    windows = windows_of(PREFIXES)
    assert_equal_to_windows(model, pack(windows, causal), windows)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_loss_equals_float64(config):
    model = make_model(CATALOGUE, encoder_is_causal=True, **config)
    reference, losses, tokens = Reference(model), 0.0, 0
    for window in windows_of(PREFIXES):
        codes = CATALOGUE.codes[CATALOGUE.indices(window["session"])].tolist()
        history = PROCESSOR([window["history"]])["input_ids"][0]
        losses -= reference.session_log_probability(history, codes, PROCESSOR.tokenizer.level_offsets)
        tokens += 3 * len(codes)
    with torch.no_grad():
        loss = model(**pack(PREFIXES, causal=True)).loss
    assert_close(loss, losses / tokens)


items = st.integers(0, 39).map("m{}".format)


@st.composite
def prefix_lists(draw):
    examples = []
    for _ in range(draw(st.integers(1, 6))):
        history = draw(st.lists(items, min_size=1, max_size=8))
        lengths = sorted(draw(st.sets(st.integers(1, len(history)), min_size=1)))
        sessions = [draw(st.lists(items, min_size=1, max_size=3)) for _ in lengths]
        examples.append({"history": history, "sessions": sessions, "history_lengths": lengths})
    return examples


SHARED = make_model(CATALOGUE, encoder_is_causal=True)


@settings(max_examples=25, deadline=None)
@given(prefix_lists(), st.integers(8, 24), st.booleans())
def test_any_prefixes_in_any_budget_equal_their_windows(examples, packing_length, training):
    batch = pack(examples, causal=True, packing_length=packing_length)
    assert int((batch["labels"][:, 0] != -100).sum()) == len(windows_of(examples))
    assert_equal_to_windows(SHARED.train(training), batch, windows_of(examples))


def test_a_visible_encoder_refuses_prefixes_and_takes_windows():
    with pytest.raises(ValueError, match="prefixes need a causal encoder"):
        pack(PREFIXES, causal=False)
    assert pack(windows_of(PREFIXES), causal=False)["segment_ids"].max() > 1


def test_empty_slots_and_rows_give_no_nan_and_are_not_counted():
    model = make_model(CATALOGUE, encoder_is_causal=True).train()
    wanted = model(**pack(PREFIXES, causal=True))
    got = model(**pack(PREFIXES, causal=True, rows=5, slots=16))
    assert got.logits.isfinite().all()
    assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)
    assert_close(got.loss, wanted.loss)
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    real = pack(PREFIXES, causal=True)["decoder_attention_mask"].sum()
    assert got.tokens_per_expert.sum(1).tolist() == [2 * real, 2 * real]


def test_aux_loss_and_checkpointing_work_packed():
    model = make_model(CATALOGUE, encoder_is_causal=True, router_aux_loss_coef=0.5)
    batch, wide = pack(PREFIXES, causal=True), pack(PREFIXES, causal=True, slots=12)
    with_aux = model(**batch, output_router_logits=True)
    assert_close(model(**wide, output_router_logits=True).aux_loss, with_aux.aux_loss)
    plain, again = model.train(), copy.deepcopy(model).train()
    again.activation_checkpointing_enable()
    plain(**batch).loss.backward(), again(**batch).loss.backward()
    assert_close(gradients_of(again), gradients_of(plain), terms=BACKWARD)


def test_ranges_without_segments_read_one_history_per_row():
    """All prefixes, not packed: an attention mask pads the histories, on either side."""
    model = make_model(CATALOGUE, encoder_is_causal=True)
    batch = pack(PREFIXES[:1], causal=True, items=None, slots=None)
    wanted = model(**batch).logits
    segments = batch.pop("segment_ids")
    assert_close(model(**batch, attention_mask=segments).logits, wanted)
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (4, 0))
    batch["history_ranges"] += 4
    mask = torch.nn.functional.pad(segments, (4, 0))
    assert_close(model(**batch, attention_mask=mask).logits, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    model = make_model(CATALOGUE, encoder_is_causal=True)
    batch = pack(PREFIXES, causal=True)
    with torch.no_grad():
        wanted = model(**batch).loss
        model.set_attn_implementation("flex_attention")
        assert_close(model(**batch).loss, wanted)


def test_arguments_that_contradict_each_other_are_refused():
    model = make_model(CATALOGUE, encoder_is_causal=True)
    batch = pack(PREFIXES, causal=True)
    with pytest.raises(ValueError, match="not both"):
        model(**batch, attention_mask=(batch["segment_ids"] > 0).long())
    with pytest.raises(ValueError, match="without history_ranges"):
        model(**{name: value for name, value in batch.items() if name != "history_ranges"})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"sdpa, eager, flex_attention; this model has 'flash_attention_2'"):
        model(**batch)


@pytest.mark.slow
def test_a_training_step_compiles_whole_and_once_for_all_lengths():
    model = make_model(CATALOGUE, encoder_is_causal=True).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    collate = {"items": 8, "slots": 8, "session_items": 3, "rows": 3}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for examples in (PREFIXES, PREFIXES[:2], PREFIXES[1:], windows_of(PREFIXES)):
            batch = pack(examples, causal=True, **collate)
            wanted, got = model(**batch), compiled(**batch)
            assert_close(got.loss, wanted.loss)
            assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)
            model.zero_grad(), compiled.zero_grad()
            wanted.loss.backward(), got.loss.backward()
            gradients = {name.removeprefix("_orig_mod."): value for name, value in gradients_of(compiled).items()}
            assert_close(gradients, gradients_of(model), terms=BACKWARD)
