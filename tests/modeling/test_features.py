"""Features of users, interactions and items: their embedding, packed and padded histories, generation, and what is saved."""

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf import OneRecConfig, OneRecProcessor, OneRecV2Config, OneRecV2ForConditionalGeneration
from onerec_hf.cli.export import TOLERANCE, encoder_graph, export_onnx
from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
from onerec_hf.modeling.feature_embedding import FeatureEmbedding
from onerec_hf.modeling.features import MISSING, POSITIVE, UNKNOWN, Feature, FeatureSchema
from onerec_hf.modeling.features_file import FEATURES_NAME
from onerec_hf.modeling.files import read_safetensors
from onerec_hf.modeling.item_evidence import LISTS
from tests.conftest import make_model
from tests.modeling.feature_models import (
    CATALOGUE,
    HISTORIES,
    ITEM_FEATURES,
    PROCESSOR,
    SCHEMA,
    SESSIONS,
    USERS,
    columns,
    make,
    random_examples,
)
from tests.rounding import assert_close


def embedded(embedding, codes):
    """A place's features in float64, from the definition: one place, one feature, one slot at a time."""
    weights = {name: value.double() for name, value in embedding.state_dict().items()}
    config = embedding.config
    sides = {"user": [], "item": []}
    present = {"user": False, "item": False}
    slot = begin = 0
    for number, (_, size, slots) in enumerate(config.all):
        side = "user" if number < len(config.user) else "item"
        found = [code for code in codes[slot : slot + slots].tolist() if code > 0]
        rows = [weights["table.weight"][begin + code] for code in found]
        sides[side].append(torch.stack(rows).mean(0) if rows else torch.zeros(config.dim).double())
        present[side] |= bool(found)
        slot, begin = slot + slots, begin + size - 1
    out = 0
    for side, parts in sides.items():
        if present[side]:
            inner = F.leaky_relu(torch.cat(parts) @ weights[f"{side}.0.weight"].T + weights[f"{side}.0.bias"])
            out = out + inner @ weights[f"{side}.2.weight"].T + weights[f"{side}.2.bias"]
    return out


def test_codes_of_places():
    inputs = PROCESSOR(HISTORIES, users=USERS)
    tokenizer = PROCESSOR.tokenizer
    static = [tokenizer.sep_token_id] + [tokenizer.eos_token_id] * 3
    assert inputs["input_ids"][:, :4].tolist() == [static] * 2
    plain = OneRecProcessor.from_catalogue(CATALOGUE, 8)(HISTORIES)
    assert torch.equal(inputs["input_ids"][:, 4:], plain["input_ids"])
    assert inputs["attention_mask"].sum(1).tolist() == [16, 8]
    codes = inputs["feature_ids"]
    assert (codes.shape, codes.dtype) == ((2, 4, SCHEMA.slots), torch.int64)
    assert torch.equal(codes[:, 0, : SCHEMA.user_slots].int(), torch.from_numpy(SCHEMA.encode_users(USERS)))
    assert not codes[:, 1:, : SCHEMA.user_slots].any()
    assert not codes[:, 0, SCHEMA.user_slots :].any()
    like, gap, hour = SCHEMA.user_slots, SCHEMA.user_slots + 1, SCHEMA.user_slots + 2
    assert codes[0, 1:, like].tolist() == [4, MISSING, 3]
    assert codes[0, 1:, gap].tolist() == [MISSING, 3, 5]  # the first has none before it, 30 s, more than an hour
    assert codes[0, 1:, hour].tolist() == [3, 3, 5]
    assert codes[1, 1, like : hour + 1].tolist() == [MISSING] * 3
    assert not codes[1, 2:].any()  # padding
    assert torch.equal(codes[0, 1:, hour + 1 :].int(), torch.from_numpy(ITEM_FEATURES[[1, 2, 3]]))


def test_columns_and_values_are_the_same():
    examples = columns()
    given = PROCESSOR(
        [example["history"] for example in examples],
        user_features=[example["user_features"] for example in examples],
        history_features=[example["history_features"] for example in examples],
    )
    raw = PROCESSOR(HISTORIES, users=USERS)
    for name in raw:
        assert torch.equal(given[name], raw[name])
    with pytest.raises(ValueError, match="or codes"):
        PROCESSOR(HISTORIES, history_features=[[1] * 9, [1] * 3])


def test_a_history_that_is_cut_keeps_the_codes_of_its_latest_items():
    whole, cut = PROCESSOR(HISTORIES, users=USERS), PROCESSOR(HISTORIES, users=USERS, max_history=1)
    assert torch.equal(cut["feature_ids"][0], whole["feature_ids"][0, [0, 3]])  # the gap is to an item that is cut off
    with pytest.warns(UserWarning, match="left out 1 of 4"):
        skipped = PROCESSOR([[*HISTORIES[0][:2], "unknown", HISTORIES[0][2]]], users=USERS[:1], unknown="skip")
    assert torch.equal(skipped["feature_ids"][0, :3], whole["feature_ids"][0, :3])
    assert skipped["feature_ids"].shape == (1, 4, SCHEMA.slots)


def test_the_embedding_equals_its_definition():
    model = make(hidden_size=32)
    embedding = model.model.encoder.features
    histories, users = random_examples(4)
    codes = PROCESSOR(histories, users=users)["feature_ids"]
    added = embedding(codes)
    for row in range(len(codes)):
        for place in range(codes.shape[1]):
            wanted = embedded(embedding, codes[row, place])
            assert_close(added[row, place], torch.zeros(32) if isinstance(wanted, int) else wanted.float())
    assert not embedding.table.weight[0].any()


def test_the_user_may_stand_at_each_item_of_its_history():
    alone, each = (
        make(features={"user_at_items": at_items}, hidden_size=32).model.encoder.features for at_items in (False, True)
    )
    histories, users = random_examples(4)
    codes = PROCESSOR(histories, users=users)["feature_ids"]
    added, found = alone(codes), each(codes)
    for row, history in enumerate(histories):
        user = added[row, 0]
        assert_close(found[row, : len(history) + 1], torch.cat([user[None], added[row, 1 : len(history) + 1] + user]))
    # A packed row of two histories: the places of each have its own user.
    row = torch.cat([codes[0, : len(histories[0]) + 1], codes[1, : len(histories[1]) + 1]])[None]
    assert_close(
        each(row, packed=True)[0],
        torch.cat([found[user, : len(histories[user]) + 1] for user in (0, 1)]),
    )


def test_features_stand_at_the_separators():
    model = make(encoder_layers=0)
    inputs, tokens = PROCESSOR(HISTORIES, users=USERS), {}
    encoder = model.model.encoder
    encoder.norm = torch.nn.Identity()
    states = encoder(inputs["input_ids"], inputs["attention_mask"], feature_ids=inputs["feature_ids"])[0]
    tokens = encoder.embed_tokens(inputs["input_ids"])
    added = encoder.features(inputs["feature_ids"])
    assert_close(states[:, ::4], tokens[:, ::4] + added)
    others = torch.arange(states.shape[1]) % 4 > 0
    assert torch.equal(states[:, others], tokens[:, others])


def test_missing_and_unknown_values_begin_at_zero_and_nothing_stays_zero():
    torch.manual_seed(0)
    config = OneRecConfig(codebook_sizes=[4, 5, 6], hidden_size=16, num_attention_heads=2, features=SCHEMA.config())
    embedding = FeatureEmbedding(config)
    embedding.initialize(0.02)
    begin = 0
    for _, size, _ in config.features.all:
        rows = embedding.table.weight[begin + 1 : begin + size].any(-1)
        assert rows.tolist() == [False, False] + [True] * (size - 3)
        begin += size - 1
    codes = torch.full((2, 1, SCHEMA.slots), MISSING)
    codes[1] = UNKNOWN
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    embedding(codes).square().sum().backward()
    (embedding(codes) - 1).square().sum().backward()
    optimizer.step()
    assert not embedding.table.weight[0].any()
    assert embedding.table.weight[1:3].any(-1).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_pools_items": True},
        {"encoder_is_causal": True},
        {"encoder_scales_embeddings": True},
        {"features": {"user_at_items": True}},
    ],
)
def test_padded_equals_alone_and_permuting_users_changes_nothing(options):
    model = make(**options)
    histories, users = random_examples(5)
    sessions = [["m1", "m2"], ["m3"], ["m4"], ["m5", "m6"], ["m7"]]
    together = model(**PROCESSOR(histories, sessions, users=users)).logits
    for place in range(5):
        alone = model(**PROCESSOR([histories[place]], [sessions[place]], users=[users[place]])).logits[0]
        assert_close(together[place, : len(alone)], alone)
    order = [3, 0, 4, 1, 2]
    permuted = model(
        **PROCESSOR([histories[i] for i in order], [sessions[i] for i in order], users=[users[i] for i in order])
    ).logits
    assert_close(permuted, together[order])
    other = model(**PROCESSOR(histories, sessions, users=[*users[:-1], {"age": 5}])).logits
    assert_close(other[:-1], together[:-1])
    assert not torch.allclose(other[-1], together[-1])


@pytest.mark.parametrize("at_items", [False, True])
@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("schema", [SCHEMA, FeatureSchema(interaction=SCHEMA.interaction, item=SCHEMA.item)])
def test_packed_equals_unpacked(schema, pools, at_items):
    model = make(
        schema,
        {"user_at_items": at_items},
        encoder_pools_items=pools,
        item_head={"num_items": len(CATALOGUE), "loss_weight": 1.0},
    )
    processor = OneRecProcessor.from_catalogue(CATALOGUE, 8, schema, ITEM_FEATURES)
    examples = columns(*random_examples(5))
    sessions = [["m1", "m2"], ["m3"], ["m4"], ["m5", "m6"], ["m7"]]
    examples = [{**example, "session": session} for example, session in zip(examples, sessions, strict=True)]
    padded = OneRecDataCollator(processor)(examples)
    rows = [{"examples": examples[:3]}, {"examples": examples[3:]}]
    packed = PackedDataCollator(processor, encoder_is_causal=False, pad_to_multiple_of=4)(rows)
    assert packed["feature_ids"].shape[:2] == (2, packed["input_ids"].shape[1] // 4)
    assert_close(model(**packed).loss, model(**padded).loss)


@pytest.mark.parametrize("at_items", [False, True])
@pytest.mark.parametrize("pools", [False, True])
def test_packed_rows_of_a_lazy_decoder_equal_unpacked_ones(pools, at_items):
    """Each of a row's users has features of its own, at a place of its own."""
    config = {"codebook_sizes": CATALOGUE.codebook_sizes, "hidden_size": 32, "decoder_layers": 2, "dropout_rate": 0.0}
    torch.manual_seed(0)
    model = OneRecV2ForConditionalGeneration(
        OneRecV2Config(
            **config,
            initializer_range=0.2,
            features={**SCHEMA.config(), "user_at_items": at_items},
            encoder_pools_items=pools,
        )
    ).eval()
    model.model.encoder.features.table.weight.data[1:].normal_(std=0.5)
    examples = [{**example, "session": [f"m{i}"]} for i, example in enumerate(columns(*random_examples(5)))]
    packed = PackedDataCollator(PROCESSOR, True)([{"examples": examples[:3]}, {"examples": examples[3:]}])
    assert_close(model(**packed).loss, model(**OneRecDataCollator(PROCESSOR)(examples)).loss)


@pytest.mark.parametrize("at_items", [False, True])
@pytest.mark.parametrize("pools", [False, True])
def test_prefixes_equal_windows(pools, at_items):
    model = make(features={"user_at_items": at_items}, encoder_is_causal=True, encoder_pools_items=pools)
    histories, users = random_examples(2, seed=3)
    while min(map(len, histories)) < 4:
        histories, users = random_examples(2, seed=len(histories[0]) + 4)
    examples = columns(histories, users)
    prefixes, windows = [], []
    for example in examples:
        lengths = [1, 2, len(example["history"]) - 1]
        sessions = [[example["history"][length]] for length in lengths]
        prefixes.append({**example, "sessions": sessions, "history_lengths": lengths})
        for length, session in zip(lengths, sessions, strict=True):
            codes = example["history_features"][: length * SCHEMA.interaction_slots]
            windows.append(
                {**example, "history": example["history"][:length], "history_features": codes, "session": session}
            )
    packed = PackedDataCollator(PROCESSOR, encoder_is_causal=True)([{"examples": prefixes}])
    padded = OneRecDataCollator(PROCESSOR)(windows)
    logits = model(**packed).logits
    assert_close(logits, model(**padded).logits)


def test_an_event_of_the_future_does_not_reach_a_prefix():
    model = make(encoder_is_causal=True)
    example = {**columns(HISTORIES[:1], USERS[:1])[0], "sessions": [["m2"], ["m3"]], "history_lengths": [1, 2]}
    changed = copy.deepcopy(example)
    last = SCHEMA.interaction_slots
    changed["history_features"][-last:] = [3, 4, 9]
    collator = PackedDataCollator(PROCESSOR, encoder_is_causal=True)
    before, after = (model(**collator([{"examples": [each]}])).logits for each in (example, changed))
    assert torch.equal(before, after)
    changed["history_features"][:last] = [4, 4, 9]
    assert not torch.allclose(before, model(**collator([{"examples": [changed]}])).logits)


def test_trl_sends_features_with_the_encoder_tokens():
    model = make()
    inputs = PROCESSOR(HISTORIES, SESSIONS, users=USERS)
    wanted = model.model(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state
    twice = {name: inputs[f"decoder_{name}"].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    out = model.model(
        **twice,
        encoder_input_ids=inputs["input_ids"],
        encoder_attention_mask=inputs["attention_mask"],
        feature_ids=inputs["feature_ids"],
    ).last_hidden_state
    assert_close(out[:2], wanted)
    assert_close(out[2:], wanted)


HEAD = {"num_items": len(CATALOGUE), "loss_weight": 1.0}


@pytest.mark.parametrize("head", [None, HEAD, {**HEAD, "evidence": True, "neighbours": 4}])
@pytest.mark.parametrize("length", [1, 2])
def test_recommend_equals_generate(head, length):
    model = make(features={"user_at_items": length == 2}, item_head=head)
    weight = 0.0
    if head is not None:
        weight = 0.7
        if head.get("evidence"):
            evidence = model.model.encoder.item_head.evidence
            generator = torch.Generator().manual_seed(2)
            for name in ("near", "next", "before"):
                items = torch.randint(0, len(CATALOGUE) + 1, (len(CATALOGUE), 4), generator=generator)
                evidence.set_list(name, items, torch.rand(items.shape, generator=generator) * 5)
            evidence.set_weights(torch.tensor([0.5, 1.0, 0.7, 0.3, 0.0, 0.0, 0.2]))
    inputs = PROCESSOR(HISTORIES, users=USERS)
    options = {"num_beams": 6, "num_return_sequences": 6, "return_dict_in_generate": True}
    fast = model.recommend(**inputs, session_length=length, item_score_weight=weight, **options)
    slow = model.generate(
        **inputs,
        max_new_tokens=4 * length - 1,
        item_score_weight=weight,
        length_penalty=0.0,
        output_scores=True,
        **options,
    )
    assert PROCESSOR.batch_decode(fast) == PROCESSOR.batch_decode(slow)
    assert_close(fast.sequences_scores, slow.sequences_scores)
    without = model.recommend(**PROCESSOR(HISTORIES), session_length=length, item_score_weight=weight, **options)
    assert not torch.allclose(fast.sequences_scores, without.sequences_scores)


def test_the_place_of_the_user_has_no_evidence_and_is_no_item():
    """With weights of zero for all features, scores are those of a model without them: the static place is padding to evidence."""
    model = make(item_head={**HEAD, "evidence": True, "neighbours": 4})
    head = model.model.encoder.item_head
    inputs = PROCESSOR(HISTORIES, users=USERS)
    plain = OneRecProcessor.from_catalogue(CATALOGUE, 8)(HISTORIES)
    assert not head.history_rows(inputs["input_ids"])[:, 0].any()
    assert torch.equal(head.history_rows(inputs["input_ids"])[:, 1:], head.history_rows(plain["input_ids"]))
    assert model.history_indices(inputs["input_ids"]).tolist() == [[-1, 1, 2, 3], [-1, 5, -1, -1]]
    head.evidence.set_list("near", torch.tensor([[2, 3]] * 40), torch.ones(40, 2))
    history = head.history_rows(inputs["input_ids"])
    base = torch.zeros(2, 40)
    assert_close(head.evidence.add(base, history), head.evidence.add(base, history[:, 1:]))
    seen = model.recommend(**inputs, session_length=1, num_beams=40, num_return_sequences=40, exclude_seen=True)
    sessions = PROCESSOR.batch_decode(seen)
    assert {item for (item,) in filter(None, sessions[:40])} == set(CATALOGUE.item_ids) - {"m1", "m2", "m3"}


def test_hidden_features_are_hidden_in_training_only():
    model = make(features={"dropout": 0.5})
    embedding = model.model.encoder.features
    histories, users = random_examples(100)
    codes = PROCESSOR(histories, users=users)["feature_ids"]
    assert torch.equal(embedding(codes), embedding(codes))
    embedding.train()
    assert not torch.equal(embedding(codes), embedding(codes))
    assert not embedding(codes)[~codes.any(-1)].any()
    embedding.dropout = 0.0
    assert torch.equal(embedding(codes), embedding(codes))


def test_round_trip(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    loaded, processor = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert processor.features == SCHEMA
    assert np.array_equal(processor.item_features, ITEM_FEATURES)
    inputs = processor(HISTORIES, SESSIONS, users=USERS)
    wanted = model(**PROCESSOR(HISTORIES, SESSIONS, users=USERS))
    assert torch.equal(loaded.eval()(**inputs).logits, wanted.logits)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 3
    first = (tmp_path / FEATURES_NAME).read_bytes()
    processor.save_pretrained(tmp_path)
    assert (tmp_path / FEATURES_NAME).read_bytes() == first
    OneRecProcessor.from_catalogue(CATALOGUE, 8).save_pretrained(tmp_path)
    assert not (tmp_path / FEATURES_NAME).exists()


#: Keys of the config.json of a model without features.
CONFIG_KEYS = (
    "architectures attention_dropout auto_map bos_token_id catalogue_hash codebook_sizes "
    "cross_attention_rope custom_pipelines decoder_layers decoder_scales_embeddings decoder_start_token_id dropout_rate dtype "
    "encoder_attention encoder_is_causal encoder_layers encoder_pools_items encoder_scales_embeddings "
    "eos_token_id format_version head_dim hidden_act hidden_size initializer_range intermediate_size "
    "is_encoder_decoder item_head max_position_embeddings model_type moe_intermediate_size norm_topk_prob "
    "num_attention_heads num_experts num_experts_per_tok num_key_value_heads output_router_logits "
    "pad_token_id rms_norm_eps rope_parameters router_aux_loss_coef sep_token_id session_length "
    "tie_word_embeddings transformers_version use_cache vocab_size"
)


def test_a_model_without_features_stays_as_it_was(tmp_path):
    model = make_model(CATALOGUE)
    model.save_pretrained(tmp_path)
    OneRecProcessor.from_catalogue(CATALOGUE, 8).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert " ".join(saved) == CONFIG_KEYS
    assert saved["format_version"] == 2
    assert not [name for name in model.state_dict() if "features" in name]
    assert "features" not in (tmp_path / "processor_config.json").read_text()
    assert not (tmp_path / FEATURES_NAME).exists()
    inputs = OneRecProcessor.from_catalogue(CATALOGUE, 8)([["m1"]])
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    with pytest.raises(ValueError, match="has no features"):
        model(**inputs, decoder_input_ids=torch.tensor([[1]]), feature_ids=torch.ones(1, 1, 3, dtype=torch.long))


def test_a_model_needs_its_features():
    model = make()
    inputs = PROCESSOR(HISTORIES, SESSIONS, users=USERS)
    codes = inputs.pop("feature_ids")
    for call in (model, model.recommend, model.generate):
        given = inputs if call is model else {"input_ids": inputs["input_ids"]}
        with pytest.raises(ValueError, match="pass feature_ids"):
            call(**given)
    with pytest.raises(ValueError, match="take the processor"):
        model(**inputs, feature_ids=codes[..., :-1])
    with pytest.raises(ValueError, match="'like' outside 0 to 4"):
        model(**inputs, feature_ids=codes.clone().index_fill_(2, torch.tensor([4]), 5))
    with pytest.raises(ValueError, match="2 rows of 3 places"):
        model(**inputs, feature_ids=codes[:, 1:])


def test_a_growing_catalogue_keeps_codes_and_gives_new_items_missing_ones():
    processor = copy.deepcopy(PROCESSOR)
    free = [code for code in np.ndindex(4, 5, 6) if code not in set(map(tuple, CATALOGUE.codes.tolist()))]
    grown = CATALOGUE.add(["new", "newer"], codes=[list(free[0]), list(free[1])])
    processor.set_catalogue(grown, item_values={"newer": {"genres": "Drama", "year": 2000}, "m2": {"year": 1950}})
    assert np.array_equal(processor.item_features[[0, 1, *range(3, 40)]], ITEM_FEATURES[[0, 1, *range(3, 40)]])
    assert processor.item_features[[2, 40, 41]].tolist() == [[1, 0, 0, 3], [1, 0, 0, 1], [4, 0, 0, 4]]
    smaller = grown.retire(["m0"], free_codes=True)
    processor.set_catalogue(smaller)
    assert np.array_equal(processor.item_features[0], ITEM_FEATURES[1])
    assert processor.item_features[-1].tolist() == [4, 0, 0, 4]
    with pytest.raises(KeyError, match="m0"):
        processor.set_catalogue(smaller, item_values={"m0": {"year": 2000}})
    plain = OneRecProcessor.from_catalogue(CATALOGUE)
    with pytest.raises(ValueError, match="processor with features"):
        plain.set_catalogue(grown, item_values={"new": {}})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=4,
)
VALUES = st.dictionaries(st.sampled_from(["age", "city", "tags", "like", "time", "other"]), JSON, max_size=4)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.lists(VALUES, min_size=1, max_size=3))
def test_any_value_has_a_code_or_one_clear_error(user, history):
    entries = [{**entry, "item": "m1"} for entry in history]
    codes, problem = None, None
    try:
        codes = PROCESSOR([entries], users=[user])["feature_ids"][0]
    except ValueError as error:
        problem = str(error)
    if codes is None:
        assert problem.startswith(("feature '", "a time is"))
        assert len(problem) < 300
        return
    sizes = [size for side in SCHEMA.config().values() for _, size, slots in side for _ in range(slots)]
    assert bool(((codes >= 0) & (codes < torch.tensor(sizes))).all())
    assert bool((codes[0, :3] > 0).all())
    assert bool((codes[1:, 4:8] > 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"histories": [[{"id": "m1"}]]}, "entry 0 of history 0 has no item"),
        ({"histories": [["m1"]], "users": [{}, {}]}, "users must hold"),
        ({"histories": [["m1"]], "users": ["anna"]}, "users must hold"),
        ({"histories": [["m1"]], "users": [{"age": "old"}]}, "feature 'age' is a number; got 'old'"),
        ({"histories": [[{"item": "m1", "time": "yesterday"}]]}, "a time is seconds"),
        ({"histories": [["m1", "m2"]], "history_features": [[1] * 5]}, "history_features of example 0 hold 5 values"),
        ({"histories": [["m1"]], "history_features": [[1, 1, 99]]}, "codes of 'time_hour' up to 99"),
        ({"histories": [["m1"]], "history_features": [[1, 1, -1]]}, "no codes"),
        ({"histories": [["m1"]], "history_features": [[1.0, 1.0, 1.0]]}, "of type float64"),
        ({"histories": [["m1"]], "user_features": [[1, 1, 1, 9, 9]]}, "user_features of example 0 hold 5 values"),
        ({"histories": [["m1"]], "user_features": []}, "codes of 0 users"),
        ({"histories": [["m1"]], "history_features": []}, "codes of 0 histories"),
    ],
)
def test_bad_features_of_a_request(call, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(**call)


def test_missing_columns_are_an_error_in_batches_and_missing_values_are_none():
    example = {"history": ["m1"], "session": ["m2"], "user_features": None, "history_features": None}
    codes = OneRecDataCollator(PROCESSOR)([example])["feature_ids"]
    assert torch.equal(codes, PROCESSOR([["m1"]])["feature_ids"])
    del example["history_features"]
    for collator in (OneRecDataCollator(PROCESSOR), PackedDataCollator(PROCESSOR, encoder_is_causal=True)):
        with pytest.raises(ValueError, match="lack the column 'history_features'"):
            collator([example])


def damaged(path, tensors=None, **metadata):
    held, before = load_file(path), read_safetensors(path)[1]
    save_file({**held, **(tensors or {})}, path, metadata={**before, **metadata})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "[]"}, "damaged"),
        ({"schema": json.dumps({"user": [], "interaction": [], "item": [], "time": "time"})}, "at least one feature"),
        ({"schema": SCHEMA.to_json().replace('"slots": 2', '"slots": 0')}, "must be at least 1"),
        ({"schema": SCHEMA.to_json().replace("[18.0, 40.0]", "[40.0, 18.0]")}, "edges must ascend"),
        ({"schema": SCHEMA.to_json().replace('"hashes": 7', '"hashes": "x"')}, "damaged"),
        ({"schema": SCHEMA.to_json().replace('["Rome", "Paris"]', '["Rome", "Rome"]')}, "unique"),
        ({"version": "2"}, "upgrade"),
        ({"catalogue_hash": "0" * 64}, "was saved with the catalogue 000000000000"),
        ({"tensors": {"item_features": ITEM_FEATURES[:-1]}}, "damaged"),
        ({"tensors": {"item_features": ITEM_FEATURES.astype(np.int64)}}, "damaged"),
        ({"tensors": {"item_features": ITEM_FEATURES + 9}}, "damaged"),
        ("cut", "damaged or cut short"),
        ("pickle", "damaged or cut short"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    PROCESSOR.save_pretrained(tmp_path)
    path = tmp_path / FEATURES_NAME
    if change == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif change == "pickle":
        torch.save({"a": 1}, path)
    else:
        damaged(path, **change)
    with pytest.raises(ValueError, match=message) as raised:
        OneRecProcessor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_an_exported_encoder_counts_positive_interactions_alone_as_evidence():
    schema = FeatureSchema(interaction=(Feature(POSITIVE, values=("0", "1")),))
    head = {"num_items": len(CATALOGUE), "loss_weight": 1.0, "evidence": True, "neighbours": 4}
    model = make(schema, {"not_positive": schema.not_positive}, item_head=head)
    evidence = model.get_encoder().item_head.evidence
    torch.manual_seed(2)
    for name in LISTS:
        rows = torch.stack([torch.randperm(len(CATALOGUE))[:4] + 1 for _ in CATALOGUE.item_ids])
        evidence.set_list(name, rows, torch.rand(rows.shape) * 9)
    evidence.set_weights(torch.rand(len(evidence.weights)) + 0.5)
    history = [{"item": "m1", POSITIVE: True}, {"item": "m2", POSITIVE: False}]
    inputs = OneRecProcessor.from_catalogue(CATALOGUE, 8, schema)([history])
    count = len(CATALOGUE)
    ranked = model.recommend(
        **inputs,
        session_length=1,
        num_beams=count,
        num_return_sequences=count,
        item_score_weight=1.0,
        decoder_weight=0.0,
        return_dict_in_generate=True,
    )
    items = PROCESSOR.batch_decode(ranked.sequences)
    with torch.no_grad():
        scores = encoder_graph(model)(**inputs)["item_log_probs"][0]
    assert_close(scores[CATALOGUE.indices([item for (item,) in items])], ranked.sequences_scores)


@pytest.mark.slow
def test_an_exported_encoder_reads_features(tmp_path):
    differences = export_onnx(make(), PROCESSOR, tmp_path)
    assert max(differences.values()) < TOLERANCE
    inputs = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").get_inputs()
    assert [each.name for each in inputs] == ["input_ids", "attention_mask", "feature_ids"]


def test_times_in_milliseconds_are_those_in_seconds():
    seconds = [1_700_000_000, 1_700_000_030, 1_700_009_000]

    def coded(unit):
        return SCHEMA.encode_interactions([{"time": time * unit} for time in seconds]).tolist()

    assert coded(1000) == coded(10**6) == coded(10**9) == coded(1)


def test_plain_ids_are_positive_where_histories_hold_other_interactions():
    schema = FeatureSchema(interaction=(Feature("positive", values=("1", "0")), Feature("like", values=("0", "1"))))
    processor = OneRecProcessor.from_catalogue(CATALOGUE, 8, schema)
    said = processor([[{"item": "m1", "positive": True}, {"item": "m2", "positive": 1}]])["feature_ids"]
    for history in (["m1", "m2"], [{"item": "m1"}, "m2"], [{"item": "m1", "positive": None}, "m2"]):
        assert torch.equal(processor([history])["feature_ids"], said)
    other = processor([["m1", {"item": "m2", "positive": False}]])["feature_ids"]
    assert (other != said).nonzero().tolist() == [[0, 1, 0]]


def test_a_gap_is_to_the_interaction_before_that_the_catalogue_holds():
    history = [{"item": "m1", "time": 0}, {"item": "gone", "time": 4990}, {"item": "m2", "time": 5000}]
    with pytest.warns(UserWarning, match="left out 1 of 3 history items"):
        found = PROCESSOR([history], unknown="skip")["feature_ids"]
    assert torch.equal(found, PROCESSOR([[history[0], history[2]]])["feature_ids"])
