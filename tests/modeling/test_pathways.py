"""Short-term and positive pathways: what the processor reads of a flagged history, the model's networks, rankings, requests and files."""

import json

import pytest
import torch

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config
from onerec_hf.modeling.feature_embedding import FeatureEmbedding, positive_places
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration
from onerec_hf.modeling.requests import Recommender, Request
from tests.conftest import make_model
from tests.modeling.feature_models import CATALOGUE
from tests.rounding import assert_close

SCHEMA = FeatureSchema(
    user=(Feature("age", edges=(18.0, 40.0)),),
    interaction=(Feature("watch", edges=(10.0,)), Feature("positive", values=("1", "0"))),
    item=(Feature("year", edges=(1990.0,)),),
)
PATHWAYS = {"short_term": 2, "positive": 3}
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, 8, SCHEMA, pathways=PATHWAYS)
FLAGS = [True, False, True, True, True, False, False]
HISTORY = [{"item": f"m{i}", "watch": i * 3, "positive": flag} for i, flag in enumerate(FLAGS)]
HISTORIES = [HISTORY, ["m9"], [{"item": "m5", "positive": False}]]
USERS = [{"age": 31}, None, {"age": 10}]
READ = [["m5", "m6", "m2", "m3", "m4"], ["m9", "m9"], ["m5"]]  # by user: the latest 2, then the latest 3 positive ones
FEATURES = {**SCHEMA.config(), "dim": 6, "not_positive": SCHEMA.not_positive, "pathways": PATHWAYS}


def make(features=FEATURES, **config):
    model = make_model(CATALOGUE, features=features, **config)
    torch.manual_seed(1)
    model.model.encoder.features.table.weight.data[1:].normal_(std=0.5)
    return model


def inputs(**options):
    return PROCESSOR(HISTORIES, users=USERS, **options)


def test_a_history_is_read_as_its_latest_and_its_latest_positive_interactions():
    batch = inputs()
    static, places = PROCESSOR.static_places, batch["input_ids"].unflatten(1, (-1, 4))
    codes = places[..., 1:] - torch.tensor(PROCESSOR.tokenizer.level_offsets)
    rows = CATALOGUE.indices_of_codes(codes[:, static:])
    assert [CATALOGUE.ids(user[user >= 0].numpy()) for user in rows] == READ
    assert batch["feature_ids"][..., -1].tolist() == [[0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    # Each place has the values of its own interaction.
    watch = batch["feature_ids"][0, 1:, 1]
    assert watch.tolist() == [SCHEMA.interaction[0].encode([int(item[1:]) * 3])[0, 0] for item in READ[0]]


def test_max_history_cuts_before_the_pathways():
    batch = inputs(max_history=3)  # m4 is the only positive one of the latest three
    assert batch["feature_ids"][0, :, -1].tolist() == [0, 1, 1, 2]


def test_each_pathway_has_a_network_of_its_own():
    config = make().config
    embedding = FeatureEmbedding(config)
    torch.nn.init.normal_(embedding.table.weight)
    codes = inputs()["feature_ids"]
    before = embedding(codes)
    with torch.no_grad():
        embedding.short_term[2].bias += 1.0
    changed = embedding(codes) - before
    short = codes[..., -1] == 1
    assert_close(changed[short], torch.ones_like(changed[short]))
    assert not changed[~short].any()


@pytest.mark.parametrize("kind", ["encoder", "packed"])
def test_states_equal_a_computation_by_hand(kind):
    """A place's features are Dense(LeakyReLU(Dense)) of its own pathway, of the concatenated embeddings, in float64."""
    embedding = make().model.encoder.features.double()
    codes = inputs()["feature_ids"]
    found = embedding(codes, packed=kind == "packed")
    table, width = embedding.table.weight, FEATURES["dim"]
    for user, places in enumerate(codes.tolist()):
        for place, (*own, pathway) in enumerate(places):
            wanted = torch.zeros(found.shape[-1], dtype=torch.float64)
            for network, slots in (
                (embedding.user, [0]),
                ({0: None, 1: embedding.short_term, 2: embedding.item}[pathway], [1, 2, 3]),
            ):
                if network is None or not any(own[slot] for slot in slots):
                    continue
                rows = [embedding.begins[slot] + own[slot] if own[slot] else 0 for slot in slots]
                first, second = network[0], network[2]
                joined = torch.cat([table[row] for row in rows])
                assert len(joined) == width * len(slots)
                inner = first.weight @ joined + first.bias
                wanted = wanted + second.weight @ torch.where(inner > 0, inner, 0.01 * inner) + second.bias
            assert_close(found[user, place], wanted)


def test_evidence_and_exclusions_read_the_positive_pathway_alone():
    model, batch = make(), inputs()
    assert positive_places(model.config.features, batch["feature_ids"])[0].tolist() == [False] * 3 + [True] * 3
    rows = model.history_indices(batch["input_ids"], batch["feature_ids"])
    assert [CATALOGUE.ids(user[user >= 0].numpy()) for user in rows] == [["m2", "m3", "m4"], ["m9"], []]
    out = model.recommend(**batch, session_length=1, num_beams=40, num_return_sequences=40, exclude_seen=True)
    items = [session[0] for session in PROCESSOR.batch_decode(out)[:40] if session]
    assert not {"m2", "m3", "m4"} & set(items)
    assert {"m0", "m5", "m6"} <= set(items)


@pytest.mark.parametrize("architecture", ["onerec", "onerec_v2"])
def test_users_do_not_depend_on_each_other(architecture):
    if architecture == "onerec":
        model = make(item_head={"num_items": len(CATALOGUE), "loss_weight": 1.0})
    else:
        torch.manual_seed(0)
        config = OneRecV2Config(
            codebook_sizes=list(CATALOGUE.codebook_sizes),
            hidden_size=32,
            num_attention_heads=4,
            decoder_layers=2,
            num_experts=1,
            features=FEATURES,
        )
        model = OneRecV2ForConditionalGeneration(config).eval()
        model.set_catalogue(CATALOGUE)
    sessions = [["m20", "m21"], ["m22"], ["m23"]]
    together = model(**inputs(sessions=sessions))
    alone = model(**PROCESSOR(HISTORIES[1:2], users=USERS[1:2], sessions=sessions[1:2]))
    assert_close(together.logits[1:2, : alone.logits.shape[1]], alone.logits)
    assert torch.isfinite(together.loss)


def test_requests_read_flags_of_entries():
    model = make()
    recommender = Recommender(model, PROCESSOR)
    requests = [
        Request(history, user=user, top_k=5, num_beams=12) for history, user in zip(HISTORIES, USERS, strict=True)
    ]
    answers = recommender.recommend(requests)
    seen = [[f"m{i}" for i, flag in enumerate(FLAGS) if flag], ["m9"], []]
    options = {"session_length": 1, "num_beams": 12, "num_return_sequences": 5}
    out = PROCESSOR.batch_decode(model.recommend(**inputs(), exclude=seen, **options))
    assert [answer.sessions for answer in answers] == [out[5 * user : 5 * user + 5] for user in range(3)]


def test_files(tmp_path):
    model = make()
    model.save_pretrained(tmp_path), PROCESSOR.save_pretrained(tmp_path)
    processor = OneRecProcessor.from_pretrained(tmp_path)
    again = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert processor.pathways == again.config.features.pathways == PATHWAYS
    batch = processor(HISTORIES, users=USERS)
    assert torch.equal(batch["feature_ids"], inputs()["feature_ids"])
    with torch.no_grad():
        decoder = {"decoder_input_ids": torch.ones(3, 1, dtype=torch.long)}
        assert_close(again(**batch, **decoder).logits, model.eval()(**inputs(), **decoder).logits)


def test_files_of_models_without_pathways_say_nothing_of_them(tmp_path):
    """They are those of earlier versions, byte for byte."""
    features = {**FEATURES, "pathways": None}
    model, processor = make(features), OneRecProcessor.from_catalogue(CATALOGUE, 8, SCHEMA)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        assert "pathways" not in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "config.json").read_text())["features"]["not_positive"] == SCHEMA.not_positive
    assert not any("short_term" in name for name in model.state_dict())
    assert processor(HISTORIES, users=USERS)["feature_ids"].shape[-1] == SCHEMA.slots


@pytest.mark.parametrize(
    "pathways", [{"short_term": 2}, {"short_term": 2, "positive": 0}, {"short_term": 2, "lifelong": 3}]
)
def test_other_pathways_are_refused(pathways):
    with pytest.raises(Exception, match="short_term, positive, at least 1"):
        OneRecConfig(features={**FEATURES, "pathways": pathways})
    with pytest.raises(ValueError, match="short_term, positive, at least 1"):
        OneRecProcessor.from_catalogue(CATALOGUE, 8, SCHEMA, pathways=pathways)(HISTORIES)


def test_they_need_histories_of_all_feedback():
    plain = FeatureSchema(user=SCHEMA.user)
    with pytest.raises(Exception, match="history_feedback"):
        OneRecConfig(features={**plain.config(), "pathways": PATHWAYS})
    with pytest.raises(ValueError, match="history_feedback"):
        OneRecProcessor.from_catalogue(CATALOGUE, 8, plain, pathways=PATHWAYS)([["m1"]])


def test_a_processor_with_other_pathways_is_refused():
    other = OneRecProcessor.from_catalogue(CATALOGUE, 8, SCHEMA)
    with pytest.raises(ValueError, match="different pathways"):
        Recommender(make(), other)
    with pytest.raises(ValueError, match="feature_ids have shape"):
        make()(**other(HISTORIES, users=USERS, sessions=[["m1"]] * 3))
