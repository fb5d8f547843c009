"""The lifelong pathway: what is older than the history, compressed by hierarchical k-means and a Q-Former."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from onerec_hf import (
    ItemCatalogue,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecProcessor,
    OneRecV2Config,
    OneRecV2ForConditionalGeneration,
)
from onerec_hf.cli.export import export_onnx
from onerec_hf.data import OneRecDataCollator, PackedDataCollator
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.modeling.lifelong import LifelongPathway
from onerec_hf.modeling.lifelong_history import LIFELONG_NAME, LifelongHistory, compress_history
from onerec_hf.modeling.requests import AnswerCounts, Recommender, Request, RequestError
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
from tests.rounding import assert_close, close

ITEMS = 40
TINY = {
    "codebook_sizes": [4, 4, 4],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_experts": 2,
}


def catalogue(items: int = ITEMS) -> ItemCatalogue:
    codes = np.random.default_rng(0).permutation(64)[:items]
    return ItemCatalogue(list(range(items)), np.stack([codes // 16, codes // 4 % 4, codes % 4], 1), [4, 4, 4])


def made(clusters: int = 3, vectors: np.ndarray | None = None, **options):
    """A model and its processor, which reads the latest four items."""
    torch.manual_seed(0)
    pools = options.get("encoder_pools_items", False)
    config = OneRecConfig(
        **TINY, **options, lifelong={"items": clusters, "queries": 8}, item_head={"num_items": ITEMS}
    )
    model = OneRecForConditionalGeneration(config).eval()
    model.set_catalogue(catalogue())
    if vectors is None:
        vectors = np.random.default_rng(1).normal(size=(ITEMS, 5))
    lifelong = LifelongHistory(vectors.astype(np.float16), clusters, 8, pools_items=pools)
    return model, OneRecProcessor.from_catalogue(model.catalogue, max_history=4, lifelong=lifelong)


HISTORIES = [[*range(20), 3, 3], [5, 6], list(range(30, 37))]


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=60),
    st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_compressed_histories_are_short_and_lose_no_item(rows, most):
    vectors = np.array(rows, np.float32)
    places, sizes = compress_history(vectors, most)
    assert len(places) <= most
    assert sizes.sum() == len(vectors)
    assert (np.diff(places) > 0).all()
    distinct = len(np.unique(vectors, axis=0))
    if most <= len(vectors):
        assert len(places) >= min(most, distinct)


def test_clusters_are_groups_of_similar_items():
    random = np.random.default_rng(0)
    group = random.integers(0, 5, 300)
    vectors = random.normal(size=(5, 8))[group] * 10 + random.normal(size=(300, 8)) * 0.01
    # Splits are by the cube root, so a few more clusters than groups find each of them.
    places, sizes = compress_history(vectors, 40)
    for each in range(5):
        assert sizes[group[places] == each].sum() == (group == each).sum()


@pytest.mark.parametrize("vectors", [np.full((3, 2), np.nan), np.zeros(3), np.array([[np.inf]])])
def test_vectors_that_are_no_table_of_numbers_are_refused(vectors):
    with pytest.raises(ValueError, match="finite vectors"):
        compress_history(vectors, 2)


def test_a_cluster_of_equal_items_counts_as_all_of_them():
    torch.manual_seed(0)
    pathway = LifelongPathway(OneRecConfig(**TINY, lifelong={"queries": 4})).double()
    torch.nn.init.normal_(pathway.queries)
    items = torch.randn(1, 3, 16, dtype=torch.double)
    whole = pathway(items[:, [0, 1, 1, 1, 2, 2]], torch.ones(1, 6, dtype=torch.long))
    compressed = pathway(items, torch.tensor([[1, 3, 2]]))
    assert_close(compressed, whole)


def test_equals_a_computation_by_hand():
    torch.manual_seed(0)
    pathway = LifelongPathway(OneRecConfig(**TINY, lifelong={"queries": 4, "layers": 1})).double()
    torch.nn.init.normal_(pathway.queries)
    items, sizes = torch.randn(5, 16, dtype=torch.double), torch.tensor([2, 1, 7, 0, 0])
    found = pathway(items[None], sizes[None])[0]

    def norm(layer, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    first, _, second = pathway.dense
    block = pathway.blocks[0]
    keys = norm(
        pathway.norm,
        torch.nn.functional.leaky_relu(items[:3] @ first.weight.T + first.bias) @ second.weight.T + second.bias,
    )
    states = pathway.queries
    query, key, value = (
        norm(block.norm, states) @ block.q_proj.weight.T,
        keys @ pathway.k_proj.weight.T,
        keys @ pathway.v_proj.weight.T,
    )
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = sizes[:3] * torch.exp(query[:, head] @ key[:, head].T / 8**0.5)
        heads.append(weights / weights.sum(1, keepdim=True) @ value[:, head])
    states = states + torch.cat(heads, 1) @ block.o_proj.weight.T
    inner = norm(block.mlp_norm, states)
    gate, up = inner @ block.mlp.gate_proj.weight.T, inner @ block.mlp.up_proj.weight.T
    states = states + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T
    assert_close(found, states, dtype=torch.float32)  # norms compute in float32


@pytest.mark.parametrize("pools", [False, True])
def test_a_batch_is_each_user_alone_and_generate_finds_the_same(pools):
    model, processor = made(encoder_pools_items=pools)
    inputs = processor(HISTORIES)
    assert inputs["lifelong_ids"][:, :, 0].tolist()[1] == [0, 0, 0]  # two items fit into the history
    assert inputs["lifelong_ids"][:, :, 0].sum(1).tolist() == [18, 0, 3]
    asked = {"num_beams": 4, "item_score_weight": 0.5, "return_dict_in_generate": True}
    together = model.recommend(**inputs, session_length=1, **asked)
    alone = [model.recommend(**processor([history]), session_length=1, **asked) for history in HISTORIES]
    assert together.sequences.tolist() == [one.sequences[0].tolist() for one in alone]
    scores = torch.cat([one.sequences_scores for one in alone])
    assert_close(together.sequences_scores, scores)
    generated = model.generate(**inputs, max_new_tokens=3, output_scores=True, length_penalty=0.0, **asked)
    assert generated.sequences.tolist() == together.sequences.tolist()
    assert_close(generated.sequences_scores, scores)


def test_earlier_items_matter_and_their_absence_leaves_the_model_as_without_the_pathway():
    model, processor = made()
    with torch.no_grad():
        long, longer = (processor([[*earlier, 7, 8, 9, 10]]) for earlier in ([1, 2], [30, 31, 32]))
        outs = [model(**inputs, labels=torch.tensor([[4, 8, 12]])).logits for inputs in (long, longer)]
        assert not torch.allclose(*outs)

        plain = OneRecForConditionalGeneration(OneRecConfig(**TINY, item_head={"num_items": ITEMS})).eval()
        missing = plain.load_state_dict(model.state_dict(), strict=False)
        assert all(".lifelong." in name for name in missing.unexpected_keys)
        assert not missing.missing_keys
        short = OneRecProcessor.from_catalogue(model.catalogue, max_history=4)([[7, 8]])
        found = model(**processor([[7, 8]]), labels=torch.tensor([[4, 8, 12]])).logits
        expected = plain(**short, labels=torch.tensor([[4, 8, 12]])).logits
    assert_close(found, expected)


def test_gradients_reach_every_weight_of_the_pathway():
    model, processor = made()
    model(**processor(HISTORIES, [[1], [2], [3]])).loss.backward()
    silent = [
        name for name, weight in model.model.encoder.lifelong.named_parameters() if not weight.grad.abs().sum() > 0
    ]
    assert silent == []


def test_it_is_saved_with_the_processor_and_grows_with_the_catalogue(tmp_path):
    model, processor = made()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, same = OneRecForConditionalGeneration.from_pretrained(tmp_path), OneRecProcessor.from_pretrained(tmp_path)
    expected, found = processor(HISTORIES), same(HISTORIES)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    labels = torch.tensor([[4, 8, 12]] * 3)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**found, labels=labels).logits, model(**expected, labels=labels).logits)
    grown = same.catalogue.add([99], np.array([free_codes(same.catalogue)]))
    same.set_catalogue(grown)
    assert same.lifelong.vectors.shape == (ITEMS + 1, 5)
    place = int(same.catalogue.indices([99])[0])
    assert not same.lifelong.vectors[place].any()
    assert same([[99, *range(8)]])["lifelong_ids"][0, :, 0].sum() == 5

    (tmp_path / LIFELONG_NAME).write_bytes(b"\x08" * 40)
    with pytest.raises(ValueError, match=r"lifelong\.safetensors"):
        OneRecProcessor.from_pretrained(tmp_path)


def free_codes(own: ItemCatalogue) -> list[int]:
    taken = {tuple(row) for row in own.codes.tolist()}
    return next([a, b, c] for a in range(4) for b in range(4) for c in range(4) if (a, b, c) not in taken)


def test_it_trains_on_windows_and_pads_like_other_models(tmp_path):
    model, processor = made(clusters=4)
    examples = Dataset.from_dict({"history": HISTORIES * 4, "session": [[9], [7], [12]] * 4})
    collator = OneRecDataCollator(processor, pad_to_multiple_of=8)
    assert collator(examples.select([1]).to_list())["input_ids"].shape[1] % 32 == 0
    before = model.model.encoder.lifelong.queries.detach().clone()
    arguments = OneRecTrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    OneRecTrainer(model, arguments, train_dataset=examples, processing_class=processor).train()
    assert not torch.equal(model.model.encoder.lifelong.queries, before)


@pytest.mark.parametrize("features", [False, True])
def test_a_lazy_decoder_reads_features_and_lifelong_histories(features):
    torch.manual_seed(0)
    schema = FeatureSchema(user=(Feature("age", edges=(30.0,)),), interaction=(Feature("like", values=("0", "1")),))
    lifelong = LifelongHistory(
        np.random.default_rng(1).normal(size=(ITEMS, 5)).astype(np.float16), 3, 8, pools_items=True
    )
    own = {"features": schema.config()} if features else {}
    config = OneRecV2Config(
        codebook_sizes=[4, 4, 4],
        hidden_size=16,
        num_attention_heads=2,
        decoder_layers=2,
        lifelong={"items": 3, "queries": 8},
        **own,
    )
    model = OneRecV2ForConditionalGeneration(config).eval()
    model.set_catalogue(catalogue())
    processor = OneRecProcessor.from_catalogue(
        model.catalogue, max_history=4, features=schema if features else None, lifelong=lifelong
    )
    given = {"users": [{"age": age} for age in (20, 50, None)]} if features else {}
    inputs = processor(HISTORIES, **given)
    asked = {"session_length": 1, "num_beams": 4, "return_dict_in_generate": True}
    together = model.recommend(**inputs, **asked)
    parts = [
        model.recommend(**processor([history], **{name: [value[place]] for name, value in given.items()}), **asked)
        for place, history in enumerate(HISTORIES)
    ]
    assert together.sequences.tolist() == [part.sequences[0].tolist() for part in parts]
    assert_close(together.sequences_scores, torch.cat([part.sequences_scores for part in parts]))
    other = processor([[39, 38, *HISTORIES[0][2:]], *HISTORIES[1:]], **given)
    assert not torch.equal(model.recommend(**other, **asked).sequences_scores[:1], together.sequences_scores[:1])
    with pytest.raises(ValueError, match="pass lifelong_ids"):
        model.recommend(**{name: value for name, value in inputs.items() if name != "lifelong_ids"}, **asked)


def test_what_does_not_belong_together_is_refused():
    model, processor = made()
    inputs = processor(HISTORIES)
    labels = torch.tensor([[4, 8, 12]] * 3)
    with pytest.raises(ValueError, match="pass lifelong_ids beside input_ids"):
        model(inputs["input_ids"], inputs["attention_mask"], labels=labels)
    with pytest.raises(ValueError, match="do not belong to input_ids"):
        model(**{**inputs, "lifelong_ids": inputs["lifelong_ids"][:2]}, labels=labels)
    packed = {"segment_ids": inputs["attention_mask"], "history_ranges": torch.tensor([[[0, 4]]] * 3)}
    with pytest.raises(ValueError, match="without packing"):
        model(inputs["input_ids"], lifelong_ids=inputs["lifelong_ids"], **packed, labels=labels)
    with pytest.raises(ValueError, match="train on windows"):
        PackedDataCollator(processor, encoder_is_causal=True)([{"history": [1, 2], "session": [3]}])
    plain = OneRecForConditionalGeneration(OneRecConfig(**TINY))
    with pytest.raises(ValueError, match="no lifelong pathway"):
        plain(**inputs, labels=labels)
    with pytest.raises(StrictDataclassError, match="multiple of the 4 tokens"):
        OneRecConfig(**TINY, lifelong={"queries": 6})
    with pytest.raises(ValueError, match="vectors of 3 items"):
        OneRecProcessor.from_catalogue(catalogue(), 4, lifelong=LifelongHistory(np.zeros((3, 2), np.float16)))
    with pytest.raises(ValueError, match="pass max_history too"):
        OneRecProcessor.from_catalogue(catalogue(), lifelong=processor.lifelong)


def test_requests_refuse_a_processor_with_another_pathway():
    model, processor = made()
    vectors = processor.lifelong.vectors
    for lifelong in (None, LifelongHistory(vectors, 3, 4), LifelongHistory(vectors, 3, 8, pools_items=True)):
        other = OneRecProcessor.from_catalogue(model.catalogue, max_history=4, lifelong=lifelong)
        with pytest.raises(ValueError, match="different lifelong pathways"):
            Recommender(model, other)
    assert Recommender(model, processor).recommend([Request(HISTORIES[0], top_k=2)])


def test_heads_that_do_not_divide_the_width_are_refused():
    own = {**TINY, "hidden_size": 18, "num_attention_heads": 4, "head_dim": 4}
    OneRecConfig(**own)
    with pytest.raises(StrictDataclassError, match="hidden_size=18 must be a multiple of num_attention_heads=4"):
        OneRecConfig(**own, lifelong={"queries": 4})


def test_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model has a lifelong pathway"):
        export_onnx(*made(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_requests_read_whole_histories():
    model, processor = made()
    for weight in model.parameters():
        weight.data.mul_(5)  # so that what is older matters
    recommender = Recommender(model, processor)
    answers = recommender.recommend([Request(history, top_k=1, exclude_seen=False) for history in HISTORIES])
    asked = {"session_length": 1, "num_beams": 10, "return_dict_in_generate": True}
    found = model.recommend(**processor(HISTORIES), **asked)
    assert [answer.sessions for answer in answers] == [[session] for session in processor.batch_decode(found)]
    assert_close(torch.tensor([answer.scores[0] for answer in answers]), found.sequences_scores)
    with pytest.raises(RequestError, match="max_history: a model with a lifelong pathway reads its own"):
        recommender.recommend([Request(HISTORIES[0], max_history=2)])


@pytest.mark.parametrize("features", [False, True])
def test_requests_read_what_is_older_than_the_latest_items(features):
    schema = FeatureSchema(interaction=(Feature("like", values=("0", "1")),)) if features else None
    model, processor = made(**({"features": schema.config()} if features else {}))
    processor = OneRecProcessor.from_catalogue(model.catalogue, 4, schema, lifelong=processor.lifelong)
    asked = {"session_length": 1, "num_beams": 8, "num_return_sequences": 3}
    recommend = pipeline("generative-recommendation", model=model, processor=processor, device="cpu")
    for items in HISTORIES:
        history = [{"item": item, "like": item % 2} for item in items] if features else items
        found = model.recommend(**processor([history]), **asked, exclude=[items], return_dict_in_generate=True)
        (answer,) = Recommender(model, processor).recommend([Request(history, top_k=3, num_beams=8)])
        assert answer.sessions == processor.batch_decode(found)
        assert answer.scores == close(found.sequences_scores.tolist())
        piped = recommend(history, top_k=3, num_beams=8)
        assert [each["item"] for each in piped] == [item for (item,) in answer.sessions]
        assert [each["score"] for each in piped] == close(answer.scores)
    with pytest.raises(RequestError, match="max_history: a model with a lifelong pathway reads its own"):
        Recommender(model, processor).resolve(Request([1, 2], max_history=3))
    with pytest.raises(ValueError, match="different lifelong pathways"):
        Recommender(model, OneRecProcessor.from_catalogue(model.catalogue, 4, schema))


def test_items_beyond_the_longest_history_are_counted():
    model, processor = made(clusters=3)
    processor.lifelong = replace(processor.lifelong, longest=6)  # ten items with the latest four
    history = [int(item) for item in np.random.default_rng(3).permutation(ITEMS)[:14]]
    with pytest.warns(
        UserWarning, match="left out the oldest 4 items of 1 of 2 histories: a lifelong pathway reads 6"
    ):
        cut = processor([history, history[-10:]])
    assert torch.equal(cut["lifelong_ids"][0], cut["lifelong_ids"][1])
    recommender, counts = Recommender(model, processor), AnswerCounts()
    answers = recommender.recommend([Request(history), Request(history[-10:], exclude=history[:4])])
    for answer in answers:
        counts.add(answer)
    assert "read only the latest items of 1 of 2 histories, which are longer than the model reads" in str(counts)
    assert answers[0].sessions == answers[1].sessions
    assert answers[0].scores == close(answers[1].scores)
